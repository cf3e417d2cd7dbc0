"""How long texts are and how fast they are encoded, from a sample and a short trial."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterable, Sequence

import numpy as np
from sentence_transformers import SentenceTransformer

from st_clp.encoding.batches import tokenise
from st_clp.encoding.encode import encode
from st_clp.encoding.working_model import Task, WorkingModel
from st_clp.options import Encoding

SAMPLE = 512  # texts whose length is looked at
WARM_UP = 16


def sample_of(texts: Iterable[str], seed: int) -> tuple[list[str], int]:
    """(up to 512 of the texts, each as likely as any other; how many there are), in one pass."""
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
    """(texts,): tokens after cutting to the model's length, in no order; words, of a model that has no tokens."""
    working = WorkingModel(model, task, "model")
    if not working.by_tokens:
        return np.array([len(text.split()) for text in texts])
    return tokenise(working.preprocess, list(texts)).lengths


def tokens_a_second(
    model: SentenceTransformer, texts: Sequence[str], encoding: Encoding, *, seconds: float = 10.0
) -> float:
    """The rate at which the model encodes documents like these.

    Args:
        model: The model.
        texts: A sample of them, in any order.
        encoding: How they are to be encoded.
        seconds: How long the trial may take, about; a warm-up comes on top.
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
