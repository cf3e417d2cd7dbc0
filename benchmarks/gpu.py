"""What one GPU does: encoding, the mixture's layers and whole training steps, each beside its peer in the same run.

    python benchmarks/gpu.py                      # everything, in less than 5 minutes on an H100
    python benchmarks/gpu.py --only layers steps
    python benchmarks/gpu.py --device cpu --small   # does it run at all?
    python benchmarks/gpu.py --device cpu --only host   # what a step and tokenising ask of the host; needs no GPU

Needs torch, transformers, sentence-transformers and this checkout, nothing else: texts, tokenizer and models are made
here, with random weights. Before anything is timed, losses, gradients and embeddings are compared with a processor's.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers import __version__ as sentence_transformers_version
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

import st_clp
from st_clp import CLPLoss
from st_clp.encoding import encode_documents
from st_clp.encoding.attention import use_known_padding
from st_clp.encoding.token_lists import ListPreprocess, TokenLists
from st_clp.losses import passes
from st_clp.losses.host_texts import KEY, HostTexts
from st_clp.moe import MoESettings
from st_clp.moe.convert import build_experts

SHAPES = {
    "bge-m3's size": (24, 1024, 256),
    "MiniLM's width": (12, 384, 256),
    "multilingual-e5-small's size": (12, 384, 160),
}
MIRACL_EN = 32_900_000
"""Passages of MIRACL's English collection."""
PARTS = ("checks", "encoding", "layers", "steps", "host")


@dataclass(frozen=True)
class Setting:
    """Where and how large everything is."""

    device: str
    small: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def shape(self, name: str) -> tuple[int, int, int]:
        return (2, 64, 48) if self.small else SHAPES[name]

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


# ---------------------------------------------------------------------------------------------- texts and models


def make_texts(number: int, words: int, seed: int = 0, spread: float | None = None) -> list[str]:
    """Texts of pseudo-words, of about so many words each and of unequal length, in which few words are frequent.

    With a spread, lengths are drawn from a log-normal distribution, as those of passages are: most are short, few long.
    """
    draw = random.Random(seed)
    letters = "aeiou", "bcdfghklmnprstvz"
    vocabulary = [
        "".join(draw.choice(letters[place % 2]) for place in range(draw.randint(2, 9))) for _ in range(20_000)
    ]
    weights = [1 / (rank + 3) for rank in range(len(vocabulary))]
    lengths = [
        max(3, int(words * (draw.uniform(0.4, 1.4) if spread is None else draw.lognormvariate(0, spread))))
        for _ in range(number)
    ]
    drawn = iter(draw.choices(vocabulary, weights, k=sum(lengths)))
    return [" ".join(next(drawn) for _ in range(length)) for length in lengths]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer that has learned on these texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def make_model(shape: tuple[int, int, int], tokenizer: PreTrainedTokenizerFast, device: str) -> SentenceTransformer:
    """An XLM-RoBERTa of so many layers, of this width and for so many tokens, with random weights."""
    transformers.utils.logging.set_verbosity_error()  # the folder has no pooler, which no embedding uses
    transformers.utils.logging.disable_progress_bar()
    layers, width, length = shape
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=514,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=length)
    return SentenceTransformer(modules=[transformer, Pooling(width, "mean"), Normalize()], device=device)


# ---------------------------------------------------------------------------------------------------------- timing


def in_turn(cases: dict[str, Callable[[], Any]], setting: Setting, rounds: int = 12) -> dict[str, float]:
    """Run the cases in turn and return each one's median time in milliseconds."""
    rounds, warm = (1, 1) if setting.small else (rounds, 3)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + warm):
        for name, case in cases.items():
            setting.wait()
            started = time.perf_counter()
            case()
            setting.wait()
            if round_ >= warm:
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def queued(case: Callable[[], Any], setting: Setting) -> float:
    """Milliseconds until the host has queued a case, whatever the device still has to do."""
    times = []
    for _ in range(5):
        setting.wait()
        started = time.perf_counter()
        case()
        times.append(1000 * (time.perf_counter() - started))
    setting.wait()
    return statistics.median(times)


def product_peak(setting: Setting) -> float:
    """FLOP a second of a large bfloat16 product."""
    size = 8192 if setting.on_gpu else 256
    first, second = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (in_turn({"product": lambda: first @ second}, setting)["product"] / 1000)


def table(head: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


@contextmanager
def part(name: str) -> Iterator[None]:
    print(f"\n## {name}\n", flush=True)
    started = time.perf_counter()
    yield
    print(f"\n({time.perf_counter() - started:.0f} s)", flush=True)


# ---------------------------------------------------------------------------------------------------------- checks


def gradients(model: SentenceTransformer, texts: list[str], device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """A step of CLPLoss in float32: the loss, and every gradient."""
    model = copy.deepcopy(model).to(device).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    columns = [model.preprocess(texts[at : at + 4]) for at in range(0, 24, 4)]
    columns = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in column.items()} for column in columns]
    loss = CLPLoss(model, queries_per_negative=1)(columns, None)
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def checks(setting: Setting, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Compare with a processor, in float32; and what is saved and loaded."""
    model = make_model((2, 64, 48), tokenizer, "cpu")
    rows = []
    kinds = {
        "dense": model,
        # all tokens are tried: which ones are drawn depends on the bits of the router's weights
        "2 experts": st_clp.upcycle(copy.deepcopy(model), 2, router_sample=1.0),
        "3 experts, feed_forward": st_clp.upcycle(
            copy.deepcopy(model), 3, projection="feed_forward", router_sample=1.0
        ),
        "3 experts, output": st_clp.upcycle(copy.deepcopy(model), 3, projection="output", router_sample=1.0),
    }
    for name, kind in kinds.items():
        here, there = (gradients(kind, texts, device) for device in ("cpu", setting.device))
        worst = max(
            float((there[1][n] - g).norm() / g.norm().clamp(min=1e-6)) for n, g in here[1].items() if g.norm() > 1e-6
        )
        good = abs(float(here[0] - there[0])) < 1e-3 and worst < 0.02
        rows.append(
            [name, f"{here[0]:.6f}", f"{there[0]:.6f}", f"{worst:.1e}", "as the processor" if good else "DIFFERS"]
        )
    table(["loss and gradients", "processor", "device", "worst gradient, of its norm", ""], rows)
    mixture = copy.deepcopy(kinds["2 experts"]).to(setting.device).eval()
    before = mixture.encode(texts[:8])
    with tempfile.TemporaryDirectory() as folder:
        mixture.save(folder)
        after = st_clp.load(folder, device=setting.device).encode(texts[:8])
    print(f"\nSaved, loaded and encoded again: {'equal to the bit' if (before == after).all() else 'DIFFERENT'}")


# -------------------------------------------------------------------------------------------------------- encoding


def encoding(setting: Setting, texts: list[str], tokenizer: PreTrainedTokenizerFast, peak: float) -> None:
    """Documents a second, beside ``model.encode_document`` in bfloat16 at its best batch size."""
    rows = []
    for name, share in (("bge-m3's size", 0.5), ("MiniLM's width", 1.0)):
        layers, width, length = setting.shape(name)
        model = make_model((layers, width, length), tokenizer, setting.device)
        some = texts[: int(share * len(texts))]
        lengths = [min(length, len(ids)) for ids in tokenizer(some)["input_ids"]]
        operations = 2 * layers * 12 * width**2 * sum(lengths)
        operations += 4 * layers * width * sum(tokens**2 for tokens in lengths)

        def ours(chosen: list[str], model: SentenceTransformer = model) -> float:
            setting.wait()
            started = time.perf_counter()
            for _ in encode_documents(model, chosen, dtype="bfloat16"):
                pass
            return time.perf_counter() - started

        ours(some[: len(some) // 8])
        seconds = ours(some)
        theirs = peer_rates(copy.deepcopy(model).bfloat16(), some[: max(8, len(some) // 8)], setting)
        best = max(theirs, key=lambda size: theirs[size])
        rate = len(some) / seconds
        rows.append(
            [
                f"{name} ({layers} × {width}, {sum(lengths) / len(lengths):.0f} tokens)",
                f"{rate:,.0f}",
                f"{operations / seconds / peak:.1%}",
                f"{theirs[best]:,.0f} (batches of {best})",
                f"{rate / theirs[best]:.2f} ×",
                f"{MIRACL_EN / rate / 3600:.1f} h",
            ]
        )
        rows += forward_alone(model, (layers, width, length), setting, peak)
    head = ["", "documents a second", "of the product peak", "model.encode, bfloat16", "ratio"]
    table([*head, f"for {MIRACL_EN:,} passages"], rows)


def peer_rates(model: SentenceTransformer, texts: list[str], setting: Setting) -> dict[int, float]:
    rates = {}
    for size in (32, 128, 256, 512):
        setting.wait()
        started = time.perf_counter()
        model.encode_document(texts, batch_size=size)
        rates[size] = len(texts) / (time.perf_counter() - started)
    return rates


def forward_alone(
    model: SentenceTransformer, shape: tuple[int, int, int], setting: Setting, peak: float
) -> list[list[str]]:
    """What the same transformer reaches on full batches that are there already, with and without a mask."""
    layers, width, length = shape
    encoder = copy.deepcopy(model[0].model).bfloat16().eval()
    number = 2 if setting.small else 256
    ids = torch.randint(5, 500, (number, length), device=setting.device)
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    operations = 2 * layers * 12 * width**2 * ids.numel() + 4 * layers * width * length * ids.numel()

    @torch.inference_mode()
    def run(given: Tensor | None) -> None:
        encoder(input_ids=ids, attention_mask=given)

    cases = {"no padding": lambda: run(None), "one position padded": lambda: run(mask)}
    times = in_turn(cases, setting, rounds=5)
    return [
        [f"its forward pass alone, {number} × {length}, {name}", f"{1000 * number / ms:,.0f}",
         f"{operations / ms * 1000 / peak:.1%}", "", "", ""]
        for name, ms in times.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- layers


def feed_forwards(width: int, experts: int, device: str) -> dict[str, nn.Module]:
    """A layer whose feed-forward is dense, and mixtures of it, in bfloat16."""
    torch.manual_seed(0)
    config = XLMRobertaConfig(
        vocab_size=16, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1, num_attention_heads=8
    )
    encoder = XLMRobertaModel(config).to(device, torch.bfloat16).eval()
    kinds: dict[str, nn.Module] = {"dense": encoder}
    for projection in ("intermediate", "feed_forward", "output"):
        kinds[projection] = copy.deepcopy(encoder)
        build_experts(kinds[projection], MoESettings(num_experts=experts, projection=projection, layers=(0,)), seed=0)
    return {kind: encoder.encoder.layer[0] for kind, encoder in kinds.items()}


def trained_alone(kind: str, layer: nn.Module) -> None:
    """Let only what is a mixture train; of the dense layer the projection that the first mixture replaces."""
    layer.requires_grad_(False)
    for name in {"output": ("output",), "feed_forward": ("intermediate", "output")}.get(kind, ("intermediate",)):
        getattr(layer, name).dense.requires_grad_(True)


def layer_cases(
    layers: dict[str, nn.Module], tokens: int, width: int, setting: Setting, backward: bool
) -> dict[str, Callable[[], Any]]:
    """Each kind as it is, compiled, and (forwards) in a captured graph."""
    hidden = torch.randn(8, tokens // 8, width, device=setting.device).bfloat16()
    direction = torch.randn_like(hidden)
    cases: dict[str, Callable[[], Any]] = {}
    modes = {"eager": None, "compiled": "default"} if backward or not setting.on_gpu else MODES
    for kind, layer in layers.items():
        for mode, how in modes.items():
            torch.compiler.reset()
            call = layer.feed_forward_chunk
            if how is not None:
                call = torch.compile(
                    call, fullgraph=True, mode=how, backend="inductor" if setting.on_gpu else "aot_eager"
                )
            cases[f"{kind}, {mode}"] = _pass(layer, call, hidden, direction, backward)
    return cases


MODES = {"eager": None, "compiled": "default", "captured": "reduce-overhead"}


def _pass(
    layer: nn.Module, call: Callable[[Tensor], Tensor], hidden: Tensor, direction: Tensor, backward: bool
) -> Callable[[], Any]:
    def forward() -> None:
        with torch.inference_mode():
            call(hidden)

    given = hidden.clone().requires_grad_()

    def both() -> None:
        layer.zero_grad(set_to_none=True)
        layer.train()
        call(given).backward(direction)

    return both if backward else forward


def layers(setting: Setting) -> None:
    """A mixture's feed-forward against the dense one: eager against eager, compiled against compiled."""
    width = setting.shape("bge-m3's size")[1]
    for tokens in (64,) if setting.small else (2_048, 32_768):
        for experts in (2,) if setting.small else (2, 8):
            modules = feed_forwards(width, experts, setting.device)
            forward = in_turn(layer_cases(modules, tokens, width, setting, backward=False), setting)
            for kind, layer in modules.items():
                trained_alone(kind, layer)
            both = in_turn(layer_cases(modules, tokens, width, setting, backward=True), setting)
            print(f"\n{tokens:,} tokens, {width}-{4 * width}, {experts} experts, 1 a token\n")
            rows = []
            for name, milliseconds in forward.items():
                dense = name.replace(name.split(",")[0], "dense")
                row = [name, f"{milliseconds:.3f}", f"{milliseconds / forward[dense]:.2f} ×"]
                if name in both:
                    row += [f"{both[name]:.3f}", f"{both[name] / both[dense]:.2f} ×"]
                rows.append([*row, "", ""][:5])
            table(["", "forward, ms", "against dense", "and backward, ms", "against dense"], rows)


# ----------------------------------------------------------------------------------------------------------- steps


class Step:
    """A training step under bfloat16 autocast: loss, gradients, their norm, the optimizer.

    Planned, the data collator has told the loss what the host knows of the texts, and masks are not looked at, as in
    `st-clp run`.
    """

    def __init__(
        self,
        name: str,
        model: SentenceTransformer,
        loss: nn.Module,
        columns: list[list[str]],
        setting: Setting,
        planned: bool = False,
    ) -> None:
        self.name, self.model, self.loss, self.setting = name, model.train(), loss, setting
        features = [model.preprocess(column) for column in columns]
        self.tokens = sum(int(column["attention_mask"].sum()) for column in features)
        self.features = [
            {name: value.to(setting.device) if isinstance(value, Tensor) else value for name, value in column.items()}
            for column in features
        ]
        if planned:
            use_known_padding(model[0].model)
            for there, column in zip(self.features, features, strict=True):
                there[KEY] = HostTexts.of(column)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=setting.on_gpu)

    def __call__(self) -> None:
        self.timed()

    def timed(self) -> tuple[float, float, float]:
        """Take a step; milliseconds of this thread for the loss, the gradients and the rest."""
        marks = [time.thread_time()]
        value = self.value()
        marks.append(time.thread_time())
        value.backward()
        marks.append(time.thread_time())
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(time.thread_time())
        first, second, third, last = (1000 * mark for mark in marks)
        return second - first, third - second, last - third

    def value(self) -> Tensor:
        """The loss."""
        with torch.autocast(self.setting.device.split(":")[0], torch.bfloat16):
            return self.loss([dict(column) for column in self.features], None)


def steps(setting: Setting, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Whole steps: which part trains, with which loss, eager and compiled."""
    base = make_model(setting.shape("multilingual-e5-small's size"), tokenizer, setting.device)
    batch, negatives = (2, 1) if setting.small else (32, 4)
    made = []
    unlike = make_texts(batch * 16, 3 if setting.small else 60, spread=0.8)
    for kind, documents in (("", texts), ("unlike lengths, ", unlike)):
        short = [" ".join(text.split()[:10]) for text in documents]
        columns = [short[:batch], *[documents[batch * at : batch * (at + 1)] for at in range(1, 2 + negatives)]]
        asked = [short[batch * at : batch * (at + 1)] for at in range(7, 7 + negatives)]
        few, many = f"{kind}pairs", f"{kind}{negatives} negatives"
        cases: list[tuple[str, str, Callable[..., nn.Module], list[list[str]], bool]] = [
            (f"{few}, all weights, MNRL", "all", MultipleNegativesRankingLoss, columns[:2], False),
            (f"{few}, all weights, CLPLoss", "all", CLPLoss, columns[:2], False),
            (f"{few}, all weights, CLPLoss, planned", "all", CLPLoss, columns[:2], True),
            (f"{many}, all weights, MNRL", "all", MultipleNegativesRankingLoss, columns, False),
            (f"{many}, all weights, CLPLoss", "all", CLPLoss, [*columns, *asked], False),
            (f"{many}, all weights, CLPLoss, planned", "all", CLPLoss, [*columns, *asked], True),
            (f"{many}, intermediate dense, CLPLoss", "intermediate", CLPLoss, [*columns, *asked], False),
            (f"{many}, intermediate dense, CLPLoss, planned", "intermediate", CLPLoss, [*columns, *asked], True),
            (f"{many}, 2 experts, CLPLoss, planned", "moe", CLPLoss, [*columns, *asked], True),
        ]
        for name, change, loss, given, planned in cases:
            # Compiling takes a while, so only what is to be compared with one another.
            compare = setting.on_gpu and not kind and (planned or loss is MultipleNegativesRankingLoss)
            for compiled in (False, True) if compare else (False,):
                model = copy.deepcopy(base)
                if change == "moe":
                    model = st_clp.upcycle(model, 2)
                if change != "all":
                    st_clp.train_only(model, change)
                if compiled:
                    for layer in model[0].model.encoder.layer:
                        layer.compile(dynamic=True)
                named = f"{name}{', compiled' if compiled else ''}"
                made.append(Step(named, model, loss(model), given, setting, planned))
    times = in_turn({step.name: step for step in made}, setting, rounds=8)
    rows = [
        [step.name, f"{step.tokens:,}", f"{times[step.name]:.1f}", f"{queued(step, setting):.1f}",
         f"{step.tokens / times[step.name]:,.0f} k"]
        for step in made
    ]  # fmt: skip
    table(["a step", "tokens", "ms", "of which the host queues", "tokens a second"], rows)


# ------------------------------------------------------------------------------------------------------------ host


def host(setting: Setting, texts: list[str], tokenizer: PreTrainedTokenizerFast) -> None:
    """What one thread of the host does, on a processor: the same step at a width at which products take no time."""
    torch.set_num_threads(1)
    here = Setting("cpu", setting.small)
    base = make_model((2 if setting.small else 12, 16, 32), tokenizer, "cpu")
    columns = [[" ".join(text.split()[:8]) for text in texts[at : at + 2]] for at in range(0, 16, 2)]
    rows = []
    for name, change, on_device, planned in (
        ("all weights", "all", False, False),
        ("all weights, planned as for a GPU", "all", False, True),
        ("intermediate projections, dense", "intermediate", False, False),
        ("intermediate projections, dense, planned as for a GPU", "intermediate", False, True),
        ("2 experts, as on a processor", "moe", False, False),
        ("2 experts, as on a GPU", "moe", True, False),
        ("2 experts, as on a GPU, planned", "moe", True, True),
    ):
        model = copy.deepcopy(base)
        if change == "moe":
            model = st_clp.upcycle(model, 2)
        if change != "all":
            st_clp.train_only(model, change)
        step = Step(name, model, CLPLoss(model), columns, here, planned)
        with routed_as_on_a_gpu(on_device), planned_as_on_a_gpu(planned):
            step()
            forward, backward, rest = (min(times) for times in zip(*[step.timed() for _ in range(9)], strict=True))
            with Kernels() as counted:
                step.value().backward()
        rows.append([name, f"{forward:.1f}", f"{backward:.1f}", f"{rest:.1f}", f"{counted.kernels:,}"])
    table(["a step", "forwards, ms", "backwards, ms", "optimizer, ms", "kernels, without the optimizer's"], rows)
    number, negatives = (2, 1) if setting.small else (32, 4)
    row = {"anchor": 0, "positive": 1, **{f"negative_{place + 1}": 2 + place for place in range(negatives)}}
    batch = [
        {name: texts[place * number + at] if place else " ".join(texts[at].split()[:10]) for name, place in row.items()}
        for at in range(number)
    ]
    base.max_seq_length = 160
    made = {
        "as sentence-transformers does it": base.preprocess,
        "by token lists, as after plan_on_host": ListPreprocess(base),
    }
    print()
    rows = []
    for name, preprocess in made.items():
        collate = SentenceTransformerDataCollator(preprocess_fn=preprocess)
        collate(batch)
        times = []
        for _ in range(9):
            started, busy = time.perf_counter(), time.thread_time()
            collate(batch)
            times.append((time.perf_counter() - started, time.thread_time() - busy))
        took, held = (1000 * min(each) for each in zip(*times, strict=True))
        rows.append([name, f"{took:.1f}", f"{held:.1f}"])
    table([f"a batch of {number} rows with {negatives} negatives", "ms", "ms that hold Python's lock"], rows)
    some = texts[:1024]
    base.max_seq_length = 256
    lists = TokenLists.of(base, base.preprocess, "document", None, some)
    assert lists is not None
    ways = {"preprocess, 256 texts at a time": base.preprocess, "token lists": lists}
    print()
    rows = []
    for name, way in ways.items():
        times = []
        for _ in range(3):
            started, busy = time.perf_counter(), time.thread_time()
            for begin in range(0, len(some), 256):
                way(some[begin : begin + 256])
            times.append((time.perf_counter() - started, time.thread_time() - busy))
        took, held = (min(each) / len(some) for each in zip(*times, strict=True))
        rows.append([name, f"{1 / took:,.0f}", f"{1e6 * held:.0f}"])
    table(["tokenising", "texts a second", "µs a text in the thread that asks, which hold Python's lock"], rows)


class Kernels(TorchDispatchMode):
    """Counts operations that a GPU would be given a kernel for: those that are no view and no fresh memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        self.kernels += not (func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")))
        return func(*args, **(kwargs or {}))


@contextmanager
def routed_as_on_a_gpu(really: bool) -> Iterator[None]:
    """Have a mixture on a processor leave its counts on the device."""
    modules = [sys.modules[f"st_clp.moe.{name}"] for name in ("context", "routing", "balance")]
    before = [module.stays_on_device for module in modules]
    for module in modules if really else []:
        module.stays_on_device = lambda tokens: True
    try:
        yield
    finally:
        for module, function in zip(modules, before, strict=True):
            module.stays_on_device = function


@contextmanager
def planned_as_on_a_gpu(really: bool) -> Iterator[None]:
    """Plan a step's passes on a processor by what they cost on a GPU; or not at all, as there without lengths."""
    before = passes.ON_CPU, HostTexts.of
    passes.ON_CPU = passes.ON_GPU
    if not really:
        HostTexts.of = lambda features: None
    try:
        yield
    finally:
        passes.ON_CPU, HostTexts.of = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes at which nothing is measured")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--documents", type=int, default=40_000)
    given = parser.parse_args()
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("PyTorch finds no CUDA device here. --device cpu --small shows whether the script runs.")
    setting = Setting(given.device, given.small)
    peak = product_peak(setting)
    where = torch.cuda.get_device_name() if setting.on_gpu else "a processor"
    print(
        f"{where}, torch {torch.__version__}, transformers {transformers.__version__}, sentence-transformers "
        f"{sentence_transformers_version}, bfloat16 product peak {peak / 1e12:.2f} TFLOP/s"
    )
    torch._dynamo.config.recompile_limit = 64  # many models of the same layers
    texts = make_texts(100 if given.small else given.documents, 10 if given.small else 120)
    tokenizer = make_tokenizer(texts[:5000])
    if "checks" in given.only:
        with part("Checks"):
            checks(setting, texts, tokenizer)
    if "encoding" in given.only:
        with part("Encoding"):
            encoding(setting, texts, tokenizer, peak)
    if "layers" in given.only:
        with part("A mixture's feed-forward"):
            layers(setting)
    if "steps" in given.only:
        with part("Training steps"):
            steps(setting, texts, tokenizer)
    if "host" in given.only:
        with part("The host"):
            host(setting, texts, tokenizer)


if __name__ == "__main__":
    main()
