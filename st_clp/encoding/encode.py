"""Encode texts as a stream: the embeddings of ``model.encode_query`` and ``encode_document``, faster.

A transformer's time is spent on tokens, padding included, so texts are sorted by length within a window and batches are
filled by number of tokens. On an accelerator the next windows are tokenised while this one is in the model, and batches
are as large as memory allows. Where the hardware multiplies bfloat16, the transformer runs in it, and the later modules
(pooling, dense layers) in float32: a mean over hundreds of tokens in bfloat16 costs more accuracy than the transformer
does.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_clp.declaring import takes
from st_clp.encoding.ahead import TokenBudget, tokenised_ahead
from st_clp.encoding.batches import Window, tokenise
from st_clp.encoding.token_lists import ListWindow
from st_clp.encoding.working_model import Embedded, Task, WorkingModel
from st_clp.memory import keep_freed_memory
from st_clp.options import Encoding, EncodingOptions

logger = logging.getLogger(__name__)

# Texts that are sorted by length together. A store's shards are windows, and a killed run loses at most one. A CPU's
# batches are small, an accelerator's larger.
CPU_WINDOW, ACCELERATOR_WINDOW = 512, 8192
CPU_TOKENS = 2048
CPU_BLOCK = 12 << 20  # bytes of a batch's widest states: several of them have to fit into what stays when it is freed


@takes(encoding=EncodingOptions)
def encode_queries(model: SentenceTransformer, texts: Sequence[str], *, encoding: EncodingOptions) -> np.ndarray:
    """Encode queries as ``model.encode_query`` does.

    Args:
        model: Any SentenceTransformer.
        texts: The queries.
        encoding

    Returns:
        float32 embeddings, (number of texts, dim), in the order of the texts.

    Raises:
        TypeError: A text is not a string.
        ValueError: An option is not known or out of range.
    """
    _require_several(texts)
    if not len(texts):
        return np.zeros((0, embedding_dimension(model)), dtype=np.float32)
    return np.concatenate(list(encode(model, texts, "query", encoding=encoding)))


@takes(encoding=EncodingOptions)
def encode_documents(
    model: SentenceTransformer, texts: Iterable[str], *, window: int | None = None, encoding: EncodingOptions
) -> Iterator[np.ndarray]:
    """Encode a stream of documents as ``model.encode_document`` does, in bounded memory.

    Args:
        model: Any SentenceTransformer.
        texts: The documents' texts; read as needed.
        window: Texts that are read and sorted by length together. None: 512 on a processor, 8,192 otherwise.
        encoding

    In the model's own precision embeddings have a cosine of 0.9999 with those of ``model.encode``, in bfloat16 0.999.

    Yields:
        float32 embeddings, (at most ``window``, dim), in the order of the texts.

    Raises:
        TypeError: A text is not a string; raised after the windows before it.
        ValueError: An option is not known or out of range.
    """
    return encode(model, texts, "document", window=window, encoding=encoding)


def encode(
    model: SentenceTransformer,
    texts: Iterable[str],
    task: Task,
    *,
    window: int | None = None,
    encoding: EncodingOptions,
) -> Iterator[np.ndarray]:
    """As :func:`encode_documents`, for either task."""
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    _require_several(texts)
    encoder = Encoder(model, task, encoding)
    return encoder.encode_windows(_windows(iter(texts), window or window_size(model)))


def window_size(model: SentenceTransformer) -> int:
    """The default number of texts that are sorted by length together, on the model's device."""
    return CPU_WINDOW if model.device.type == "cpu" else ACCELERATOR_WINDOW


def reads_ahead(device: torch.device) -> bool:
    """Whether to tokenise a window while the previous one is in the model.

    Not on a CPU: the model uses all cores, and if a tokenizer takes one of them, the others wait for it at the end of
    every operation.
    """
    return device.type != "cpu"


def _require_several(texts: Iterable[str]) -> None:
    if isinstance(texts, (str, bytes)):
        raise TypeError("texts must be several texts, such as a list; a single one goes into a list too")


def _windows(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    begin = 0
    while window := list(itertools.islice(texts, size)):
        for place, text in enumerate(window, start=begin):
            if not isinstance(text, str):
                raise TypeError(f"text {place} is no text but of type {type(text).__name__}: {text!r:.60}")
        begin += len(window)
        yield window


class Encoder:
    """Encodes one window of texts after the other.

    Args:
        model, task: As in :func:`encode_documents`.
        encoding: How.
    """

    def __init__(self, model: SentenceTransformer, task: Task, encoding: EncodingOptions) -> None:
        self._working = WorkingModel(model, task, encoding.encode_dtype)
        self._batch_size = encoding.encode_batch_size
        self._dim = embedding_dimension(model)
        self._whole_batch = self._batch_size or 32
        self._budget = TokenBudget(model.device)
        if model.device.type == "cpu":
            keep_freed_memory()
            self._budget.tokens = max(1, min(CPU_TOKENS, CPU_BLOCK // self._working.bytes_per_token))

    def encode_windows(self, windows: Iterator[list[str]]) -> Iterator[np.ndarray]:
        """Yield the float32 embeddings of each window's texts, (texts, dim); a window may be empty."""
        if not self._working.by_tokens:
            yield from (self._run_whole(texts) if texts else self._nothing() for texts in windows)
        elif reads_ahead(self._working.device):
            yield from map(self._run, tokenised_ahead(windows, self._working.token_lists, self._working.preprocess))
        else:
            yield from map(self._run, map(self._tokenise, windows))

    def _tokenise(self, texts: list[str]) -> Window | None:
        return tokenise(self._working.preprocess, texts) if texts else None

    def _nothing(self) -> np.ndarray:
        return np.zeros((0, self._dim), dtype=np.float32)

    @torch.inference_mode()
    def _run(self, window: Window | ListWindow | None) -> np.ndarray:
        """Encode a window's texts; batches shrink when memory runs out."""
        if window is None:
            return self._nothing()
        embeddings = np.empty((len(window), self._dim), dtype=np.float32)
        position = 0
        waiting: tuple[np.ndarray, Embedded] | None = None
        while position < len(window):
            batch = window.batch(position, self._budget.tokens, self._batch_size)
            before = self._budget.allocated()
            try:
                embedded = self._working.forward(batch.features, padded=batch.padded)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                embedded = None
            if embedded is None:
                # Not within the except clause: there the error's frames still hold the batch's memory.
                self._budget.shrink(batch.tokens)
                logger.warning("out of memory: going on with batches of %d tokens", self._budget.tokens)
                self._working.free_memory()
                continue
            self._budget.learn(batch.tokens, before)
            # An accelerator works on this batch while the one before it is copied back.
            if waiting is not None:
                embeddings[waiting[0]] = waiting[1].wait()
            waiting = batch.rows, embedded
            position += len(batch)
        if waiting is not None:
            embeddings[waiting[0]] = waiting[1].wait()
        return embeddings

    def _run_whole(self, texts: list[str]) -> np.ndarray:
        """Encode a window's texts by the model's own method."""
        while True:
            try:
                return self._working.encode_whole(texts, self._whole_batch)
            except torch.OutOfMemoryError:
                if self._whole_batch == 1:
                    raise
            self._whole_batch //= 2
            logger.warning("out of memory: going on with batches of %d texts", self._whole_batch)
            self._working.free_memory()


def embedding_dimension(model: SentenceTransformer) -> int:
    """The width of the model's embeddings, after ``truncate_dim``."""
    dimension = model.get_embedding_dimension()
    return int(dimension) if dimension else int(np.asarray(model.encode_document(["a"])).shape[1])


SAMPLE = 512  # texts whose length is looked at
WARM_UP = 16


def sample_of(texts: Iterable[str], seed: int) -> tuple[list[str], int]:
    """(a uniform random sample of up to 512 texts, the number of all texts), in one pass."""
    generator = random.Random(seed)
    stream = iter(texts)
    sample = list(itertools.islice(stream, SAMPLE))
    number = len(sample)
    for text in stream:
        number += 1
        place = generator.randrange(number)
        if place < SAMPLE:
            sample[place] = text
    generator.shuffle(sample)
    return sample, number


def token_counts(model: SentenceTransformer, texts: Sequence[str], task: Task) -> np.ndarray:
    """(texts,): tokens after truncation, in arbitrary order; words if the model has no tokens."""
    working = WorkingModel(model, task, "model")
    if not working.by_tokens:
        return np.array([len(text.split()) for text in texts])
    return tokenise(working.preprocess, list(texts)).lengths


def tokens_a_second(
    model: SentenceTransformer, texts: Sequence[str], encoding: Encoding, *, seconds: float = 10.0
) -> float:
    """Measure how many tokens a second the model encodes.

    Args:
        model: The model.
        texts: A sample of documents, in any order.
        encoding: How to encode them.
        seconds: About how long the measurement may take, without its warm-up.
    """

    def taken(chosen: Sequence[str]) -> float:
        started = time.perf_counter()
        for _ in encode(model, chosen, "document", encoding=encoding):
            pass
        return time.perf_counter() - started

    few = texts[:WARM_UP]
    taken(few)
    number = max(len(few), min(len(texts), int(seconds / max(taken(few), 1e-9) * len(few))))
    chosen = texts[:number]
    return float(token_counts(model, chosen, "document").sum()) / taken(chosen)
