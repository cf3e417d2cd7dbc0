"""Spoilt models, embedding stores, evaluations, runs, mined rows and stores of queries."""

from __future__ import annotations

import json
import pickle
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import DEEP, Case, Place, cut, edit_json, one
from processes import command

Spoil = Callable[[Path], Any]


def _writing(file: str, content: str) -> Spoil:
    return lambda folder: (folder / file).write_text(content)


def _editing(file: str, **changed: Any) -> Spoil:
    return lambda folder: edit_json(folder / file, **changed)


def _cutting(file: str, size: int) -> Spoil:
    return lambda folder: cut(folder / file, size)


# models


def _model(name: str, spoil: Spoil, message: str) -> Case:
    def build(place: Place) -> list[str]:
        model = place.copy("model")
        spoil(model)
        return place.evaluate(model=model)

    return Case(name, build, message)


def _no_tokenizer(model: Path) -> None:
    for path in [*model.glob("*token*"), *model.glob("vocab*")]:
        path.unlink()


def _wrong_shape(model: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("intermediate.dense.weight"))
    save_file({**weights, name: weights[name][:5].contiguous()}, model / "model.safetensors", {"format": "pt"})


def _unsafe_pickle(model: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": print}))


# embedding stores


def _documents(folder: Path) -> Path:
    """The store of the documents among those below a folder."""
    return next(path.parent for path in folder.rglob("manifest.json") if "queries" not in path.parent.name)


def _store(name: str, spoil: Spoil, message: str, action: str = "verify", *, code: int = 1) -> Case:
    """``st-clp store`` on a spoilt one."""

    def build(place: Place) -> list[str]:
        folder = place.copy("evaluation") / "embeddings"
        spoil(_documents(folder))
        return ["store", action, str(folder)]

    return Case(name, build, message, code=code)


def _shards(**changed: Any) -> Spoil:
    def spoil(store: Path) -> None:
        lines = [json.loads(line) for line in (store / "shards.jsonl").read_text().splitlines()]
        (store / "shards.jsonl").write_text("".join(json.dumps({**line, **changed}) + "\n" for line in lines))

    return spoil


def _flip(store: Path) -> None:
    content = bytearray((store / "embeddings.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (store / "embeddings.bin").write_bytes(content)


def _used(name: str, spoil: Callable[[Path, Place], Any]) -> Case:
    """The command that made an evaluation, given again over its spoilt embeddings: the figures are the same."""

    def build(place: Place) -> Callable[[], None]:
        folder = place.copy("evaluation")
        spoil(_documents(folder), place)
        scores = json.loads((folder / "evaluation.json").read_text())["collections"].popitem()[1]["scores"]
        argv = place.evaluate(place.materials.collection)
        argv[argv.index("--output") + 1] = str(folder)

        def work() -> None:
            try:
                command(argv)()
            finally:
                print(f"expected {scores['ndcg@10']:.4f}")

        return work

    return Case(name, build, r" 0?(\.\d{4}) .*expected 0?\1", code=0)


def _of_another_model(store: Path, place: Place) -> None:
    """Another model's embeddings and list of shards, whole, under this one's manifest."""
    for file in (
        path for path in _documents(place.materials.other_evaluation).iterdir() if path.name != "manifest.json"
    ):
        shutil.copy(file, store)


# evaluations and runs


def _compared(name: str, spoil: Spoil, message: str, *, subcommand: str = "compare") -> Case:
    def build(place: Place) -> list[str]:
        folder = place.copy("evaluation")
        spoil(folder)
        more = ("-o", str(place.folder / "report.html")) if subcommand == "report" else ()
        return [subcommand, str(place.materials.evaluation), str(folder), *more]

    return Case(name, build, message)


def _other_collection(folder: Path) -> None:
    key, value = json.loads((folder / "evaluation.json").read_text())["collections"].popitem()
    edit_json(folder / "evaluation.json", collections={f"{key}_x": value})


def _report_of_a_run(place: Place) -> list[str]:
    run = place.copy("run")
    (run / "report.json").write_text("{")
    return ["report", str(run), "-o", str(place.folder / "x.html")]


def _resumed(name: str, spoil: Spoil, message: str, *, code: int = 0) -> Case:
    """A run that goes on from a spoilt folder."""

    def build(place: Place) -> list[str]:
        folder = place.copy("run")
        spoil(folder)
        return ["run", "--output", str(folder), "--resume"]

    return Case(name, build, message, code=code)


def _untrained(folder: Path) -> Path:
    """Forget what came after mining; the mined rows."""
    for stage in ("train", "evaluate-after"):
        (folder / "run" / "stages" / f"{stage}.json").unlink()
    return one(folder / "run" / "mined", "*.jsonl")


def _cut_rows(folder: Path) -> None:
    rows = _untrained(folder)
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:20]))


def _gone_weights(folder: Path) -> None:
    (folder / "run" / "stages" / "evaluate-after.json").unlink()
    (folder / "model.safetensors").unlink()


def _half_begun(name: str, message: str, *more: str) -> Case:
    """After a start that met a full disk: there is a settings file without settings."""

    def build(place: Place) -> list[str]:
        place.write("out/run/settings.yaml", "")
        return place.run("--experts", "0", *more)

    return Case(name, build, message, code=0)


# stores of queries, and mined rows


def _query_store(name: str, make: Callable[[Place, Path], Any], message: str) -> Case:
    def build(place: Place) -> list[str]:
        store = place.folder / "q.sqlite"
        make(place, store)
        given = ("--negative-queries", "openai:tiny", "--query-base-url", "http://127.0.0.1:9/v1")
        return place.queries(*given, store=store)

    return Case(name, build, message)


def _foreign_database(place: Place, store: Path) -> None:
    with sqlite3.connect(store) as database:
        database.execute("CREATE TABLE answers (name TEXT)")
        database.execute("CREATE TABLE photographs (name TEXT)")


def _damaged_database(place: Place, store: Path) -> None:
    content = bytearray(place.materials.queries.read_bytes())
    for begin in range(4096, len(content), 4096):
        content[begin : begin + 2000] = b"\xff" * len(content[begin : begin + 2000])
    store.write_bytes(content)


def _mined_rows(name: str, message: str, **changed: Any) -> Case:
    def build(place: Place) -> list[str]:
        rows = one(place.copy("mined"), "*.jsonl")
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        lines[1] = {name: value for name, value in {**lines[1], **changed}.items() if value != "removed"}
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        given = ("--collection", str(place.materials.collection), "--rows", str(rows), "--negative-queries", "title")
        return ["queries", *given, "--query-store", str(place.folder / "q.sqlite")]

    return Case(name, build, message)


FOREIGN_MODULE = '[{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]'
EVALUATION, STAGES = "evaluation.json", "run/stages"
CASES = [
    Case("a model that is not there", lambda p: p.evaluate(model=Path("/nowhere")), "there is no folder /nowhere"),
    Case("a model that is a file", lambda p: p.evaluate(model=p.write("m", "x")), "cannot be loaded"),
    Case("a model folder that is empty", lambda p: p.evaluate(model=p.folder), "cannot be loaded"),
    _model("a model without its tokenizer", _no_tokenizer, "tokenizer"),
    _model("weights that are cut off", _cutting("model.safetensors", 5000), "cannot be loaded"),
    _model("weights of a wrong shape", _wrong_shape, "cannot be loaded.*(shape|size)"),
    _model("weights in no safe pickle", _unsafe_pickle, "cannot be loaded"),
    _model("no weights", lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    _model("modules.json of the wrong kind", _writing("modules.json", "7"), r"modules\.json"),
    _model("modules.json with a text for a module", _writing("modules.json", '["x"]'), r"modules\.json"),
    _model("modules.json that is no JSON", _writing("modules.json", "["), r"modules\.json"),
    _model("modules.json nested too deep", _writing("modules.json", DEEP), r"modules\.json"),
    _model("a module of somebody's", _writing("modules.json", FOREIGN_MODULE), "evil.Module.*was not loaded"),
    _model("config.json that is no JSON", _writing("config.json", "{"), "cannot be loaded"),
    Case("a store that is not there", lambda p: ["store", "ls", str(p.folder)], "holds no embedding store"),
    _store("a shard of -5 rows", _shards(rows=-5), r"shards\.jsonl|damaged|rows"),
    _store("a shard of a billion rows", _shards(rows=10**12), r"shards\.jsonl|damaged|rows"),
    _store("a shard of many rows", _shards(rows="many"), r"shards\.jsonl|damaged|missing|rows"),
    _store("a store of -1 dimensions", _editing("manifest.json", dim=-1), "dim"),
    _store("a store of -1 dimensions, listed", _editing("manifest.json", dim=-1), "damaged", "ls", code=0),
    _store("a store of pickles", _editing("manifest.json", dtype="pickle"), "dtype|pickle"),
    _store("a store with 100 times the documents", _editing("manifest.json", documents=9000), "missing|9,?000"),
    _store("a store with fewer documents", _editing("manifest.json", documents=9), r"\b9\b|more|damaged"),
    _store("a store without a model", _editing("manifest.json", model=None), "model"),
    _store("a store whose manifest is no JSON", _writing("manifest.json", "{"), r"manifest\.json|no embedding store"),
    _store("a store with a flipped bit", _flip, "damaged.*do not match their checksum"),
    _store("a store that is cut off", _cutting("embeddings.bin", 1000), "damaged"),
    _used("a store with a flipped bit, used", lambda store, _: _flip(store)),
    _used("a store of wrong dimensions, used", lambda store, _: edit_json(store / "manifest.json", dim=7)),
    _used("a store of another model's embeddings, used", _of_another_model),
    Case("no evaluation", lambda p: ["compare", str(p.materials.evaluation), str(p.folder)], "holds no evaluation"),
    Case("one evaluation", lambda p: ["compare", str(p.materials.evaluation)], "needs two evaluations"),
    _compared("an evaluation that is no JSON", _writing(EVALUATION, "{"), r"evaluation\.json"),
    _compared("an evaluation that is a list", _writing(EVALUATION, "[]"), r"evaluation\.json"),
    _compared("an evaluation nested too deep", _writing(EVALUATION, DEEP), r"evaluation\.json.*nested too deep"),
    _compared("an evaluation of a later format", _editing(EVALUATION, format=99), r"evaluation\.json has format 99"),
    _compared("an evaluation of collections in a list", _editing(EVALUATION, collections=[1]), r"evaluation\.json"),
    _compared("an evaluation of metrics 7", _editing(EVALUATION, metrics=7), r"evaluation\.json.*metrics"),
    _compared("an evaluation whose model is a list", _editing(EVALUATION, model=[1]), r"evaluation\.json.*model"),
    _compared("an evaluation without metrics", _editing(EVALUATION, metrics=[]), "metrics|has no ndcg"),
    _compared("an evaluation without its scores", lambda f: one(f / "scores", "*.csv").unlink(), r"\.csv is missing"),
    _compared("scores that are cut off", lambda f: cut(one(f / "scores", "*.csv"), 300), "broken|queries are only in"),
    _compared("an evaluation of another collection", _other_collection, "the collections differ"),
    _compared("a report of no JSON", _writing(EVALUATION, "{"), r"evaluation\.json", subcommand="report"),
    _compared("a report of listed settings", _editing(EVALUATION, settings=[1]), "settings", subcommand="report"),
    Case(
        "a metric that was not evaluated",
        lambda place: ["compare", str(place.materials.run), "--metric", "map@7"],
        "has no map@7; it has ndcg@10",
    ),
    Case("a report of a run whose report is no JSON", _report_of_a_run, r"report\.json"),
    _resumed("mined rows that were cut off at a line's end", _cut_rows, r"[Mm]ine|\.jsonl"),
    _resumed("mined rows that are gone", lambda folder: _untrained(folder).unlink(), r"[Mm]ine|\.jsonl"),
    _resumed("weights that are gone", _gone_weights, "[Tt]rain"),
    _resumed("a stage of the wrong kind", _writing(f"{STAGES}/mine.json", '{"accounts": 7}'), r"mine\.json|[Mm]ine"),
    _resumed("a stage that is a list", _writing(f"{STAGES}/train.json", "[7]"), r"train\.json"),
    _resumed("a stage nested too deep", _writing(f"{STAGES}/train.json", DEEP), r"train\.json"),
    _resumed("settings of a run that are no YAML", _writing("run/settings.yaml", "["), r"settings\.yaml", code=1),
    _half_begun("a start that met a full disk, started again", "Saved in|--overwrite"),
    _half_begun("a start that met a full disk, resumed", "Saved in", "--resume"),
    Case("a search with half a surrogate", lambda p: ["search", str(p.materials.run), "caf\udce9"], "half|UTF-8"),
    Case("a search in a folder without a run", lambda p: ["search", str(p.folder), "x"], "holds no finished run"),
    Case(
        "a search in a corpus that is not there",
        lambda place: ["search", str(place.materials.run), "x", "--corpus", "nope"],
        "has no corpus nope",
    ),
    _query_store("text as a store of queries", lambda p, s: s.write_text("text " * 2000), "is no store of queries"),
    _query_store("a store of queries that is a folder", lambda p, s: s.mkdir(), "q.sqlite cannot be used"),
    _query_store("somebody's SQLite file as a store of queries", _foreign_database, "q.sqlite.*is no store of queries"),
    _query_store("a damaged store of queries", _damaged_database, "q.sqlite.*(damaged|no store of queries|malformed)"),
    _mined_rows("mined rows whose neg is null", r"\.jsonl, line 2\b", neg=None),
    _mined_rows("mined rows without neg_id", r"\.jsonl, line 2\b.*neg_id", neg_id="removed"),
    _mined_rows("mined rows whose neg is a number", r"\.jsonl, line 2\b", neg=7),
]
