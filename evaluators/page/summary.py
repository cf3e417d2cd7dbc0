"""What the page says first: one sentence a person can quote, and one search that was wrong before and is right now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evaluators.comparison import Comparison, Difference
from evaluators.evaluation import Evaluation
from evaluators.page.texts import ShownChange

# ISO 639 codes of languages that retrieval collections are made in.
LANGUAGES = {
    "ar": "Arabic", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French", "gu": "Gujarati",
    "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian",
    "ja": "Japanese", "jv": "Javanese", "ko": "Korean", "lt": "Lithuanian", "lv": "Latvian", "ml": "Malayalam",
    "mr": "Marathi", "ms": "Malay", "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese",
    "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "yo": "Yoruba", "zh": "Chinese",
}  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """The first lines.

    Attributes:
        sentences: What is to be quoted, and what is to be said beside it.
        search: A query whose first answer was wrong before and is right after, with its language; None where there is
            none.
    """

    sentences: Sequence[str]
    search: tuple[ShownChange, str | None] | None


def names_of_collections(evaluation: Evaluation) -> dict[str, str]:
    """Key to what people call the collection: its language, where no other has the same; else the key."""
    languages = [result.language for result in evaluation.results.values()]
    return {
        key: LANGUAGES[result.language]
        if result.language in LANGUAGES and languages.count(result.language) == 1 and not result.pooled
        else result.label
        for key, result in evaluation.results.items()
    }


def sentence_of_scores(evaluation: Evaluation, metric: str, mean: float, names: Mapping[str, str]) -> str:
    """What one evaluation found."""
    where = f"on {next(iter(names.values()))}" if len(names) == 1 else f"in the mean of {_listed(names.values())}"
    return f"{evaluation.model} reaches {_written(metric)} {mean:.3f} {where}."


def sentences_of_comparison(found: Comparison, names: Mapping[str, str]) -> list[str]:
    """What a comparison found: the whole of it, then who gained least and who lost."""
    whole = found.differences[-1]
    parts = [difference for difference in found.differences if not difference.is_mean]
    where = f"on {names[parts[0].key]}" if len(parts) == 1 else f"in the mean of {_listed(names[p.key] for p in parts)}"
    sentences = [
        f"{found.after} reaches {_written(found.metric)} {whole.after:.3f} {where}, where {found.before} reaches "
        f"{whole.before:.3f}: {_change(whole)} (95 % interval {whole.low:+.3f} to {whole.high:+.3f}, {_p(whole.p)})."
    ]
    if whole.p >= 0.05:
        sentences.append("So large a difference may be chance.")
    if len(parts) > 1:
        sentences.append(_extremes(parts, names))
    return sentences


def _extremes(parts: Sequence[Difference], names: Mapping[str, str]) -> str:
    lost = [part for part in parts if part.difference < 0]
    least = min(parts, key=lambda part: part.difference)
    most = max(parts, key=lambda part: part.difference)
    if lost:
        said = _listed(f"{names[part.key]} ({part.difference:+.3f}, {_p(part.p_adjusted)})" for part in lost)
        gained = f"; {names[most.key]} gained most ({most.difference:+.3f})" if most.difference > 0 else ""
        return f"{said} lost{gained}."
    return (
        f"{names[most.key]} gained most ({most.difference:+.3f}), {names[least.key]} least ({least.difference:+.3f}); "
        "none lost."
    )


def best_search(changes: Sequence[ShownChange]) -> ShownChange | None:
    """The first of these whose best answer was not judged relevant before, and is after; with both texts at hand."""
    for item in changes:
        first, now = item.first_before, item.first_after
        if item.query is None or first is None or now is None or first.text is None or now.text is None:
            continue
        if (now.grade or 0) > 0 and not (first.grade or 0) > 0:
            return item
    return None


def _listed(names: Iterable[str]) -> str:
    every = list(names)
    if len(every) > 6:
        return f"{len(every)} collections"
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} and {every[-1]}"


def _change(difference: Difference) -> str:
    return f"{difference.difference:+.3f}"


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _written(metric: str) -> str:
    """``ndcg@10`` as people write it."""
    family, _, cut = metric.partition("@")
    known = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP", "recall": "Recall", "p": "P"}
    return f"{known.get(family, family)}@{cut}"
