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
    """What is trained, on what, and what it is evaluated on."""

    group = "Data"

    model: str = option("", "The model to fine-tune: a folder, or a name on the Hugging Face Hub.")
    collection: list[str] = option(
        [],
        "What to train on: an ir_datasets id such as miracl/ko, a BEIR folder, or a JSONL file of training rows. "
        "Several may be named. The train split is found.",
    )
    output: str = option("", "The folder for the fine-tuned model and everything about the run.", changes_results=False)
    eval_collection: list[str] = option(
        [], "What to evaluate on. By default the dev (or else test) splits of the collections."
    )
    train_split: str = option("train", "The split to train on.")
    eval_split: str | None = option(None, "The split to evaluate on. By default dev, validation or test.")
    holdout: float = option(
        0.1,
        "The share of training queries (1,000 at most) to evaluate on where there is no other split.",
        least=0,
        most=0.9,
    )
    max_train_queries: int | None = option(
        None, "Train on no more queries of each collection than this, drawn at random.", least=1
    )
    sentence_queries: int | None = option(
        None,
        "Train on so many more queries of each collection, made of its documents' sentences, of those too that no "
        "query asks for. By default about eight a document, 40,000 at most; none where people asked so many or where "
        "batches are made of rows.",
        least=0,
    )
    text_field: list[str] = option([], "A document's fields to join as its text. By default title and text.")
    max_seq_length: int | None = option(None, "Tokens of a text to read. By default as the model has it.", least=1)


@dataclass(frozen=True)
class ClusterOptions(Options):
    """Whether encoding and search are spread out over several processes and machines, by Ray."""

    group = "Several machines"

    ray: str | None = option(
        None,
        "Encode and search on a Ray cluster: local starts one on this machine, auto joins the one that RAY_ADDRESS "
        "names or that runs here, or give its address. By default in this process.",
        changes_results=False,
    )
    workers: int | None = option(
        None,
        "Worker processes on the cluster, at most. By default as many as it has room for.",
        least=1,
        changes_results=False,
    )
    cpus_per_worker: int = option(1, "Processor cores of each worker.", least=1, changes_results=False)
    gpus_per_worker: float | None = option(
        None,
        "GPUs of each worker; a fraction shares one. By default 1 where the cluster has GPUs.",
        least=0,
        changes_results=False,
    )

    def _check(self) -> None:
        if self.ray is None and (self.workers is not None or self.gpus_per_worker is not None):
            raise SettingsError("workers and gpus_per_worker are for a Ray cluster: name one (ray), or leave them out")

    def require_folder(self, folder: object, name: str) -> None:
        """Refuse to work on a cluster without a folder that its machines share.

        Raises:
            SettingsError: There is none.
        """
        if self.ray is not None and folder is None:
            raise SettingsError(f"ray: the workers write embeddings to a folder that all of them share; give {name}")


@dataclass(frozen=True)
class TrainingClusterOptions(ClusterOptions):
    """Whether training is spread out too."""

    train_workers: int | None = option(
        None,
        "Train in so many processes on the Ray cluster, each with --batch-size rows of a step; every one's documents "
        "are negatives for all. By default in this process.",
        least=1,
    )

    def _check(self) -> None:
        if self.ray is None and self.train_workers is not None:
            raise SettingsError("train_workers is for a Ray cluster: name one (ray), or leave it out")


# How to take a cluster out of options that are handed on.
HERE = {"ray": None, "workers": None, "gpus_per_worker": None}


@dataclass(frozen=True)
class EncodingOptions(Options):
    """How texts are encoded."""

    group = "Data"

    encode_batch_size: int | None = option(
        None,
        "No more texts than this in one forward pass when encoding. By default as many as fill it.",
        least=1,
        changes_results=False,
        keyword="batch_size",
    )
    encode_dtype: ComputeDtype = option(
        "auto",
        "What encoding computes in: the model's own precision, bfloat16, or bfloat16 where the hardware is fast in it.",
        keyword="dtype",
    )


@dataclass(frozen=True)
class Encoding(ClusterOptions, EncodingOptions):
    """How texts are encoded, where, and whether that is shown."""

    group = EncodingOptions.group

    show_progress_bar: bool = option(True, "Show progress.", changes_results=False)


@dataclass(frozen=True)
class OwnDocumentOption(Options):
    """Whether a document may be its own answer, which mining and evaluation decide alike."""

    group = "Mining"

    ignore_identical_ids: bool = option(
        True,
        "A document with the query's own id is the query itself, as in BEIR: neither a negative nor an answer. Switch "
        "it off where queries and documents are numbered independently of each other.",
    )


@dataclass(frozen=True)
class EvaluationOptions(ClusterOptions, OwnDocumentOption, EncodingOptions):
    """How retrieval is evaluated, and what is written of it."""

    group = "Evaluation"

    run_depth: int | None = option(
        None, "How many documents a query's run holds. By default the largest cut-off of the metrics.", least=1
    )
    corpus: SearchedCorpus = option(
        "full",
        "Search the whole corpus; or only the judged documents and the best of a reference run, for evaluation in the "
        "middle of training. _pooled then goes behind the name: such a figure comes out higher, and is not to be "
        "compared with one over the whole corpus.",
    )
    pool_depth: int = option(100, "How many of each query's documents to pool from the reference run.", least=1)
    show_progress_bar: bool = option(False, "Show progress, rate and remaining time while encoding.")
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
    queries_per_negative: int = option(1, "Queries for each negative; 0 for none.", least=0)
    range_min: int = option(0, "Skip this many of the best candidates that pass the limits below.", least=0)
    range_max: int = option(100, "Take candidates from no further down than this rank.")
    absolute_margin: float | None = option(
        None, "A negative must score at least this much below the query's lowest-scoring positive.", least=0
    )
    relative_margin: float | None = option(None, "The same, as a share of the size of the positive's score.", least=0)
    max_score: float | None = option(None, "A negative must score at most this.")
    min_score: float | None = option(None, "A negative must score at least this.")
    sampling_strategy: SamplingStrategy = option(
        "top", "Take the best-ranked candidates, or draw from all within range."
    )
    judged_negatives: JudgedNegatives | None = option(
        None,
        "Documents judged not relevant: leave them in the ranking, where margins do not apply to them, take them "
        "first, or treat them as not judged. By default first for training rows that name negatives, rank otherwise.",
    )
    prefer_known_queries: bool = option(
        True,
        "Take candidates that a training query asks for before those that none does, so that the penalty holds as many "
        "negatives as can be. In a small corpus this also keeps documents that no training query asks for from being "
        "pushed away by every query and pulled by none.",
    )
    duplicate_threshold: float | None = option(
        None,
        "Candidates with at least this cosine to a relevant document are no negatives. A document with the very text "
        "of a relevant one, or of the query, never is.",
        least=-1,
        most=1,
    )
    on_shortage: OnShortage = option(
        "relax",
        "For a query that the filters leave with too few negatives: take the nearest misses, take random documents, "
        "leave it with fewer, or drop it.",
    )
    candidates: CandidateSource = option(
        "model",
        "What ranks the candidates: the model, BM25 (needs bm25s), or both by reciprocal rank. The scores, and so the "
        "margins, are the model's in any case.",
    )
    index: str | None = option(
        None, "Search approximately by this FAISS index, such as IVF4096,PQ64. By default exactly."
    )
    nprobe: int | None = option(None, "How many lists an IVF index looks through for a query.", least=1)
    max_positives_per_query: int | None = option(
        None, "Make no more rows of a query than this, with its best-judged positives.", least=1
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
        None, "Use no more than this many of the collection's queries (so of its language), drawn at random.", least=1
    )


@dataclass(frozen=True)
class QuerySettings(Options):
    """How queries of negatives are made."""

    group = "Queries of negatives"

    query_samples: int | None = option(
        None, "Queries to make for each document. By default as many as queries_per_negative.", least=1
    )
    query_prompts: str | None = option(
        None, "A YAML file with prompt templates: a language code or default, and a text with {document} in it."
    )
    query_max_tokens: int = option(64, "Tokens that a generated query may have.", least=1)
    query_temperature: float = option(0.7, "Of the sampling; 0 takes the likeliest.", least=0)
    query_base_url: str | None = option(
        None, "The endpoint's address. By default OPENAI_BASE_URL, or else OpenAI's own."
    )
    query_key_variable: str = option(
        "OPENAI_API_KEY", "The environment variable that holds the endpoint's key.", changes_results=False
    )
    query_concurrency: int = option(8, "Requests at a time.", least=1, changes_results=False)
    query_rate: float | None = option(None, "Requests a minute at most.", above=0, changes_results=False)
    query_timeout: float = option(
        60.0, "Seconds to wait for an answer of the endpoint.", above=0, most=86_400, changes_results=False
    )
    query_retries: int = option(5, "Times that a request that failed is sent again.", least=0, changes_results=False)
    query_budget: float | None = option(
        None,
        "Money that all queries in the store may have cost at most; it needs both prices.",
        least=0,
        changes_results=False,
    )
    query_budget_tokens: int | None = option(
        None,
        "Tokens, read and written, that all queries in the store may have taken at most.",
        least=0,
        changes_results=False,
    )
    query_price_prompt: float | None = option(
        None, "Money for a million tokens that are read.", least=0, most=1_000_000, changes_results=False
    )
    query_price_completion: float | None = option(
        None, "Money for a million tokens that are written.", least=0, most=1_000_000, changes_results=False
    )
    query_round_trip: RoundTripAction = option(
        "off",
        "What becomes of a generated query that does not find its document: drop it, halve its weight, or do not look.",
    )
    query_round_trip_k: int = option(10, "How far down it may find it.", least=1)

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
    scale: float = option(50.0, "What similarities are multiplied by: 1 / temperature.", above=0)
    in_batch_negatives: bool = option(True, "Let the batch's other documents be negatives too.")
    mini_batch_size: int | None = option(
        None,
        "Compute the loss in mini-batches of this size (CachedCLPLoss), so that any batch size fits.",
        least=1,
    )


@dataclass(frozen=True)
class ExpertOptions(Options):
    """The mixture of experts, and what trains."""

    group = "Mixture of experts"

    experts: int = option(0, "Experts in each layer, as copies of its projection; 0 trains the dense model.", least=0)
    experts_per_token: int = option(1, "Experts that each token goes to.", least=1)
    projection: Projection = option("intermediate", "Which projection of the feed-forward layers becomes a mixture.")
    train: Trained | None = option(
        "auto",
        "What trains; the rest is frozen. auto: the experts where there are any, or else the intermediate projections.",
    )

    def _check(self) -> None:
        if self.experts == 1 or 0 < self.experts < self.experts_per_token:
            raise SettingsError(
                f"experts={self.experts} with experts_per_token={self.experts_per_token}: a mixture needs at least "
                "two experts and no fewer than each token goes to; 0 experts trains the dense model"
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
        "What a batch is made of: rows, each with its own hard negatives; or documents that are near one another, by "
        "what was mined, each encoded once for several of its queries and a negative for those of the others. auto: "
        "documents where queries are made of sentences; rows otherwise, or where negatives are refreshed or another "
        "penalty, or other queries for it, are asked for: batches of documents have none.",
    )
    epochs: float | None = option(
        None,
        "Passes over the training rows; as many more over those of queries that were asked, where others are made of "
        "sentences. By default 2, and 4 in batches of documents.",
        above=0,
    )
    batch_size: int | None = option(
        None, "Training rows in a batch on each device. By default 16, and 128 in batches of documents.", least=1
    )
    learning_rate: float | None = option(
        None,
        "The peak learning rate. By default 1e-4 where only a part trains, 3e-4 in batches of documents, and 2e-5 "
        "where all trains.",
        least=0,
    )
    warmup: float = option(0.1, "Steps of warm-up: a share of all steps, or a number from 1.", least=0)
    bf16: bool | None = option(None, "Train in bfloat16. By default where the hardware has it.")
    compile_layers: bool = option(
        False,
        "Compile the encoder's layers for the training. A step then asks less of the host, for which a GPU waits with "
        "small models or batches; the first steps take a minute or so.",
    )
    average_with_base: str | None = option(
        "auto",
        "Give the trained weights this share, from 0 to 1, and the base model's the rest, which is often better than "
        "either. auto takes a half, or three quarters where the base knew little, by a tenth of the training queries, "
        "which are not trained on, and no share that answers them worse than the base; 1 averages nothing.",
    )
    training_arg: dict[str, Any] = option(
        {}, "Any other argument of SentenceTransformerTrainingArguments, as NAME=VALUE."
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
        """Whether batches are made of documents; ``auto`` has to be settled before, and counts as rows."""
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
        "Mine again with the weights as they are after every so many steps, or each epoch. By default once, before "
        "training.",
        keyword="every",
    )
    refresh_async: bool = option(
        False,
        "Mine in another process while training goes on; what it found is used --refresh-lag later.",
        keyword="asynchronous",
    )
    refresh_lag: int | None = option(
        None,
        "With --refresh-async, after how many steps the new negatives are used. By default as many as lie between "
        "refreshes. 0: as soon as they are there, which no second run repeats.",
        least=0,
        keyword="lag",
    )
    refresh_threads: int = option(
        1,
        "With --refresh-async on a processor, threads to mine with; training has as many fewer.",
        least=1,
        changes_results=False,
        keyword="threads",
    )
    refresh_device: str | None = option(
        None,
        "With --refresh-async, what to mine on, such as cuda:1. By default a free GPU, or where it trains.",
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
