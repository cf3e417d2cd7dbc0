"""A run's report: the table in the terminal, ``report.json``, and the model card."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from st_clp.files import write_text
from st_clp.losses.document_batches import QUERIES_PER_DOCUMENT
from st_clp.options import DEFAULT_METRICS
from st_clp.settings import RunSettings
from st_clp.terminal import NARROWEST, print_whole

TITLES = {"ndcg@10": "nDCG@10", "ndcg@5": "nDCG@5", "recall@100": "Recall@100", "mrr@10": "MRR@10"}

Scores = Mapping[str, Mapping[str, float]]

HEADING = "## How it was fine-tuned"  # of our part of the model card


def machine() -> dict[str, Any]:
    """A description of the machine."""
    accelerators = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "accelerators": accelerators}


def mean_score(scores: Scores, metric: str) -> float:
    """The mean over collections, each with the same weight."""
    return sum(values[metric] for values in scores.values()) / len(scores)


def score_rows(before: Scores, after: Scores) -> list[list[str]]:
    """For each collection, and for all, the scores before and after: ``0.123 → 0.456``."""
    rows = []
    names: list[str | None] = list(after)
    for name in [*names, *([None] if len(names) > 1 else [])]:
        cells = [name or "mean"]
        for metric in DEFAULT_METRICS:
            old = mean_score(before, metric) if name is None else before[name][metric]
            new = mean_score(after, metric) if name is None else after[name][metric]
            cells.append(f"{old:.3f} → {new:.3f}")
        rows.append(cells)
    return rows


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Shorten names to the collection's folder and split, or as much more as makes them distinct."""
    found = {}
    for name in names:
        parts = name.split("/")
        ends = ("/".join(parts[-number:]) for number in range(2, len(parts) + 1))
        apart = (end for end in ends if sum(f"/{other}".endswith(f"/{end}") for other in names) == 1)
        found[name] = next(apart, name)
    return found


def print_scores(console: Console, before: Scores, after: Scores) -> None:
    """Print the table in the terminal."""
    table = Table(title="Before → after fine-tuning", title_justify="left", title_style="bold")
    table.add_column("collection", overflow="fold", min_width=NARROWEST)
    for metric in DEFAULT_METRICS:
        table.add_column(TITLES[metric], justify="right", no_wrap=True)
    rows = score_rows(before, after)
    shown = short_names(list(after))
    for number, row in enumerate(rows):
        # Without the zeros before the points the table fits into 80 columns.
        table.add_row(
            escape(shown.get(row[0], row[0])),
            *(cell.replace("0.", ".") for cell in row[1:]),
            end_section=number == len(rows) - 2 and len(rows) > 1,
        )
    print_whole(console, table)


def write_card(
    folder: Path,
    settings: RunSettings,
    report: Mapping[str, Any],
    languages: list[str],
) -> None:
    """Complete the model card that sentence-transformers wrote: method, data, settings and scores.

    Args:
        folder: The saved model; its README.md is rewritten.
        settings: The run's settings.
        report: The run's report.
        languages: Languages of the collections, ISO 639 codes.
    """
    from huggingface_hub import EvalResult, ModelCard

    path = folder / "README.md"
    card = ModelCard.load(path)
    card.data.model_name = folder.resolve().name
    if languages:
        card.data.language = languages
    card.data.tags = sorted({*(card.data.tags or []), "st_clp"})
    card.data.eval_results = [
        EvalResult(
            task_type="information-retrieval",
            task_name="Information Retrieval",
            dataset_type=name,
            dataset_name=name,
            metric_type=metric.replace("@", "_at_"),
            metric_name=TITLES[metric],
            metric_value=values[metric],
        )
        for name, values in report["scores"]["after"].items()
        for metric in DEFAULT_METRICS
    ]
    section = _card_section(settings, report)
    head, separator, rest = card.text.partition("\n## Model Details")
    head = head.partition(f"\n{HEADING}")[0]  # of a run that was stopped after it had written its card
    card.text = f"{head.rstrip()}\n\n{section}\n{separator}{rest}"
    write_text(path, str(card))


def _loss(settings: RunSettings) -> str:
    temperature = f"temperature {1 / settings.scale:g}"
    if settings.of_documents:
        return f"in batches that have each of them with the queries it does answer ({temperature})"
    return (
        "with a penalty that keeps each of them near the queries it does answer (weight "
        f"{settings.penalty_weight:g}, {temperature})"
    )


def _batches_line(settings: RunSettings, trained_on: Mapping[str, Any]) -> list[str]:
    if not settings.of_documents:
        return []
    made = sum(described["made_of_sentences"] for described in trained_on.values())
    last = ", and the queries that were asked once more after them" if made else ""
    return [
        "- Batches: documents that are near one another, by what was mined, each with up to "
        f"{QUERIES_PER_DOCUMENT} of its queries; {made:,} queries made of their sentences{last}"
    ]


def _averaged_line(averaged: Mapping[str, Any] | None) -> list[str]:
    if averaged is None:
        return []
    chosen = f", chosen by {averaged['queries']} training queries held out" if averaged["scores"] else ""
    return [f"- Weights: {averaged['share']:.0%} the trained ones, the rest the base model's{chosen}"]


def _card_section(settings: RunSettings, report: Mapping[str, Any]) -> str:
    trained = report["training"]
    is_mixture = report.get("expert_usage") is not None
    if settings.experts:
        mixture = f"a mixture of {settings.experts} experts in every layer's {settings.projection} projection, "
        mixture += f"{settings.experts_per_token} for each token"
    else:
        mixture = "the mixture of experts that the base model is" if is_mixture else "no mixture of experts"
    lines = [
        HEADING,
        "",
        "With [st_clp](https://pypi.org/project/st-clp/), after "
        "[Contrastive Learning Penalty (CLP)](https://arxiv.org/abs/2412.17364): hard negatives that the model mined "
        f"itself, a contrastive loss {_loss(settings)}, and {mixture}.",
        "",
        f"- Base model: `{settings.model}`",
        f"- Trained on: {', '.join(f'`{name}`' for name in report['collections']['train'])}",
        f"- Trained parameters: {trained['trainable_parameters']:,} of {trained['all_parameters']:,} "
        f"(`{trained.get('what', settings.what_trains)}`)",
        f"- Epochs {settings.number_of_epochs:g}, batch size {settings.rows_in_batch}, learning rate "
        f"{settings.peak_learning_rate:g}, seed {settings.seed}",
        *_averaged_line(trained.get("averaged")),
        f"- Hard negatives: {settings.num_negatives} a query, from ranks {settings.range_min} to {settings.range_max}",
        *_batches_line(settings, report["collections"]["train"]),
        "",
        "Scores before → after:",
        "",
        "| collection | " + " | ".join(TITLES[metric] for metric in DEFAULT_METRICS) + " |",
        "|---|" + "---|" * len(DEFAULT_METRICS),
    ]
    rows = score_rows(report["scores"]["before"], report["scores"]["after"])
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    opening = "st_clp.load(path)" if is_mixture else "SentenceTransformer(path)"
    lines += ["", f"Open it with `{opening}`. Every setting, version, count and time is in `report.json`.", ""]
    return "\n".join(lines)
