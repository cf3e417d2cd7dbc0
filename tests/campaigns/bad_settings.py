"""Bad settings, training arguments, configuration files, output folders and terminals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cases import DEEP, Case, Place, as_nobody, with_small_files


def _run(name: str, message: str, *more: str, **options: Any) -> Case:
    return Case(name, lambda place: place.run(*more), message, **options)


def _training_arg(value: str, message: str) -> Case:
    return _run(f"--training-arg {value}", message, "--training-arg", value)


def _config(name: str, content: str | bytes, message: str) -> Case:
    def build(place: Place) -> list[str]:
        # Without a collection of its own, so that the file's is read.
        given = ("--model", str(place.materials.model), "--output", str(place.out))
        return ["run", *given, "--config", str(place.write("run.yaml", content))]

    return Case(f"a configuration {name}", build, message)


def _evaluated(name: str, message: str, *more: str) -> Case:
    return Case(name, lambda place: place.evaluate(None, *more), message)


def _mined_into(name: str, message: str, **options: Any) -> Case:
    return Case(
        f"an output folder called {name!a}",
        lambda place: place.mine(output=place.folder / name),
        message,
        **options,
    )


def _terminal(name: str, message: str, **options: Any) -> Case:
    return Case(f"a terminal {name}", lambda place: ["compare", str(place.materials.run)], message, code=0, **options)


def _numbers_in_yaml(place: Place) -> list[str]:
    settings = "learning_rate: 2e-5\nscale: 2e1\ntraining_arg:\n  weight_decay: 1e-2\n  adam_epsilon: 1e-6\n"
    return place.run("--config", str(place.write("run.yaml", settings)), "--experts", "0")


def _foreign(place: Place) -> list[str]:
    place.write("out/thesis.tex", "years of work")
    return place.run("--overwrite")


def _file(place: Place) -> list[str]:
    place.write("out", "a file")
    return place.run()


def _closed(place: Place) -> list[str]:
    (place.folder / "closed").mkdir(mode=0o755)
    (place.materials.model / "model.safetensors").chmod(0o644)
    return place.mine(place.beir(), output=place.folder / "closed" / "out")


def _finished_run(place: Place, *more: str) -> list[str]:
    return place.run("--epochs", "0.5", *more, output=place.copy("run"))


CASES = [
    _training_arg("logging_dir=[", r"training.arg.*'?\["),
    _training_arg("[", "NAME=VALUE"),
    _training_arg("max_steps=x", "max_steps.*x"),
    _training_arg("max_steps=!!python/name:os.system", "training.arg"),
    _training_arg("weight_decoy=1", "did you mean weight_decay"),
    _training_arg("save_strategy=sometimes", "sometimes"),
    _run("a seed below 0", "seed must be", "--seed", "-1"),
    _run("a seed of 41 bits", "seed must be", "--seed", str(2**40)),
    _run("an infinite learning rate", "learning_rate must be", "--learning-rate", "inf"),
    _run("a learning rate of NaN", "learning_rate must be", "--learning-rate", "nan"),
    _run("an infinite scale", "scale must be", "--scale", "inf"),
    _run("infinitely many epochs", "epochs must be", "--epochs", "inf"),
    _run("a penalty weight of 2", "penalty_weight must be at least 0 and at most 1", "--penalty-weight", "2"),
    _run("a holdout of all", "holdout must be", "--holdout", "0.95"),
    _run("one expert", "a mixture needs at least two experts", "--experts", "1"),
    _run(
        "more experts a token than there are",
        "no fewer than each token goes to",
        "--experts",
        "2",
        "--experts-per-token",
        "3",
    ),
    _run("experts a token without experts", "give their number as experts", "--experts-per-token", "3"),
    _run("a projection for no experts", "name them with train", "--projection", "output"),
    _run("range_min beyond range_max", "range_min", "--range-min", "100"),
    _run("a refresh now and then", "refresh_every must be a number of steps", "--refresh-every", "sometimes"),
    _run("a refresh beside training without one", "refresh_async needs refresh_every", "--refresh-async"),
    _run("a choice that is none", "'cosinus' is not one of", "--penalty", "cosinus", code=2),
    _run("a number that is none", "'many' is not a valid int|valid integer", "--batch-size", "many", code=2),
    Case("an index that is none", lambda p: p.mine(None, "--index", "IVFx"), "index.*IVFx|IVFx.*index", leaves=True),
    Case("no collection", lambda p: ["run", "--model", "x", "--output", str(p.out)], "no collection: give"),
    Case("resuming nothing", lambda p: ["run", "--output", str(p.out), "--resume"], "holds no run to resume"),
    _run("a configuration that is not there", "/nowhere.yaml is not there", "--config", "/nowhere.yaml"),
    _run("a configuration that is a folder", "(directory|folder)", "--config", "/tmp"),
    _config("that is a list", "- 1\n", "run.yaml must hold settings"),
    _config("that is empty", "", "run.yaml must hold settings"),
    _config("that is no YAML", "scale: [", "run.yaml is no valid YAML"),
    _config("that is not UTF-8", b"model: caf\xe9\n", "run.yaml.*UTF-8"),
    _config("with a tag", "scale: !!python/object/apply:os.getcwd []\n", "run.yaml is no valid YAML"),
    _config("nested too deep", "scale: " + DEEP, "run.yaml.*(nested|deep)"),
    _config("with an unknown setting", "num_negative: 3\n", "no setting 'num_negative'; did you mean num_negatives"),
    _config("with a text for a number", "batch_size: many\n", "batch_size must be.*'many'"),
    _config("with a truth for a number", "experts: true\n", "experts must be.*True"),
    _config("whose collection is a number", "collection: [7]\n", "collection must be.*7"),
    Case("numbers with an exponent", _numbers_in_yaml, "Saved in", code=0),
    _evaluated("a metric that is none", "ndgc", "--metric", "ndgc@10"),
    _evaluated("a metric cut at 0", "ndcg@0", "--metric", "ndcg@0"),
    _evaluated("two run files, one collection", "and 2 --from-run|not both", "--from-run", "a", "--from-run", "b"),
    Case("an output folder that is somebody's", _foreign, "out exists and is not the folder of a run", leaves=True),
    Case("an output folder that is a file", _file, "out (exists|is)", leaves=True),
    Case(
        "an output folder of a run begun otherwise",
        lambda place: _finished_run(place, "--num-negatives", "3", "--resume"),
        "num_negatives was 1, now 3",
    ),
    Case("an output folder of a finished run", _finished_run, "go on with it by --resume, replace it by --overwrite"),
    Case("an output folder where none can be", lambda place: place.run(output=Path("/proc/out")), "/proc/out"),
    Case("an output folder that may not be written", _closed, "Permission denied: .*closed", setup=as_nobody),
    _mined_into("[/b]", r"written: \S+/\[/b\]/", code=0),
    _mined_into("[red]x", r"written: \S+/\[red\]x/", code=0),
    _mined_into("caf\udce9", "is not valid UTF-8"),
    Case(
        "a full disk",
        lambda place: place.mine(),
        "(File too large|No space left).*same command",
        leaves=True,
        setup=with_small_files,
    ),
    _terminal("that is not UTF-8", "ndcg@10.*before.*after", encoding="cp1252"),
    _terminal("of ASCII", "ndcg@10.*before.*after", encoding="ascii"),
    _terminal("of 80 columns", r"[+-]\.\d{4}.*\d+/\d+/\d+", environment={"COLUMNS": "80"}),
    _run(
        "a run on a terminal of 80 columns that is not UTF-8",
        r"(\.\d{3} -> [.1].*){4}Saved in",
        *("--experts", "0"),
        code=0,
        encoding="cp1252",
        environment={"COLUMNS": "80"},
    ),
]
