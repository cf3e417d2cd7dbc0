"""What importing costs and needs, and which module may import which."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import evaluators
import st_clp


def in_fresh_process(code: str) -> dict:
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def test_import_is_light_and_every_public_name_loads() -> None:
    found = in_fresh_process(
        "import sentence_transformers, sys, time, json\n"
        "before = set(sys.modules); started = time.process_time(); import st_clp\n"
        "spent = time.process_time() - started; new = set(sys.modules) - before\n"
        "names = {name: type(getattr(st_clp, name)).__name__ for name in st_clp.__all__}\n"
        "print(json.dumps({'seconds': spent, 'new': sorted(new), 'names': names}))"
    )
    assert found["seconds"] < 1
    assert not {"faiss", "beir", "ir_datasets", "typer", "babel", "datasets"} & set(found["new"])
    assert found["names"]["CLPLoss"] == "type"


def test_loss_and_mixture_work_where_faiss_beir_and_ir_datasets_are_missing(tiny_model_path: str) -> None:
    found = in_fresh_process(
        "import sys, json\n"
        "for name in ('faiss', 'beir', 'ir_datasets', 'typer', 'babel', 'pytrec_eval'): sys.modules[name] = None\n"
        "from st_clp import CLPLoss, upcycle, train_only\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"model = SentenceTransformer({str(tiny_model_path)!r}, device='cpu')\n"
        "upcycle(model); train_only(model, 'moe')\n"
        "columns = [model.preprocess([text, text]) for text in ('a river', 'the river', 'a lake', 'which lake')]\n"
        "loss = CLPLoss(model)(columns, None); loss.backward()\n"
        "print(json.dumps({'loss': float(loss)}))"
    )
    assert found["loss"] > 0


def test_the_process_that_mines_beside_listens_before_it_reads_libraries() -> None:
    found = in_fresh_process(
        "import json, sys; from st_clp.refresh.worker import main; print(json.dumps({'modules': sorted(sys.modules)}))"
    )
    assert not {"torch", "numpy", "transformers", "sentence_transformers", "datasets"} & set(found["modules"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'CLPLos'"):
        _ = st_clp.CLPLos


# The house: a room may import from itself, from the rooms named here, and from all that are below those.
BELOW: Mapping[str, set[str]] = {
    "commands": {"run"},
    "run": {"refresh", "evaluators", "losses", "moe"},
    "refresh": {"mining"},
    "mining": {"queries"},
    "queries": {"search"},
    "evaluators": {"search"},
    "search": {"encoding"},
    "encoding": {"data", "distributed"},
    "distributed": {"leaves"},
    "data": {"leaves"},
    "losses": {"leaves"},
    "moe": {"leaves"},
    "leaves": set(),
}
# What is in a room. A package stands for everything in it that is not named itself.
ROOMS: Mapping[str, str] = {
    "commands": "cli __main__",
    "run": "run recipe",
    "refresh": "refresh",
    "mining": "mining",
    "queries": "queries mining.negative_queries",
    "search": "search",
    "encoding": "encoding",
    "distributed": "distributed",
    "data": "data",
    "losses": "losses",
    "moe": "moe",
    "leaves": "declaring extras files memory option_values options settings terminal",
}
ROOM_OF = {
    "st_clp": "leaves",  # the package itself: its version
    "evaluators": "evaluators",
    **{f"st_clp.{name}": room for room, names in ROOMS.items() for name in names.split()},
}


def product_modules() -> dict[str, Path]:
    """Every module of ours, and its file."""
    modules = {}
    for package in (evaluators, st_clp):
        folder = Path(package.__file__).parent
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder.parent).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return modules


def imported_by(node: ast.AST) -> Iterator[str]:
    """The modules and names that are imported anywhere below a node, but for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            yield from imported_by(ast.Module(child.orelse, []))
        elif isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name the whole module"
            yield from (f"{child.module}.{name.name}" for name in child.names)
        else:
            yield from imported_by(child)


@pytest.fixture(scope="module")
def imports() -> set[tuple[str, str]]:
    """(importing module, imported module), of ours alone."""
    modules = product_modules()
    found = set()
    for module, file in modules.items():
        for name in imported_by(ast.parse(file.read_text(encoding="utf-8"))):
            # A name that is no module is something in the module that it is imported from.
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                found.add((module, target))
    return found


def test_no_two_files_have_one_name() -> None:
    """So that a name in a traceback or an editor's tab says which file it is."""
    names = [file.name for module, file in product_modules().items() if module.startswith("st_clp")]
    files = [name for name in names if not name.startswith("__")]
    assert sorted(name for name in set(files) if files.count(name) > 1) == []


def room_of(module: str) -> str:
    parts = module.split(".")
    places = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    place = next(place for place in places if place in ROOM_OF)
    assert place != "st_clp" or module == "st_clp", f"say in ROOMS which room {module} is in"
    return ROOM_OF[place]


def rooms_below(room: str) -> set[str]:
    return BELOW[room].union(*(rooms_below(lower) for lower in BELOW[room]))


def upward(imports: set[tuple[str, str]]) -> set[tuple[str, str]]:
    pairs = {(importing, imported): (room_of(importing), room_of(imported)) for importing, imported in imports}
    return {pair for pair, (room, other) in pairs.items() if other not in rooms_below(room) | {room}}


def circle(imports: set[tuple[str, str]]) -> list[str] | None:
    """Modules that import one another in a circle, if there are any."""
    graph: dict[str, set[str]] = {}
    for importing, imported in imports:
        graph.setdefault(importing, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_no_module_imports_from_a_room_above_or_beside_its_own(imports) -> None:
    assert upward(imports) == set()


def test_no_modules_import_one_another_in_a_circle(imports) -> None:
    assert circle(imports) is None


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["evaluate", "--help"], ["run", "--epoch", "1"]])
def test_help_and_wrong_options_wait_for_no_library(arguments: list[str]) -> None:
    found = in_fresh_process(
        "import json, sys; from st_clp import cli\n"
        f"sys.argv = ['st-clp', *{arguments!r}]\n"
        "try: cli.main()\n"
        "except SystemExit as ending: status = ending.code\n"
        "print(json.dumps({'status': status, 'modules': sorted(sys.modules)}))"
    )
    assert found["status"] == (0 if "--help" in arguments else 2)
    heavy = {"torch", "transformers", "sentence_transformers", "numpy", "pandas", "datasets", "faiss", "beir", "scipy"}
    assert not heavy & set(found["modules"])
    assert len(found["modules"]) < 500  # typer and rich are 300 of them


def test_every_module_can_be_imported_and_says_nothing() -> None:
    """As tools for documentation do, and whoever looks around."""
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code, *product_modules()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
