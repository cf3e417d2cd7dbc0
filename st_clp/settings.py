"""The settings of a run: one definition for the command line, the YAML file and Python."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from st_clp.files import write_text
from st_clp.setting_values import read_setting, shown
from st_clp.yaml_files import read_mapping


class SettingsError(ValueError):
    """A setting is unknown, of the wrong kind or out of range; the message names it and the remedy."""


def option(default: Any, help: str, group: str, *, choices: tuple[str, ...] | None = None) -> Any:
    """A field with what the command line needs to teach it."""
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, (list, dict)):
        kind = type(default)
        return field(default_factory=lambda: kind(default), metadata=metadata)
    return field(default=default, metadata=metadata)


DATA, MINING, QUERIES, LOSS = "Data", "Mining", "Queries of negatives", "Loss"
MODEL, TRAINING = "Mixture of experts", "Training"
REFRESH = "Refreshing negatives while training"


NO_LIMIT = float("inf")
LIMITS: dict[str, tuple[float, float]] = {
    "holdout": (0, 0.9),
    "max_train_queries": (1, NO_LIMIT),
    "max_seq_length": (1, NO_LIMIT),
    "encode_batch_size": (1, NO_LIMIT),
    "num_negatives": (0, NO_LIMIT),
    "queries_per_negative": (0, NO_LIMIT),
    "duplicate_threshold": (-1, 1),
    "max_positives_per_query": (1, NO_LIMIT),
    "nprobe": (1, NO_LIMIT),
    "query_samples": (1, NO_LIMIT),
    "query_max_tokens": (1, NO_LIMIT),
    "query_temperature": (0, NO_LIMIT),
    "query_concurrency": (1, NO_LIMIT),
    "query_rate": (1e-9, NO_LIMIT),
    "query_timeout": (1e-9, NO_LIMIT),
    "query_retries": (0, NO_LIMIT),
    "query_budget": (0, NO_LIMIT),
    "query_budget_tokens": (0, NO_LIMIT),
    "query_price_prompt": (0, NO_LIMIT),
    "query_price_completion": (0, NO_LIMIT),
    "query_round_trip_k": (1, NO_LIMIT),
    "penalty_weight": (0, 1),
    "scale": (1e-9, NO_LIMIT),
    "mini_batch_size": (1, NO_LIMIT),
    "experts": (0, NO_LIMIT),
    "experts_per_token": (1, NO_LIMIT),
    "epochs": (1e-9, NO_LIMIT),
    "batch_size": (1, NO_LIMIT),
    "learning_rate": (0, NO_LIMIT),
    "warmup": (0, NO_LIMIT),
    "refresh_lag": (0, NO_LIMIT),
    "refresh_threads": (1, NO_LIMIT),
    "seed": (0, 2**32 - 1),  # what NumPy takes
}


@dataclass
class RunSettings:
    """Everything that a run depends on. The help of each field is in its metadata and in ``st-clp run --help``."""

    model: str = option("", "The model to fine-tune: a folder, or a name on the Hugging Face Hub.", DATA)
    collection: list[str] = option(
        [],
        "What to train on: an ir_datasets id such as miracl/ko, a BEIR folder, or a JSONL file of training rows. "
        "Several may be named. The train split is found.",
        DATA,
    )
    output: str = option("", "The folder for the fine-tuned model and everything about the run.", DATA)
    eval_collection: list[str] = option(
        [], "What to evaluate on. By default the dev (or else test) splits of the collections.", DATA
    )
    train_split: str = option("train", "The split to train on.", DATA)
    eval_split: str | None = option(None, "The split to evaluate on. By default dev, validation or test.", DATA)
    holdout: float = option(
        0.1, "The share of training queries (1,000 at most) to evaluate on where there is no other split.", DATA
    )
    max_train_queries: int | None = option(
        None, "Train on no more queries of each collection than this, drawn at random.", DATA
    )
    text_field: list[str] = option([], "A document's fields to join as its text. By default title and text.", DATA)
    max_seq_length: int | None = option(None, "Tokens of a text to read. By default as the model has it.", DATA)
    encode_batch_size: int | None = option(
        None, "No more texts than this in one forward pass when encoding. By default as many as fill it.", DATA
    )
    encode_dtype: str = option(
        "auto",
        "What encoding computes in: the model's own precision, bfloat16, or bfloat16 where the hardware is fast in it.",
        DATA,
        choices=("auto", "model", "bfloat16"),
    )

    num_negatives: int = option(4, "Hard negatives for each query.", MINING)
    queries_per_negative: int = option(1, "Queries for each negative; 0 for none.", MINING)
    range_min: int = option(0, "Skip this many of the best candidates that pass the limits below.", MINING)
    range_max: int = option(100, "Take candidates from no further down than this rank.", MINING)
    absolute_margin: float | None = option(
        None, "A negative must score at least this much below the query's lowest-scoring positive.", MINING
    )
    relative_margin: float | None = option(None, "The same, as a share of the positive's score.", MINING)
    max_score: float | None = option(None, "A negative must score at most this.", MINING)
    min_score: float | None = option(None, "A negative must score at least this.", MINING)
    sampling_strategy: str = option(
        "top", "Take the best-ranked candidates, or draw from all within range.", MINING, choices=("top", "random")
    )
    judged_negatives: str | None = option(
        None,
        "Documents judged not relevant: leave them in the ranking, take them first, or treat them as not judged. "
        "By default first for training rows that name negatives, rank otherwise.",
        MINING,
        choices=("rank", "first", "ignore"),
    )
    prefer_known_queries: bool = option(
        True, "Take candidates that a training query asks for before those that none does.", MINING
    )
    duplicate_threshold: float | None = option(
        None, "Candidates with at least this cosine to a relevant document are no negatives.", MINING
    )
    ignore_identical_ids: bool = option(
        True, "A document with the query's own id is the query itself: neither a negative nor an answer.", MINING
    )
    on_shortage: str = option(
        "relax",
        "For a query that the filters leave with too few negatives: take the nearest misses, take random documents, "
        "leave it with fewer, or drop it.",
        MINING,
        choices=("relax", "random", "fewer", "drop"),
    )
    candidates: str = option(
        "model",
        "What ranks the candidates: the model, BM25 (needs bm25s), or both by reciprocal rank.",
        MINING,
        choices=("model", "bm25", "mixed"),
    )
    cross_encoder: str | None = option(
        None, "A cross-encoder, a folder or a name on the Hub, that scores the candidates anew.", MINING
    )
    index: str | None = option(
        None, "Search approximately by this FAISS index, such as IVF4096,PQ64. By default exactly.", MINING
    )
    nprobe: int | None = option(None, "How many lists an IVF index looks through for a query.", MINING)
    max_positives_per_query: int | None = option(
        None, "Make no more rows of a query than this, with its best-judged positives.", MINING
    )

    negative_queries: str = option(
        "judgments",
        "Where they come from, in order, the first that knows one wins: judgments, local:MODEL (a folder or a name on "
        "the Hub), openai:MODEL (any endpoint of that API), title (or lead sentence); title*0.3 gives another weight.",
        QUERIES,
    )
    query_store: str | None = option(
        None,
        "The SQLite file that keeps what is generated, so that nothing is paid for twice. By default queries.sqlite in "
        "the output folder (under run/ for a run).",
        QUERIES,
    )
    query_samples: int | None = option(
        None, "Queries to make for each document. By default as many as queries_per_negative.", QUERIES
    )
    query_prompts: str | None = option(
        None,
        "A YAML file with prompt templates: a language code or default, and a text with {document} in it.",
        QUERIES,
    )
    query_max_tokens: int = option(64, "Tokens that a generated query may have.", QUERIES)
    query_temperature: float = option(0.7, "Of the sampling; 0 takes the likeliest.", QUERIES)
    query_base_url: str | None = option(
        None, "The endpoint's address. By default OPENAI_BASE_URL, or else OpenAI's own.", QUERIES
    )
    query_key_variable: str = option(
        "OPENAI_API_KEY", "The environment variable that holds the endpoint's key.", QUERIES
    )
    query_concurrency: int = option(8, "Requests at a time.", QUERIES)
    query_rate: float | None = option(None, "Requests a minute at most.", QUERIES)
    query_timeout: float = option(60.0, "Seconds to wait for an answer of the endpoint.", QUERIES)
    query_retries: int = option(5, "Times that a request that failed is sent again.", QUERIES)
    query_budget: float | None = option(
        None, "Money that all queries in the store may have cost at most; it needs both prices.", QUERIES
    )
    query_budget_tokens: int | None = option(
        None, "Tokens, read and written, that all queries in the store may have taken at most.", QUERIES
    )
    query_price_prompt: float | None = option(None, "Money for a million tokens that are read.", QUERIES)
    query_price_completion: float | None = option(None, "Money for a million tokens that are written.", QUERIES)
    query_round_trip: str = option(
        "off",
        "What becomes of a generated query that does not find its document: drop it, halve its weight, or do not look.",
        QUERIES,
        choices=("off", "drop", "weight"),
    )
    query_round_trip_k: int = option(10, "How far down it may find it.", QUERIES)

    penalty_weight: float = option(0.1, "The weight of the penalty in the loss (the paper's lambda), 0 to 1.", LOSS)
    penalty: str = option("cosine", "The kind of penalty.", LOSS, choices=("cosine", "contrastive"))
    scale: float = option(50.0, "What similarities are multiplied by: 1 / temperature.", LOSS)
    in_batch_negatives: bool = option(True, "Let the batch's other documents be negatives too.", LOSS)
    mini_batch_size: int | None = option(
        None, "Compute the loss in mini-batches of this size (CachedCLPLoss), so that any batch size fits.", LOSS
    )

    experts: int = option(2, "Experts in each layer; 0 trains the dense model.", MODEL)
    experts_per_token: int = option(1, "Experts that each token goes to.", MODEL)
    projection: str = option(
        "intermediate",
        "Which projection of the feed-forward layers becomes a mixture.",
        MODEL,
        choices=("intermediate", "output", "feed_forward"),
    )
    train: str | None = option(
        None,
        "What trains; the rest is frozen. By default moe, or all where there are no experts.",
        MODEL,
        choices=("moe", "intermediate", "output", "router", "all"),
    )

    epochs: float = option(2.0, "Passes over the training rows.", TRAINING)
    batch_size: int = option(16, "Training rows in a batch on each device.", TRAINING)
    learning_rate: float | None = option(
        None, "The peak learning rate. By default 1e-4 where only a part trains and 2e-5 where all does.", TRAINING
    )
    warmup: float = option(0.1, "Steps of warm-up: a share of all steps, or a number from 1.", TRAINING)
    bf16: bool | None = option(None, "Train in bfloat16. By default where the hardware has it.", TRAINING)
    seed: int = option(42, "The seed of everything random.", TRAINING)
    training_arg: dict[str, Any] = option(
        {}, "Any other argument of SentenceTransformerTrainingArguments, as NAME=VALUE.", TRAINING
    )

    refresh_every: str | None = option(
        None,
        "Mine again with the weights as they are after every so many steps, or each epoch. By default once, before "
        "training.",
        REFRESH,
    )
    refresh_async: bool = option(
        False, "Mine in another process while training goes on; what it found is used --refresh-lag later.", REFRESH
    )
    refresh_lag: int | None = option(
        None,
        "With --refresh-async, after how many steps the new negatives are used. By default as many as lie between "
        "refreshes. 0: as soon as they are there, which no second run repeats.",
        REFRESH,
    )
    refresh_threads: int = option(
        1, "With --refresh-async on a processor, threads to mine with; training has as many fewer.", REFRESH
    )
    refresh_device: str | None = option(
        None,
        "With --refresh-async, what to mine on, such as cuda:1. By default a free GPU, or where it trains.",
        REFRESH,
    )

    def __post_init__(self) -> None:
        """Check kinds, choices and ranges.

        Raises:
            SettingsError: A value that cannot be meant.
        """
        if isinstance(self.refresh_every, int):  # a YAML file gives a number
            self.refresh_every = str(self.refresh_every)
        for item in fields(self):
            self._check(item)
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                upper = "" if high == NO_LIMIT else f" and at most {high:.12g}"
                raise SettingsError(f"{name} must be at least {low:g}{upper}, got {value:.12g}")
        if self.experts == 1 or 0 < self.experts < self.experts_per_token:
            raise SettingsError(
                f"experts={self.experts} with experts_per_token={self.experts_per_token}: a mixture needs at least "
                "two experts and no fewer than each token goes to; 0 experts trains the dense model"
            )
        if self.steps_between_refreshes is None and self.refresh_async:
            raise SettingsError("refresh_async needs refresh_every: after how many steps, or each epoch")
        if self.refresh_lag is not None and not self.refresh_async:
            raise SettingsError("refresh_lag is for refresh_async: otherwise new negatives are used at once")
        if self.experts == 0 and self.train in ("moe", "router"):
            raise SettingsError(f"train={self.train} needs experts; with experts=0 train intermediate, output or all")

    def _check(self, item: Field[Any]) -> None:
        choices = item.metadata["choices"]
        try:
            value = read_setting(item.name, str(item.type), getattr(self, item.name), choices)
        except ValueError as error:
            raise SettingsError(str(error)) from None
        if choices and value is not None and value not in choices:
            raise SettingsError(f"{item.name} must be one of {', '.join(choices)}, got {shown(value)}")
        setattr(self, item.name, value)

    @property
    def what_trains(self) -> str:
        """``train``, with its default filled in."""
        return self.train or ("moe" if self.experts else "all")

    @property
    def peak_learning_rate(self) -> float:
        """``learning_rate``, with its default filled in."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.what_trains == "all" else 1e-4

    @property
    def steps_between_refreshes(self) -> int | Literal["epoch"] | None:
        """``refresh_every`` as a number, ``"epoch"``, or None for no refresh."""
        every = self.refresh_every
        if every is None or every == "epoch":
            return every  # type: ignore[return-value]
        if not every.isdigit() or int(every) < 1:
            raise SettingsError(f"refresh_every must be a number of steps, at least 1, or epoch, got {every!r}")
        return int(every)

    def require(self, *names: str) -> None:
        """Raise a SettingsError that names the first of these settings that is empty."""
        for name in names:
            if not getattr(self, name):
                flag = "--" + name.replace("_", "-")
                raise SettingsError(f"no {name}: give {flag} (or {name}: in the --config file)")

    def to_dict(self) -> dict[str, Any]:
        """All settings, by name."""
        return asdict(self)

    def differences(self, other: RunSettings) -> dict[str, tuple[Any, Any]]:
        """Setting to (this value, the other's) where they differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "settings") -> RunSettings:
        """Settings from a mapping.

        Raises:
            SettingsError: A name that is no setting (with the nearest one), or a value that cannot be meant.
        """
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                nearest = difflib.get_close_matches(str(name), known, n=1)
                advice = f"; did you mean {nearest[0]}?" if nearest else f"; the settings are {', '.join(known)}"
                raise SettingsError(f"{where}: there is no setting {shown(name)}{advice}")
        return cls(**values)

    @classmethod
    def read_yaml(cls, path: str | os.PathLike[str]) -> dict[str, Any]:
        """The settings that a YAML file gives; dashes in names count as underscores.

        Raises:
            SettingsError: The file is not there or is no YAML mapping.
        """
        content = "settings, a line each, such as: model: BAAI/bge-m3"
        values = read_mapping(path, "configuration file", content, SettingsError)
        return {str(name).replace("-", "_"): value for name, value in values.items()}

    def write_yaml(self, path: Path) -> None:
        """Write all settings, so that the file can be given as ``--config``."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))
