"""The options of every stage, each declared once.

The settings of a run, the command line, YAML files and the keyword arguments of the public functions are made of these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from st_clp.declaring import Options, option
from st_clp.option_values import SettingsError, require_address, require_key_variable

ComputeDtype = Literal["auto", "model", "bfloat16"]
SamplingStrategy = Literal["top", "random"]
JudgedNegatives = Literal["rank", "first", "ignore"]
OnShortage = Literal["relax", "random", "fewer", "drop"]
CandidateSource = Literal["model", "bm25", "mixed"]
RoundTripAction = Literal["off", "drop", "weight"]
SearchedCorpus = Literal["full", "pooled"]
PenaltyKind = Literal["cosine", "contrastive"]
Projection = Literal["intermediate", "output", "feed_forward"]
Batches = Literal["auto", "rows", "documents"]
Trained = Literal["auto", "moe", "intermediate", "output", "router", "all"]

DEFAULT_METRICS = ("ndcg@10", "ndcg@5", "recall@100", "mrr@10")  # the main one first

QuerySettingsT = TypeVar("QuerySettingsT", bound="QuerySettings")


@dataclass(frozen=True)
class SeedOption(Options):
    """The seed of everything random."""

    group = "Training"

    seed: int = option(42, "The seed of everything random.", least=0, most=2**32 - 1)  # what NumPy takes


@dataclass(frozen=True)
class DataOptions(Options):
    """The model and the collections to train and evaluate on."""

    group = "Data"

    model: str = option("", "The model to fine-tune: a folder, or a name on the Hugging Face Hub.")
    collection: list[str] = option(
        [],
        "What to train on: an ir_datasets id such as miracl/ko, a BEIR folder, or a JSONL file of training rows. "
        "May be repeated. The train split is used.",
    )
    output: str = option("", "The folder for the fine-tuned model and everything about the run.", changes_results=False)
    eval_collection: list[str] = option(
        [], "What to evaluate on. By default the dev (or else test) splits of the collections."
    )
    train_split: str = option("train", "The split to train on.")
    eval_split: str | None = option(None, "The split to evaluate on. By default dev, validation or test.")
    holdout: float = option(
        0.1,
        "The share of training queries (1,000 at most) to evaluate on if there is no other split.",
        least=0,
        most=0.9,
    )
    max_train_queries: int | None = option(
        None, "Train on at most this many queries of each collection, drawn at random.", least=1
    )
    sentence_queries: int | None = option(
        None,
        "Train on this many additional queries of each collection, made of sentences of its documents, including "
        "documents that no query asks for. By default about eight per document and at most 40,000; none if people "
        "asked that many, or if batches are made of rows.",
        least=0,
    )
    text_field: list[str] = option(
        [], "The fields of a document that are joined as its text. By default title and text."
    )
    max_seq_length: int | None = option(
        None, "Read at most this many tokens of a text. By default the model's own limit.", least=1
    )


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Whether encoding and search run on a Ray cluster of several processes or machines."""

    group = "Several machines"

    ray: str | None = option(
        None,
        "Encode and search on a Ray cluster: local starts one on this machine; auto joins the one that RAY_ADDRESS "
        "names, or that runs on this machine; or give an address. By default everything runs in this process.",
        changes_results=False,
    )
    workers: int | None = option(
        None,
        "The largest number of worker processes on the cluster. By default as many as it has room for.",
        least=1,
        changes_results=False,
    )
    cpus_per_worker: int = option(1, "CPU cores per worker.", least=1, changes_results=False)
    gpus_per_worker: float | None = option(
        None,
        "GPUs per worker; workers with a fraction share one. By default 1 if the cluster has GPUs.",
        least=0,
        changes_results=False,
    )

    def _check(self) -> None:
        if self.ray is None and (self.workers is not None or self.gpus_per_worker is not None):
            raise SettingsError("workers and gpus_per_worker are for a Ray cluster: name one (ray), or leave them out")

    def require_folder(self, folder: object, name: str) -> None:
        """Require a folder that all machines of the cluster share.

        Raises:
            SettingsError: There is none.
        """
        if self.ray is not None and folder is None:
            raise SettingsError(f"ray: the workers write embeddings to a folder that all of them share; give {name}")


@dataclass(frozen=True)
class TrainingClusterOptions(ClusterOptions):
    """Whether training runs on the cluster too."""

    train_workers: int | None = option(
        None,
        "Train in this many processes on the Ray cluster, each with --batch-size rows per step; the documents of each "
        "are negatives for all. By default training runs in this process.",
        least=1,
    )

    def _check(self) -> None:
        if self.ray is None and self.train_workers is not None:
            raise SettingsError("train_workers is for a Ray cluster: name one (ray), or leave it out")


# Overrides that make options run in this process instead of on a cluster.
HERE = {"ray": None, "workers": None, "gpus_per_worker": None}


@dataclass(frozen=True)
class EncodingOptions(Options):
    """How texts are encoded."""

    group = "Data"

    encode_batch_size: int | None = option(
        None,
        "Encode at most this many texts in one forward pass. By default batches are filled up by tokens.",
        least=1,
        changes_results=False,
        keyword="batch_size",
    )
    encode_dtype: ComputeDtype = option(
        "auto",
        "The precision for encoding: the model's own, bfloat16, or (auto) bfloat16 if the hardware is fast in it.",
        keyword="dtype",
    )


@dataclass(frozen=True)
class Encoding(ClusterOptions, EncodingOptions):
    """How texts are encoded, where, and whether that is shown."""

    group = EncodingOptions.group

    show_progress_bar: bool = option(True, "Show progress.", changes_results=False)


@dataclass(frozen=True)
class OwnDocumentOption(Options):
    """Whether a document with the query's id is ignored, in mining as in evaluation."""

    group = "Mining"

    ignore_identical_ids: bool = option(
        True,
        "Treat a document with the query's own id as the query itself, as in BEIR: neither a negative nor an answer. "
        "Turn this off if queries and documents are numbered independently.",
    )


@dataclass(frozen=True)
class EvaluationOptions(ClusterOptions, OwnDocumentOption, EncodingOptions):
    """How retrieval is evaluated, and what is written to files."""

    group = "Evaluation"

    run_depth: int | None = option(
        None, "The number of documents per query in a run. By default the largest cut-off of the metrics.", least=1
    )
    corpus: SearchedCorpus = option(
        "full",
        "Search the whole corpus (full), or only the judged documents and the best documents of a reference run "
        "(pooled), for evaluation during training. Names of pooled scores end in _pooled: they are higher, and cannot "
        "be compared with scores over the whole corpus.",
    )
    pool_depth: int = option(100, "The number of documents per query taken from the reference run.", least=1)
    show_progress_bar: bool = option(False, "Show progress, speed and remaining time while encoding.")
    write_csv: bool = option(True, "Add a line to the evaluator's csv_file in the output_path of each call.")
    write_json: bool = option(
        True, "Write the last call's metrics and counts to the evaluator's json_file in its output_path."
    )
    save_runs: bool = option(False, "Write each collection's TREC run file to the output_path of each call.")


@dataclass(frozen=True)
class MiningSettings(OwnDocumentOption):
    """Which documents become a query's hard negatives.

    The meanings of the ranges, margins and limits are those of ``sentence_transformers.util.mine_hard_negatives``.
    """

    group = "Mining"

    num_negatives: int = option(4, "Hard negatives for each query.", least=0)
    queries_per_negative: int = option(1, "Queries for each negative; 0: none.", least=0)
    range_min: int = option(0, "Skip this many of the best candidates that pass the filters below.", least=0)
    range_max: int = option(100, "Take candidates down to this rank.")
    absolute_margin: float | None = option(
        None, "A negative must score at least this much below the query's lowest-scoring positive.", least=0
    )
    relative_margin: float | None = option(
        None, "The same, as a share of the positive's score (its absolute value).", least=0
    )
    max_score: float | None = option(None, "A negative must score at most this.")
    min_score: float | None = option(None, "A negative must score at least this.")
    sampling_strategy: SamplingStrategy = option(
        "top", "Take the best-ranked candidates (top), or draw from all within the range (random)."
    )
    judged_negatives: JudgedNegatives | None = option(
        None,
        "What to do with documents judged not relevant: keep them at their rank but exempt from margins (rank), take "
        "them first (first), or treat them as unjudged (ignore). By default first for training rows that name "
        "negatives, rank otherwise.",
    )
    prefer_known_queries: bool = option(
        True,
        "Take candidates that answer another training query before those that answer none, so that the penalty "
        "applies to as many negatives as possible. In a small corpus this also prevents documents that no training "
        "query asks for from being pushed away by every query and pulled closer by none.",
    )
    duplicate_threshold: float | None = option(
        None,
        "Exclude candidates with at least this cosine to a relevant document. A document with the same text as a "
        "relevant one, or as the query, is always excluded.",
        least=-1,
        most=1,
    )
    on_shortage: OnShortage = option(
        "relax",
        "For a query that the filters leave with too few negatives: take the candidates that fail the filters by least "
        "(relax), take random documents (random), keep fewer negatives (fewer), or drop the query (drop).",
    )
    candidates: CandidateSource = option(
        "model",
        "What ranks the candidates: the model, BM25 (needs bm25s), or both by reciprocal rank fusion (mixed). Scores, "
        "and so margins, are always the model's.",
    )
    index: str | None = option(
        None, "Search approximately with this FAISS index, such as IVF4096,PQ64. By default the search is exact."
    )
    nprobe: int | None = option(None, "The number of lists of an IVF index that are searched for a query.", least=1)
    max_positives_per_query: int | None = option(
        None, "Make at most this many rows of a query, with its best-judged positives.", least=1
    )

    def _check(self) -> None:
        if self.range_min >= self.range_max:
            raise SettingsError(
                f"range_min must be below range_max, got range_min={self.range_min} and range_max={self.range_max}"
            )
        if self.max_score is not None and self.min_score is not None and self.min_score > self.max_score:
            raise SettingsError(
                f"min_score must not be above max_score, got min_score={self.min_score} and max_score={self.max_score}"
            )
        if self.nprobe is not None and self.index is None:
            raise SettingsError("nprobe is for an approximate index; name one (index) or leave nprobe out")
        if self.index is not None and self.candidates == "bm25":
            raise SettingsError("BM25 ranks by itself; leave index out, or take candidates=mixed")


@dataclass(frozen=True)
class MiningOptions(SeedOption, MiningSettings):
    """What to mine."""

    max_queries: int | None = option(
        None, "Use at most this many of the collection's queries, drawn at random.", least=1
    )


@dataclass(frozen=True)
class QuerySettings(Options):
    """How queries of negatives are made."""

    group = "Queries of negatives"

    query_samples: int | None = option(
        None, "Queries to generate for each document. By default as many as queries_per_negative.", least=1
    )
    query_prompts: str | None = option(
        None, "A YAML file of prompt templates: a language code or default, each with a text that contains {document}."
    )
    query_max_tokens: int = option(64, "The largest number of tokens of a generated query.", least=1)
    query_temperature: float = option(0.7, "The sampling temperature; 0 takes the most likely tokens.", least=0)
    query_base_url: str | None = option(
        None, "The address of the endpoint. By default OPENAI_BASE_URL, or else OpenAI's own."
    )
    query_key_variable: str = option(
        "OPENAI_API_KEY", "The environment variable that holds the endpoint's key.", changes_results=False
    )
    query_concurrency: int = option(8, "Requests sent at the same time.", least=1, changes_results=False)
    query_rate: float | None = option(
        None, "The largest number of requests per minute.", above=0, changes_results=False
    )
    query_timeout: float = option(
        60.0, "Seconds to wait for a response of the endpoint.", above=0, most=86_400, changes_results=False
    )
    query_retries: int = option(5, "How often a failed request is sent again.", least=0, changes_results=False)
    query_budget: float | None = option(
        None,
        "The most money that all queries in the store may cost; needs both prices.",
        least=0,
        changes_results=False,
    )
    query_budget_tokens: int | None = option(
        None,
        "The most tokens, read and written, that all queries in the store may use.",
        least=0,
        changes_results=False,
    )
    query_price_prompt: float | None = option(
        None, "The price of a million input tokens.", least=0, most=1_000_000, changes_results=False
    )
    query_price_completion: float | None = option(
        None, "The price of a million output tokens.", least=0, most=1_000_000, changes_results=False
    )
    query_round_trip: RoundTripAction = option(
        "off",
        "What to do with a generated query that does not find its document: drop it, halve its weight (weight), or do "
        "not check (off).",
    )
    query_round_trip_k: int = option(10, "The lowest rank at which it may find it.", least=1)

    def _check(self) -> None:
        require_key_variable(self.query_key_variable)
        if self.query_base_url is not None:
            require_address(self.query_base_url, self.query_key_variable)
        if (self.query_price_prompt is None) != (self.query_price_completion is None):
            raise SettingsError("give both prices, query_price_prompt and query_price_completion, or neither")
        if self.query_budget is not None and self.query_price_prompt is None:
            raise SettingsError("a budget in money needs the prices: query_price_prompt and query_price_completion")

    @classmethod
    def for_negatives(cls: type[QuerySettingsT], settings: MiningSettings, **changes: Any) -> QuerySettingsT:
        """The options among the settings of a stage or run, with as many samples as a negative gets queries."""
        options = cls.of(settings, **changes)
        return options.with_samples(settings.queries_per_negative)

    def with_samples(self: QuerySettingsT, queries_per_negative: int) -> QuerySettingsT:
        """The same, with the default of ``query_samples`` filled in."""
        return self if self.query_samples else replace(self, query_samples=max(1, queries_per_negative))


@dataclass(frozen=True)
class QueryOptions(SeedOption, QuerySettings):
    """How queries of negatives are made, by any source."""


@dataclass(frozen=True)
class LossOptions(Options):
    """The loss."""

    group = "Loss"

    penalty_weight: float = option(
        0.1, "The weight of the penalty in the loss (the paper's lambda), 0 to 1.", least=0, most=1
    )
    penalty: PenaltyKind = option("cosine", "The kind of penalty.")
    scale: float = option(50.0, "Similarities are multiplied by this: 1 / temperature.", above=0)
    in_batch_negatives: bool = option(True, "Use the other documents of the batch as negatives too.")
    mini_batch_size: int | None = option(
        None,
        "Compute the loss in mini-batches of this size (CachedCLPLoss), so that any batch size fits into memory.",
        least=1,
    )


@dataclass(frozen=True)
class ExpertOptions(Options):
    """The mixture of experts, and what trains."""

    group = "Mixture of experts"

    experts: int = option(
        0, "Experts in each layer, which start as copies of its projection; 0 trains the dense model.", least=0
    )
    experts_per_token: int = option(1, "Experts per token.", least=1)
    projection: Projection = option(
        "intermediate", "Which projection of the feed-forward layers becomes a mixture of experts."
    )
    train: Trained | None = option(
        "auto",
        "What is trained; the rest is frozen. auto: the experts if there are any, or else the intermediate "
        "projections.",
    )

    def _check(self) -> None:
        if self.experts == 1 or 0 < self.experts < self.experts_per_token:
            raise SettingsError(
                f"experts={self.experts} with experts_per_token={self.experts_per_token}: a mixture needs at least "
                "two experts and no fewer than each token goes to; 0 experts trains the dense model"
            )
        if self.experts == 0 and self.experts_per_token != 1:
            raise SettingsError(
                f"experts_per_token={self.experts_per_token} needs experts, no fewer than each token goes to; give "
                "their number as experts, or leave this out: the dense model has none"
            )
        if self.experts == 0 and self.projection != "intermediate":
            raise SettingsError(
                f"projection={self.projection} needs experts: it is what they are made of; to train the dense model's "
                "projections name them with train: intermediate or output"
            )
        if self.experts == 0 and self.train in ("moe", "router"):
            raise SettingsError(f"train={self.train} needs experts; with experts=0 train intermediate, output or all")

    @property
    def what_trains(self) -> str:
        """``train``, with ``auto`` filled in."""
        if self.train is None:  # the default until 0.2.0, which a run of that time goes on with
            return "moe" if self.experts else "all"
        if self.train == "auto":
            return "moe" if self.experts else "intermediate"
        return self.train


@dataclass(frozen=True)
class TrainingOptions(SeedOption):
    """The training."""

    group = "Training"

    batches: Batches = option(
        "auto",
        "What a batch is made of. rows: queries, each with its own hard negatives. documents: documents that are near "
        "one another according to the mined negatives, each encoded once for several of its queries and used as a "
        "negative for the queries of the others; there is no penalty then. auto: documents if queries are made of "
        "sentences; rows otherwise, or if negatives are refreshed, or another penalty or another source of its "
        "queries is set.",
    )
    epochs: float | None = option(
        None,
        "Passes over the training rows. If queries are made of sentences, as many more follow over the rows of asked "
        "queries. By default 2, and 4 in batches of documents.",
        above=0,
    )
    batch_size: int | None = option(
        None, "Training rows per batch on each device. By default 16, and 128 in batches of documents.", least=1
    )
    learning_rate: float | None = option(
        None,
        "The peak learning rate. By default 1e-4 if only a part of the model is trained, 3e-4 in batches of "
        "documents, and 2e-5 if all of it is trained.",
        least=0,
    )
    warmup: float = option(0.1, "Warm-up steps: a share of all steps, or a number of at least 1.", least=0)
    bf16: bool | None = option(None, "Train in bfloat16. By default if the hardware supports it.")
    dropout: float | None = option(
        None,
        "Dropout while training. 0 trains without it, in less memory on a CPU. By default the model's own.",
        least=0,
        most=0.9,
    )
    compile_layers: bool = option(
        False,
        "Compile the encoder's layers for the training. This helps if a GPU waits for Python, as with small models or "
        "batches; the first steps take about a minute.",
    )
    average_with_base: str | None = option(
        "auto",
        "Average the trained weights, with this share from 0 to 1, and the base model's; this is often better than "
        "either. auto holds out a tenth of the training queries. It takes a half, or the best share, mostly three "
        "quarters if training gains 0.1 and more on them, but none that scores below the base. 1 turns averaging off.",
    )
    training_arg: dict[str, Any] = option(
        {}, "Another argument of SentenceTransformerTrainingArguments, as NAME=VALUE."
    )

    def __post_init__(self) -> None:
        share = self.average_with_base
        if isinstance(share, (int, float)) and not isinstance(share, bool):  # as YAML and Python give it
            object.__setattr__(self, "average_with_base", f"{share:g}")
        super().__post_init__()

    def _check(self) -> None:
        share = self.share_of_trained
        if isinstance(share, float) and not 0 <= share <= 1:
            raise SettingsError(f"average_with_base must be a share from 0 to 1, or auto, got {share:g}")

    @property
    def of_documents(self) -> bool:
        """Whether batches are made of documents. ``auto`` has to be resolved before; until then it counts as rows."""
        return self.batches == "documents"

    @property
    def number_of_epochs(self) -> float:
        """``epochs``, with its default filled in."""
        return self.epochs if self.epochs is not None else 4.0 if self.of_documents else 2.0

    @property
    def rows_in_batch(self) -> int:
        """``batch_size``, with its default filled in."""
        return self.batch_size if self.batch_size is not None else 128 if self.of_documents else 16

    @property
    def share_of_trained(self) -> float | Literal["auto"]:
        """``average_with_base`` as a number or ``"auto"``; 1 where nothing is averaged."""
        share = self.average_with_base
        if share == "auto":
            return "auto"
        try:
            return 1.0 if share is None else float(share)
        except ValueError:
            raise SettingsError(f"average_with_base must be a share from 0 to 1, or auto, got {share!r}") from None


@dataclass(frozen=True)
class RefreshOptions(Options):
    """Whether and how negatives are mined anew while training goes on."""

    group = "Refreshing negatives while training"

    refresh_every: str | None = option(
        None,
        "Mine again with the current weights every this many steps, or every epoch (epoch). By default negatives are "
        "mined once, before training.",
        keyword="every",
    )
    refresh_async: bool = option(
        False,
        "Mine in another process while training continues; the result is used after --refresh-lag steps.",
        keyword="asynchronous",
    )
    refresh_lag: int | None = option(
        None,
        "With --refresh-async, the number of steps after which the new negatives are used. By default as many as "
        "between two refreshes. 0: as soon as they are ready, so that two runs may differ.",
        least=0,
        keyword="lag",
    )
    refresh_threads: int = option(
        1,
        "With --refresh-async on a CPU, the number of threads for mining; training has that many fewer.",
        least=1,
        changes_results=False,
        keyword="threads",
    )
    refresh_device: str | None = option(
        None,
        "With --refresh-async, the device for mining, such as cuda:1. By default a free GPU, or else the training "
        "device.",
        changes_results=False,
        keyword="device",
    )

    def __post_init__(self) -> None:
        every = self.refresh_every
        if isinstance(every, int) and not isinstance(every, bool):  # as YAML and Python give it
            object.__setattr__(self, "refresh_every", str(every))
        super().__post_init__()

    def _check(self) -> None:
        every = self.refresh_every
        if every not in (None, "epoch") and (not str(every).isdecimal() or int(str(every)) < 1):
            raise SettingsError(f"refresh_every must be a number of steps, at least 1, or epoch, got {every!r}")
        if self.refresh_lag is not None and not self.refresh_async:
            raise SettingsError("refresh_lag is for refresh_async: otherwise new negatives are used at once")

    @property
    def steps_between_refreshes(self) -> int | Literal["epoch"] | None:
        """``refresh_every`` as a number, ``"epoch"``, or None for no refresh."""
        every = self.refresh_every
        if every is None or every == "epoch":
            return every  # type: ignore[return-value]
        return int(every)
