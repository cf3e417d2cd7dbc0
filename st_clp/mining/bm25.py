"""BM25 as a source of candidates that is independent of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from st_clp.data import Corpus
from st_clp.extras import import_package

# Words of every script: letters, the marks that belong to them (the vowel signs of Hindi are marks, which \w leaves
# out) and digits.
WORD = r"[\p{L}\p{M}\p{N}]+"
# Scripts that put no space between words are cut into pairs of characters.
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+"


class Words:
    """A tokenizer for BM25: lower-case words of any language."""

    def __init__(self) -> None:
        regex = _import("regex")
        self._word: re.Pattern[str] = regex.compile(WORD)
        self._unspaced: re.Pattern[str] = regex.compile(UNSPACED)

    def cut(self, text: str) -> list[str]:
        """The words of a text, in order."""
        words: list[str] = []
        for word in self._word.findall(text.lower()):
            end = 0
            for match in self._unspaced.finditer(word):
                if match.start() > end:
                    words.append(word[end : match.start()])
                words += _pairs(match.group())
                end = match.end()
            if end < len(word):
                words.append(word[end:])
        return words


def require_bm25() -> None:
    """Check that what BM25 needs is installed.

    Raises:
        ModuleNotFoundError: bm25s or regex is not installed; the message says how to.
    """
    for name in ("bm25s", "regex"):
        _import(name)


def _import(name: str) -> Any:
    return import_package(name, "ranking by BM25", "st-clp[bm25]")


def _pairs(characters: str) -> list[str]:
    return [characters[i : i + 2] for i in range(max(1, len(characters) - 1))]


class BM25:
    """BM25 over a corpus, by bm25s. The index, words and counts, is held in memory.

    Robertson and Zaragoza (2009), The Probabilistic Relevance Framework: BM25 and Beyond; Lù (2024), BM25S,
    arXiv:2407.03618.

    Args:
        corpus: The documents; their places in it are what :meth:`search` returns.
        show_progress_bar: Show progress.

    Raises:
        ModuleNotFoundError: bm25s is not installed; the message says how to.
    """

    def __init__(self, corpus: Corpus, *, show_progress_bar: bool = True) -> None:
        bm25s = _import("bm25s")
        self._words = Words()
        self._show_progress_bar = show_progress_bar
        numbers: dict[str, int] = {}
        documents: list[list[int]] = []
        stream: Iterable[Any] = tqdm(
            corpus,
            total=corpus.expected_size(),
            desc=f"Reading {corpus.name} for BM25",
            unit=" documents",
            disable=not show_progress_bar,
        )
        for document in stream:
            documents.append([numbers.setdefault(word, len(numbers)) for word in self._words.cut(document.text)])
        self._number_of = numbers
        self._size = len(documents)
        self._index = bm25s.BM25()
        if numbers:
            self._index.index((documents, numbers), show_progress=show_progress_bar)

    def search(self, queries: list[str], k: int) -> np.ndarray:
        """Row numbers of the k best documents of every query, int64, (queries, k); -1 where fewer share a word."""
        k = min(k, self._size)
        found = np.full((len(queries), k), -1, dtype=np.int64)
        for row, query in enumerate(queries):
            numbers = [self._number_of[word] for word in self._words.cut(query) if word in self._number_of]
            if not numbers:
                continue
            scores = self._index.get_scores_from_ids(numbers)
            best = np.argpartition(-scores, k - 1)[:k] if k < len(scores) else np.arange(len(scores))
            best = best[np.lexsort((best, -scores[best]))]
            best = best[scores[best] > 0]
            found[row, : len(best)] = best
        return found


def fuse(*rankings: np.ndarray, k: int, constant: int = 60) -> np.ndarray:
    """Merge rankings by reciprocal rank fusion: a document's score is the sum of 1 / (constant + rank), ranks from 1.

    Cormack, Clarke and Büttcher (2009), Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
    Methods.

    Args:
        rankings: The documents' places, int64, (queries, any width) each; -1 is no document.
        k: How many to return.
        constant: The larger, the less the very first ranks stand out.

    Returns:
        int64, (queries, k), best first, -1 where there are fewer; equal scores by place.
    """
    fused = np.full((len(rankings[0]), k), -1, dtype=np.int64)
    for row in range(len(fused)):
        places = np.concatenate([ranking[row] for ranking in rankings])
        scores = np.concatenate([1.0 / (constant + 1 + np.arange(ranking.shape[1])) for ranking in rankings])
        known, inverse = np.unique(places[places >= 0], return_inverse=True)
        sums = np.bincount(inverse, weights=scores[places >= 0], minlength=len(known))
        best = np.lexsort((known, -sums))[:k]
        fused[row, : len(best)] = known[best]
    return fused
