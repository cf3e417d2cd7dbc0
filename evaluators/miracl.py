"""MIRACL: retrieval in 18 languages."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from typing import Any

from evaluators.benchmark import BenchmarkEvaluator
from st_clp.data import Collection, CollectionError

logger = logging.getLogger(__name__)

MIRACL_LANGUAGES = tuple("ar bn de en es fa fi fr hi id ja ko ru sw te th yo zh".split())


class MIRACLEvaluator(BenchmarkEvaluator):
    """How well a model retrieves on MIRACL, in each language and on average (Zhang et al., 2023).

    The metrics are ``miracl_ko_ndcg@10`` and the like, and ``miracl_mean_ndcg@10`` over the languages, which is the
    primary one. The collections come through ir_datasets, which downloads what is not there to the folder that
    ``IR_DATASETS_HOME`` names; the document text is title, a space and text.

    Args:
        languages: Two-letter codes, or ``"all"``: every language that has the split (18 have dev, 16 have train).
        split: ``"dev"`` or ``"train"``; the answers to test-a and test-b are not public.
        name: Goes before every metric. None: ``miracl``, and ``miracl_train`` for the train split.
        **settings: All other arguments of :class:`BenchmarkEvaluator`.

    Raises:
        CollectionError: A language is not in MIRACL, or does not have the split; the message names those that do.
        ValueError: A language is named twice, or a setting is wrong.

    Example:
        ::

            from sentence_transformers import SentenceTransformer
            from evaluators import MIRACLEvaluator

            evaluator = MIRACLEvaluator(languages=("ko", "fa", "hi"), store_dir="embeddings")
            metrics = evaluator(SentenceTransformer("BAAI/bge-m3"), output_path="scores")
            print(metrics["miracl_ko_ndcg@10"], metrics[evaluator.primary_metric])
    """

    def __init__(
        self,
        languages: Sequence[str] | str = ("ko", "fa", "hi"),
        split: str = "dev",
        name: str | None = None,
        **settings: Any,
    ) -> None:
        self.languages = _with_split(languages, split)
        self.split = split
        if name is None:
            name = "miracl" if split == "dev" else f"miracl_{split}"
        collections = {language: Collection.load(f"miracl/{language}", split=split) for language in self.languages}
        super().__init__(collections, name, **settings)


def _with_split(languages: Sequence[str] | str, split: str) -> tuple[str, ...]:
    """The languages asked for, if all of them have the split."""
    if languages == "all":
        found = tuple(language for language in MIRACL_LANGUAGES if split in _splits(language))
        if found:
            if without := sorted(set(MIRACL_LANGUAGES) - set(found)):
                logger.info("MIRACL has no split %s in %s; the others are evaluated", split, ", ".join(without))
            return found
        languages = MIRACL_LANGUAGES
    asked = (languages,) if isinstance(languages, str) else tuple(languages)
    if len(set(asked)) < len(asked):
        raise ValueError(f"a language is named twice: {', '.join(asked)}")
    for language in asked:
        _require_language(language)
    if missing := [language for language in asked if split not in _splits(language)]:
        raise CollectionError(_missing_split(missing, split))
    return asked


def _splits(language: str) -> list[str]:
    return Collection.splits(f"miracl/{language}")


def _require_language(language: str) -> None:
    if language not in MIRACL_LANGUAGES:
        nearest = difflib.get_close_matches(language, MIRACL_LANGUAGES, n=1)
        hint = f"did you mean {nearest[0]}? " if nearest else ""
        raise CollectionError(
            f"MIRACL has no language {language!r}; {hint}its languages are {', '.join(MIRACL_LANGUAGES)}"
        )


def _missing_split(missing: list[str], split: str) -> str:
    """Which splits the languages have instead, and which languages have the split."""
    by_splits: dict[str, list[str]] = {}
    for language in missing:
        by_splits.setdefault(" and ".join(_splits(language)), []).append(language)
    instead = "; ".join(f"{', '.join(languages)}: only {splits}" for splits, languages in by_splits.items())
    with_split = [language for language in MIRACL_LANGUAGES if split in _splits(language)]
    others = f". Languages with {split}: {', '.join(with_split)}" if with_split else ""
    return f"MIRACL has no judgments of a split {split!r} for {', '.join(missing)} ({instead}){others}"
