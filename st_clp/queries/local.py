"""Queries by a local model: a sequence-to-sequence model as in doc2query, or a causal one with a prompt."""

from __future__ import annotations

import copy
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from st_clp.data import Document
from st_clp.encoding import ComputeDtype, hardware_has_bf16
from st_clp.queries.interface import DocumentQueries, GeneratingSource, SourceEstimate, Usage
from st_clp.queries.wording import DOCUMENT, Prompts, clean, fault, fill

logger = logging.getLogger(__name__)

WINDOW = 256  # documents that are sorted by length together; those of one batch are kept when it is done


class LocalQueries(GeneratingSource):
    """Queries by a transformers model, in batches of documents of similar length.

    A sequence-to-sequence model reads the document alone, as doc2query models do (Nogueira and Lin (2019), From
    doc2query to docTTTTTquery), unless a prompt is given. A causal model reads the prompt, in its chat template where
    its tokenizer has one. A document's queries depend on the seed and the document, not on the batch, except for near
    ties decided by rounding (more of them in bfloat16).

    Args:
        name_or_path: A folder, or a name on the Hugging Face Hub. It is loaded when it is first needed.
        prompts: Templates by language. None: the built-in ones for a causal model, none for the other kind.
        samples: Queries to sample for each document.
        max_new_tokens: Tokens that a query may have.
        max_document_tokens: A document is cut after so many.
        batch_tokens: Tokens in a batch, including padding and the tokens to generate.
        temperature: Of the sampling; 0 takes the likeliest token each time.
        top_k: Sample from no more tokens than this.
        top_p: Sample from the likeliest tokens that hold this share together.
        seed: Of the sampling.
        device: Where it runs. None: an accelerator where there is one.
        dtype: What it computes in: ``"bfloat16"``, the ``"model"``'s own precision, or ``"auto"``: bfloat16 where the
            hardware multiplies it.
        weight: The weight of the queries.
    """

    name = "local"

    def __init__(
        self,
        name_or_path: str,
        *,
        prompts: Prompts | None = None,
        samples: int = 1,
        max_new_tokens: int = 64,
        max_document_tokens: int = 384,
        batch_tokens: int = 8192,
        temperature: float = 1.0,
        top_k: int = 10,
        top_p: float = 1.0,
        seed: int = 0,
        device: str | None = None,
        dtype: ComputeDtype = "auto",
        weight: float = 1.0,
    ) -> None:
        self._path = name_or_path
        self._prompts = prompts
        self._samples = samples
        self._max_new_tokens = max_new_tokens
        self._max_document_tokens = max_document_tokens
        self._batch_tokens = batch_tokens
        self._sampling: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self._seed = seed
        self._device = device
        self._dtype = dtype
        self._loaded: tuple[Any, Any] | None = None
        self._hash: str | None = None
        self._around: dict[str, int] = {}  # tokens of each template
        self.weight = weight

    def unloaded(self) -> LocalQueries:
        """A copy without the loaded model, to be sent to another process."""
        copied = copy.copy(self)
        copied._loaded = None
        copied._around = {}
        return copied

    def prepare(self) -> None:
        """Check that the model exists.

        Raises:
            ValueError: There is none of that name.
        """
        _open(self._path, _read_config)

    def fingerprint(self) -> str:
        """A hash of the model's weights and everything else that the queries depend on besides prompt and document."""
        if self._hash is None:
            model, tokenizer = self._load()
            digest = hashlib.blake2b(digest_size=16)
            for name, tensor in sorted(model.state_dict().items()):
                digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
                digest.update(memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
            digest.update(repr(sorted(tokenizer.get_vocab().items())).encode("utf-8", "replace"))
            digest.update(repr(getattr(tokenizer, "chat_template", None)).encode("utf-8", "replace"))
            self._hash = digest.hexdigest()
        return (
            f"local\0{self._hash}\0{self._samples}\0{self._max_new_tokens}\0{self._max_document_tokens}\0"
            f"{sorted(self._sampling.items())}\0{self._seed}"
        )

    def prompt(self, language: str | None) -> str:
        """The template for documents of a language; empty if the model reads the document alone."""
        if self._prompts is None and self._reads_document_alone():
            return ""
        return (self._prompts or Prompts()).as_instruction(language)

    def describe(self) -> str:
        """The model's name."""
        return self._path

    def estimate(self, documents: Iterable[Document], language: str | None) -> SourceEstimate:
        """Tokens by the model's own tokenizer."""
        number = tokens = 0
        for document in documents:
            number, tokens = (
                number + 1,
                tokens + self._samples * len(self._tokens(self._input(document.text, language))),
            )
        return SourceEstimate(number, tokens, number * self._samples * self._max_new_tokens)

    @torch.inference_mode()
    def generate(self, documents: Iterable[Document], *, language: str | None = None) -> Iterator[DocumentQueries]:
        """Yield answers a batch at a time.

        Raises:
            ValueError: The model cannot be loaded, or is of neither kind.
        """
        stream = iter(documents)
        while window := list(itertools.islice(stream, WINDOW)):
            inputs = [self._input(document.text, language) for document in window]
            lengths = [len(self._tokens(text)) for text in inputs]
            order = sorted(range(len(window)), key=lambda place: (-lengths[place], place))
            while order:
                row_tokens = (lengths[order[0]] + self._max_new_tokens) * self._samples
                batch = order[: max(1, self._batch_tokens // row_tokens)]
                order = order[len(batch) :]
                yield from self._write([window[place] for place in batch], [inputs[place] for place in batch])

    def _write(self, documents: list[Document], inputs: list[str]) -> Iterator[DocumentQueries]:
        model, tokenizer = self._load()
        rows = [text for text in inputs for _ in range(self._samples)]
        seeds = [_seed(self._seed, document.text, n) for document in documents for n in range(self._samples)]
        special = not self._is_chat()
        features = tokenizer(rows, return_tensors="pt", padding=True, add_special_tokens=special).to(model.device)
        features.pop("token_type_ids", None)
        written = model.generate(
            **features,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=[SeededSampling(seeds, **self._sampling)],
            pad_token_id=tokenizer.pad_token_id,
        )
        if not model.config.is_encoder_decoder:
            written = written[:, features["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        read, wrote = features["attention_mask"].sum(-1).tolist(), (written != tokenizer.pad_token_id).sum(-1).tolist()
        for number, document in enumerate(documents):
            own = slice(number * self._samples, (number + 1) * self._samples)
            queries = [clean(text) for text in texts[own]]
            faults = [fault(query, document.text) for query in queries]
            good = [query for query, wrong in zip(queries, faults, strict=True) if wrong is None]
            usage = Usage(sum(read[own]), sum(wrote[own]))
            yield DocumentQueries(document.doc_id, self._mark(good), None if good else faults[0], usage)

    def _input(self, text: str, language: str | None) -> str:
        """The model's input for a document, truncated to its maximum length."""
        model, tokenizer = self._load()
        template = self.prompt(language)
        if template not in self._around:
            self._around[template] = len(self._tokens(self._dressed(template.replace(DOCUMENT, "")))) if template else 4
        around = self._around[template]
        room = self._max_document_tokens
        if (longest := _longest(model, tokenizer)) is not None:
            written = 0 if model.config.is_encoder_decoder else self._max_new_tokens
            room = min(room, longest - around - written)
        if room < 1:
            raise ValueError(
                f"{self._path} reads {longest} tokens, too few for its prompt, a document and {self._max_new_tokens} "
                "tokens of a query; ask for shorter queries or give a shorter prompt"
            )
        tokens = tokenizer(text, add_special_tokens=False, truncation=True, max_length=room)["input_ids"]
        cut = text if len(tokens) < room else tokenizer.decode(tokens, skip_special_tokens=True)
        return self._dressed(fill(template, cut)) if template else cut

    def _tokens(self, text: str) -> list[int]:
        return self._load()[1](text, add_special_tokens=not self._is_chat())["input_ids"]

    def _is_chat(self) -> bool:
        """Whether the model has a chat template, which contains its special tokens."""
        model, tokenizer = self._load()
        return bool(getattr(tokenizer, "chat_template", None)) and not model.config.is_encoder_decoder

    def _dressed(self, prompt: str) -> str:
        if not self._is_chat():
            return prompt
        message = [{"role": "user", "content": prompt}]
        # Templates of reasoning models know this argument; others ignore it.
        options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": False}
        return self._load()[1].apply_chat_template(message, **options)

    def _reads_document_alone(self) -> bool:
        model, _ = self._load()
        return bool(model.config.is_encoder_decoder)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            self._loaded = _load_model(self._path, self._device, self._dtype)
        return self._loaded


def _load_model(name_or_path: str, device: str | None, compute: ComputeDtype) -> tuple[Any, Any]:
    """Load (model, tokenizer): the model in bfloat16 where that is fast, the tokenizer padding on the model's side."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def load(name: str) -> tuple[Any, Any]:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

        both_ways = _read_config(name).is_encoder_decoder
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="right" if both_ways else "left")
        kind = AutoModelForSeq2SeqLM if both_ways else AutoModelForCausalLM
        fast = compute == "bfloat16" or (compute == "auto" and hardware_has_bf16(place))
        dtype = torch.bfloat16 if fast else "auto" if compute == "model" else torch.float32
        model: Any = kind.from_pretrained(name, dtype=dtype)
        return model.to(place).eval(), tokenizer

    model, tokenizer = _open(name_or_path, load)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return model, tokenizer


def _read_config(name: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name)


def _open(name_or_path: str, work: Callable[[str], Any]) -> Any:
    """Call ``work`` with the model's folder or name; errors say what is wrong.

    Raises:
        ValueError: There is no such model, or it cannot be opened.
    """
    path = Path(name_or_path).expanduser()
    try:
        return work(str(path) if path.is_dir() else name_or_path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        where = "" if path.exists() else f"there is no folder {path}, and the Hugging Face Hub did not give it: "
        raise ValueError(
            f"the model that is to write queries, {name_or_path!r}, cannot be loaded: {where}{reason}"
        ) from error


def _longest(model: Any, tokenizer: Any) -> int | None:
    """The model's maximum length; None if its positions have no limit."""
    known = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    # Relative positions have no end; what the tokenizer says is then what the model was trained on.
    longest = min(known or tokenizer.model_max_length, tokenizer.model_max_length)
    return longest if longest < 10**9 else None


def _seed(seed: int, text: str, sample: int) -> int:
    key = f"{seed}\0{sample}\0{text}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


# Of SplitMix64 (Steele, Lea and Flood (2014), Fast Splittable Pseudorandom Number Generators), as signed numbers.
_STEP, _FIRST, _SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class SeededSampling(LogitsProcessor):
    """Samples each row with its own seed, so that a row's text is the same in any batch.

    Adds Gumbel noise to the k likeliest tokens and leaves the best one: its token is a sample from the softmax over
    them (Maddison et al. (2014), A* Sampling, arXiv:1411.0030). The noise is a hash of seed, step and token, so that
    rounding, which padding changes, tips near ties alone. Use it with ``do_sample=False``, anew for each call.

    Args:
        seeds: One for each row.
        temperature: Of the softmax; 0 takes the likeliest token.
        top_k: Sample from no more tokens than this.
        top_p: Sample from the likeliest tokens that hold this share together.
    """

    def __init__(self, seeds: Sequence[int], *, temperature: float, top_k: int, top_p: float) -> None:
        self._state = torch.tensor(list(seeds), dtype=torch.int64)[:, None]
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores, (rows, vocabulary), with all but one token of each row at -inf."""
        best, tokens = scores.float().topk(min(self._top_k, scores.shape[-1]), dim=-1)
        if self._temperature > 0:
            best = torch.log_softmax(best / self._temperature, dim=-1)
            before = best.exp().cumsum(-1) - best.exp()
            best = best.masked_fill(before >= self._top_p, -torch.inf)
            self._state = _mix(self._state.to(tokens.device) + _STEP)
            best = best - torch.log(-torch.log(_uniform(self._state + tokens * _STEP)))
        chosen = tokens.gather(-1, best.argmax(-1, keepdim=True))
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)  # type: ignore[return-value]


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's output function, element by element, int64; products wrap around."""
    state = (state ^ _shift(state, 30)) * _FIRST
    state = (state ^ _shift(state, 27)) * _SECOND
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros (signed numbers would repeat their sign)."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _uniform(state: Tensor) -> Tensor:
    """float32 between 0 and 1, both excluded."""
    return ((_shift(_mix(state), 40).double() + 0.5) / 2**24).clamp(max=1 - 1e-7).float()
