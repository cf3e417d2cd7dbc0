"""Tiny real models and collections that the tests share. Nothing here needs a network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.fresh import run_fresh

WORDS = (
    "a an the of in on is was who what where when which river lake mountain city country money bank language people "
    "capital north south east west red blue green old new big small one two three four five six seven eight nine ten "
    "cat dog horse bird fish tree flower bread water fire stone gold silver king queen war peace book song school"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


# What takes long: whole runs, processes that are started or killed, compiled models, real text, a browser.
SLOW = (
    "campaigns/ distributed/ integration/ test_real_text test_processes in_browser test_package test_packaging "
    "test_refresh "
    "encoding/test_store queries/test_store queries/test_endpoint queries/test_budget queries/test_pairs "
    "moe/test_saving moe/test_training moe/test_card moe/test_specialization losses/test_training "
    "evaluators/test_benchmarks evaluators/test_beir_search test_what_a_batch_frees test_pytrec_eval_is_needed "
    "test_layers_that_are_compiled test_a_compiled_model test_a_whole_model_compiles"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(part in item.nodeid for part in SLOW):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and PyTorch finds none"))


def pytest_collection_finish() -> None:
    """Let no garbage collection look at what the libraries hold: every training begins with one, of half a second."""
    gc.collect()
    gc.freeze()


def build_tiny_bert(folder: Path, *, seed: int = 0, layers: int = 2, dropout: float = 0.0) -> Path:
    """Write a BERT of width 32 and its word-piece tokenizer to ``folder``; letters are in its vocabulary too."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789?.,-")
    vocabulary = SPECIAL + list(dict.fromkeys(WORDS + letters + [f"##{letter}" for letter in letters]))
    folder.mkdir(parents=True, exist_ok=True)
    vocab_file = folder / "vocab.txt"
    vocab_file.write_text("\n".join(vocabulary), encoding="utf-8")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocab_file), model_max_length=64).save_pretrained(folder)
    return folder


def build_tiny_model(folder: Path, *, seed: int = 0, dropout: float = 0.0, normalize: bool = True) -> Path:
    """Write a whole SentenceTransformer (Transformer, mean Pooling, Normalize) around the tiny BERT."""
    transformer = Transformer(str(build_tiny_bert(folder / "bert", seed=seed, dropout=dropout)), max_seq_length=64)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), "mean")]
    model = SentenceTransformer(modules=[*modules, Normalize()] if normalize else modules, device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny_model(tiny_model_path: Path) -> SentenceTransformer:
    """A fresh tiny SentenceTransformer, on the CPU, without dropout; width 32, at most 64 tokens."""
    return SentenceTransformer(str(tiny_model_path), device="cpu")


@pytest.fixture
def make_tiny_model(tmp_path: Path) -> Callable[..., SentenceTransformer]:
    """Build a tiny model with other settings: ``make_tiny_model(seed=1, dropout=0.1, normalize=False)``."""

    def make(**settings: Any) -> SentenceTransformer:
        folder = tmp_path / f"model {len(list(tmp_path.iterdir()))}"
        return SentenceTransformer(str(build_tiny_model(folder, **settings)), device="cpu")

    return make


def _snippet(folder: Path) -> str:
    """The Python code of a folder's card, which names the folder in place of the model's name on the Hub."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    named = re.sub(r'SentenceTransformer\("[^"]*"', f"SentenceTransformer({str(folder)!r}", code)
    assert str(folder) in named
    return named


def _run_snippets(*folders: Path) -> dict[str, list[int]]:
    """Run them one after the other, in the order given; the shapes of the embeddings that each gets."""
    names = ("query_embeddings", "embeddings")
    lines = ["import json", "found = {}"]
    for folder in folders:
        lines += [
            "names = {}",
            f"exec({_snippet(folder)!r}, names)",
            f"shape = next(names[name].shape for name in {names} if name in names)",
            f"found[{folder.name!r}] = list(shape)",
        ]
    lines.append("print(json.dumps(found))")
    return json.loads(run_fresh("\n".join(lines)).stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def run_snippets() -> Callable[..., dict[str, list[int]]]:
    """``run_snippets(*folders)`` runs what the model cards of these folders say, in a process of its own."""
    return _run_snippets


# What the tiny models that write know.
WRITTEN = (
    "a an the of in on is was who what where when which river lake mountain city country money bank language people "
    "capital north south east west red blue green old new big small one two three four five six seven cat dog horse"
).split()


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *WRITTEN])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=128
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_causal_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of width 32 with random weights; it reads 128 tokens."""
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 of width 32 with random weights."""
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server that speaks S3, on loopback, with credentials for it in the environment."""
    pytest.importorskip("s3fs", reason="s3fs is not installed: pip install 'st-clp[s3]'")
    pytest.importorskip("moto", reason="moto is not installed")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"bucket-{time.monotonic_ns()}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"
