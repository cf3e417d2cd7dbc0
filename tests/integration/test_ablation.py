"""``st-clp ablation``: equal conditions for every variant, what is done kept, and figures that mean what they say."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from evaluators.evaluation import read_evaluation
from st_clp import CachedCLPLoss, CLPLoss, Collection, cli, upcycle
from st_clp.data import CollectionError
from st_clp.losses.host_texts import KEY
from st_clp.mining import TrainingRow, mine, to_dataset
from st_clp.options import MiningOptions
from st_clp.run.ablation import ablate, default_variants, read_variants
from st_clp.run.ablation import loop as loop_module
from st_clp.run.ablation import study as study_module
from st_clp.run.ablation.loop import train
from st_clp.run.ablation.table import _gains
from st_clp.run.modelling import prepare_model
from st_clp.run.training import make_trainer
from st_clp.settings import RunSettings, SettingsError

from .test_run import settings_of


@pytest.fixture
def settings(tiny_model_path: Path, collection_path: Path, tmp_path: Path) -> RunSettings:
    return dataclasses.replace(
        settings_of(tiny_model_path, collection_path, tmp_path / "out", epochs=1, training_arg={}), learning_rate=None
    )


def scores_of(folder: Path) -> dict[str, Any]:
    rows = json.loads((folder / "table.json").read_text())["rows"]
    return {row["name"]: row["scores"] for row in rows}


@pytest.mark.parametrize("mini_batch_size", [None, 16])
@pytest.mark.parametrize("experts", [0, 2])
def test_the_loop_trains_as_the_trainer_does(
    tiny_model: SentenceTransformer,
    collection_path: Path,
    tmp_path: Path,
    experts: int,
    mini_batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With all rows in one batch their order does not matter, and nothing else is drawn."""
    told: list[bool] = []
    loss_class = CLPLoss if mini_batch_size is None else CachedCLPLoss
    forward = loss_class.forward

    def watched(self: Any, columns: list[dict[str, Any]], labels: Any = None) -> torch.Tensor:
        told.append(all(KEY in column for column in columns))
        return forward(self, columns, labels)

    monkeypatch.setattr(loss_class, "forward", watched)
    rows = mine(tiny_model, Collection.load(str(collection_path), split="train"), MiningOptions(num_negatives=2)).rows
    settings = settings_of(
        tmp_path,
        tmp_path,
        tmp_path,
        experts=experts,
        mini_batch_size=mini_batch_size,
        batch_size=len(rows),
        epochs=6,
        learning_rate=0.03,
        # Where a gradient is next to nothing, Adam makes whole steps of what rounding left; not with this.
        training_arg={"adam_epsilon": 0.01, "max_grad_norm": 0.05, "weight_decay": 0.1},
    )
    if experts:  # with a balance: else the first rows would set it, in the one order and in the other
        upcycle(tiny_model, num_experts=experts).train()
        with torch.no_grad():
            tiny_model(tiny_model.preprocess([row.positive for row in rows]))
        tiny_model.eval()
    by_trainer, by_loop = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    done = train(by_loop, {"one": rows}, settings)
    assert done.steps == len(done.losses) == 6
    prepare_model(by_trainer, settings)
    dataset = to_dataset(rows, num_negatives=2)
    with_arguments = dataclasses.replace(
        settings, training_arg={**settings.training_arg, "disable_tqdm": True, "logging_steps": 1}
    )
    trainer = make_trainer(by_trainer, {"one": dataset}, with_arguments, tmp_path / "checkpoints")
    trainer.args.warmup_steps = settings.warmup
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(done.losses, losses, rtol=2e-3)
    texts = ["where is the red river", "in the north is a big lake"]
    before, ours, theirs = (model.encode(texts) for model in (tiny_model, by_loop, by_trainer))
    # A token between two experts that are all but alike goes to the one or the other by rounding.
    assert np.abs(ours - theirs).max() < (0.3 if experts else 0.02) * np.abs(ours - before).max()
    assert np.abs(ours - before).max() > 0.004
    assert trainer.data_collator.preprocess_fn.preprocess._lists  # what tokenises quickly
    assert told == [True] * 12  # by either, so that on a GPU the loss need not wait to know its texts


def test_every_row_is_there_and_a_second_call_trains_nothing(
    settings: RunSettings, other_collection_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ablate(settings, seeds=2, learning_rates=[1e-4, 3e-3], unseen=[str(other_collection_path)])
    names = [row.name for row in table.rows]
    assert names == ["base", *(variant.name for variant in default_variants(settings))]
    folder = Path(settings.output)
    for row in table.rows[1:]:
        assert len(row.cells) == 2
        # The rate is the better of the two on the queries held out.
        held_out = {
            rate: json.loads((folder / "variants" / row.name / f"rate-{rate:g}.json").read_text())["held_out"]
            for rate in (1e-4, 3e-3)
        }
        assert row.cells[0].learning_rate == max(held_out, key=lambda rate: held_out[rate])
        assert set(row.over_base) == {"collection_dev"}
        assert len(row.unseen) == 1
    # Random negatives are random: none has a rank.
    variant = next(variant for variant in default_variants(settings) if variant.name == "random")
    mined = [path for path in (folder / "mined").rglob("*.jsonl") if '"random"' in path.read_text()]
    assert len(mined) == 2  # seeds
    assert variant.settings.num_negatives == settings.num_negatives
    for name in ("table.md", "table.tex", "report.html"):
        assert "clp-moe" in (folder / name).read_text(encoding="utf-8")

    def forbidden(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("trained again")

    before = (folder / "table.json").read_text()
    monkeypatch.setattr(study_module, "train", forbidden)
    ablate(settings, seeds=2, learning_rates=[1e-4, 3e-3], unseen=[str(other_collection_path)])
    assert (folder / "table.json").read_text() == before
    # What cannot be used is found before anything is removed or written.
    with pytest.raises(SettingsError, match="cannot be loaded"):
        ablate(dataclasses.replace(settings, model=str(folder / "nowhere")), seeds=1, overwrite=True)
    assert (folder / "table.json").read_text() == before
    with pytest.raises(CollectionError):
        ablate(dataclasses.replace(settings, collection=[str(folder)], output=str(folder) + "-2"), seeds=1)
    assert not Path(f"{folder}-2").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"range_min": 1, "range_max": 31},
        {"range_min": 40, "range_max": 50, "sampling_strategy": "random"},
        {"min_score": 0.3},
        {"min_score": 0.3, "max_score": 0.9, "relative_margin": 0.05},
        {"on_shortage": "drop", "num_negatives": 0},
        {"refresh_every": "epoch", "in_batch_negatives": False},
    ],
)
def test_every_row_can_be_trained_with_whatever_a_run_takes(settings: RunSettings, given: dict[str, Any]) -> None:
    found = {variant.name: variant.settings for variant in default_variants(dataclasses.replace(settings, **given))}
    assert found["random"].on_shortage == "random"
    for name in ("ance", "clp", "sentences"):
        assert {option: getattr(found[name], option) for option in given} == given


def two_variants(settings: RunSettings, tmp_path: Path) -> list[Any]:
    path = tmp_path / "variants.yaml"
    path.write_text("ance: {experts: 0, penalty-weight: 0}\nmoe:\n  experts: 2\n  average_with_base: 0.5\n")
    return read_variants(path, settings)


def test_stopped_anywhere_it_goes_on_to_the_same_table(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path, stop_at: int | None = None) -> int:
        """Trainings that were begun; stopped at the beginning of one of them."""
        begun = 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal begun
            if begun == stop_at:
                raise KeyboardInterrupt
            begun += 1
            return train(*arguments, **options)

        monkeypatch.setattr(study_module, "train", counted)
        own = dataclasses.replace(settings, output=str(output))
        ablate(own, two_variants(own, tmp_path), seeds=2, learning_rates=[1e-4, 3e-3])
        return begun

    undisturbed = tmp_path / "undisturbed"
    assert run(undisturbed) == 6  # two variants, two rates with the first seed, the better one with the second
    stopped = tmp_path / "stopped"
    for stop_at in (1, 1, 0, 2):
        with pytest.raises(KeyboardInterrupt):
            run(stopped, stop_at)
    run(stopped)
    assert scores_of(stopped) == scores_of(undisturbed)
    assert {row["name"] for row in json.loads((stopped / "table.json").read_text())["rows"]} == {"base", "ance", "moe"}


@pytest.mark.parametrize("experts", [0, 2])
def test_variants_that_differ_in_averaging_alone_train_once(
    settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: int
) -> None:
    begun = []

    def counted(*arguments: Any, **options: Any) -> Any:
        begun.append(options["progress"])
        return train(*arguments, **options)

    monkeypatch.setattr(study_module, "train", counted)
    whole, half = f"whole: {{experts: {experts}}}\n", f"half: {{experts: {experts}, average_with_base: 0.5}}\n"
    scores = {}
    for name, text in (("together", whole + half), ("alone", half)):
        own = dataclasses.replace(settings, output=str(tmp_path / name))
        (tmp_path / "variants.yaml").write_text(text)
        ablate(own, read_variants(tmp_path / "variants.yaml", own), seeds=2, learning_rates=[3e-3])
        scores[name] = scores_of(tmp_path / name)
        assert not (tmp_path / name / "weights").exists()
    assert len(begun) == 4  # two seeds of the one, and of what was alone
    assert scores["together"]["half"] == scores["alone"]["half"]
    assert scores["together"]["half"] != scores["together"]["whole"]


def test_more_seeds_and_other_variants_may_be_added_and_nothing_else_changed(
    settings: RunSettings, tmp_path: Path
) -> None:
    both = two_variants(settings, tmp_path)
    ablate(settings, both[:1], seeds=1, learning_rates=[1e-3])
    first = scores_of(Path(settings.output))
    for record in [*Path(settings.output).rglob("ablation.json"), *Path(settings.output).rglob("cell.json")]:
        found = json.loads(record.read_text())  # as versions without clusters wrote it
        for name in ("ray", "workers", "cpus_per_worker", "gpus_per_worker"):
            del found["settings"][name]
        record.write_text(json.dumps(found))
    with pytest.raises(SettingsError, match="an ablation works in this process"):
        ablate(dataclasses.replace(settings, ray="auto"), both, seeds=2, learning_rates=[1e-3])
    table = ablate(settings, both, seeds=2, learning_rates=[1e-3])
    assert [len(row.cells) for row in table.rows] == [0, 2, 2]
    cell = read_evaluation(Path(settings.output) / "variants" / "ance" / "seed-42").results["collection_dev"]
    assert first["ance"]["collection_dev"] == pytest.approx(cell.scores["ndcg@10"], abs=1e-6)
    with pytest.raises(SettingsError, match=r"holds an ablation with other settings \(batch_size was 16, now 8"):
        ablate(dataclasses.replace(settings, batch_size=8), both, seeds=2, learning_rates=[1e-3])
    with pytest.raises(SettingsError, match="learning_rates was"):
        ablate(settings, both, seeds=2, learning_rates=[1e-4])
    other = dataclasses.replace(both[0], settings=dataclasses.replace(both[0].settings, penalty_weight=0.5))
    with pytest.raises(SettingsError, match=r"penalty_weight was 0.0, now 0.5.*give the variant another name"):
        ablate(settings, [other], seeds=2, learning_rates=[1e-3])
    table = ablate(settings, [other], seeds=1, learning_rates=[1e-3], overwrite=True)
    assert [row.name for row in table.rows] == ["base", "ance"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(SettingsError, match="is not empty and holds no ablation"):
        ablate(dataclasses.replace(settings, output=str(tmp_path / "mine")), both, overwrite=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold names and what each changes"),
        ("{}", "names no variant"),
        ("base: {experts: 0}", "'base' cannot be a variant's name"),
        ("a/b: {}", "'a/b' cannot be a variant's name"),
        ("one: 3", "one must map settings to values"),
        ("one: {learning-rate: 1}", "learning rates are searched for each"),
        ("one: {seed: 1}", "one changes seed, which all variants share"),
        ("one: {experts: 1}", "a mixture needs at least two experts"),
        ("one: {expert: 0}", "expert"),
        ("one: {refresh_every: 10}", "mines again after each epoch or never"),
        ("one: {training_arg: {optim: sgd}}", "minds the training arguments weight_decay"),
    ],
)
def test_variants_that_cannot_be_meant_are_refused(
    settings: RunSettings, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        read_variants(path, settings)


def test_negatives_are_mined_again_after_each_epoch(settings: RunSettings, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("once: {experts: 0, epochs: 2}\nagain: {experts: 0, epochs: 2, refresh_every: epoch}\n")
    table = ablate(settings, read_variants(path, settings), seeds=1, learning_rates=[3e-3])
    losses = [
        json.loads((Path(settings.output) / "variants" / name / "seed-42" / "cell.json").read_text())["losses"]
        for name in ("once", "again")
    ]
    half = len(losses[0]) // 2
    assert losses[0][:half] == losses[1][:half]
    assert losses[0][half:] != losses[1][half:]
    assert len(table.rows) == 3


def test_the_command_prints_the_table(settings: RunSettings, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("ance: {experts: 0, penalty_weight: 0}\n")
    command = ["ablation", "--model", settings.model, "--collection", settings.collection[0], "--output", "out"]
    command += ["--variants", str(path), "--seeds", "1", "--num-negatives", "2", "--epochs", "1"]
    command[command.index("out")] = str(tmp_path / "out")
    result = CliRunner().invoke(cli.app, [*command, "--learning-rates", "much"])
    assert result.exit_code == 1
    assert "learning_rates must be numbers" in result.output
    result = CliRunner().invoke(cli.app, [*command, "--learning-rates", "1e-3"])
    assert result.exit_code == 0, result.output
    assert "ance, seed 42: collection_dev 0." in result.output
    assert "over base" in result.output
    assert (tmp_path / "out" / "table.md").read_text().startswith("| variant | collection_dev | mean | over base |")


WITHOUT = """
import importlib.metadata as metadata, sys
HIDDEN = ("datasets", "accelerate", "faiss", "ir_datasets", "beir", "bm25s", "peft")
from_name = metadata.Distribution.from_name
def found(name):
    if name.replace("-", "_") in HIDDEN:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)
metadata.Distribution.from_name = found
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from st_clp.run.ablation import ablate, read_variants
from st_clp.settings import RunSettings
model, collection, variants, output = sys.argv[1:]
settings = RunSettings(model=model, collection=[collection], output=output, num_negatives=2, epochs=1)
print(len(ablate(settings, read_variants(variants, settings), seeds=1, learning_rates=[1e-3]).rows), "rows")
"""


def test_it_runs_without_datasets_faiss_and_ir_datasets(settings: RunSettings, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text("moe: {experts: 2}\n")
    arguments = [settings.model, settings.collection[0], str(path), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 rows" in done.stdout


@given(
    st.integers(1, 3).flatmap(
        lambda seeds: st.lists(
            st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=seeds, max_size=seeds),
            min_size=1,
            max_size=3,
        )
    )
)
def test_a_gain_is_the_mean_difference_and_lies_within_its_interval(found: list[list[list[float]]]) -> None:
    seeds = len(found[0])
    own = [{str(place): np.array(part[seed]) for place, part in enumerate(found)} for seed in range(seeds)]
    base = [{str(place): np.full(3, 0.5) for place in range(len(found))}]
    gains = _gains(own, base, list(base[0]), seed=0)
    for place, part in enumerate(found):
        gain = gains[str(place)]
        assert gain.difference == pytest.approx(np.mean(part) - 0.5)
        assert gain.low - 1e-9 <= gain.high
        assert 0 <= gain.p <= gain.p_adjusted <= 1
    same = _gains(own, own, list(base[0]), seed=0)
    assert all(gain.difference == gain.low == gain.high == 0 and gain.p == 1 for gain in same.values())


def rows_of(model: SentenceTransformer, collection: Path) -> list[TrainingRow]:
    return mine(model, Collection.load(str(collection), split="train"), MiningOptions(num_negatives=2)).rows


def test_rows_of_several_collections_do_not_share_a_batch(
    make_tiny_model: Callable[..., SentenceTransformer],
    collection_path: Path,
    other_collection_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_tiny_model()
    rows = {name: rows_of(model, path) for name, path in (("one", collection_path), ("two", other_collection_path))}
    settings = settings_of(tmp_path, tmp_path, tmp_path, experts=0, epochs=1, batch_size=50)
    done = train(model, rows, settings)
    assert done.steps == sum(-(-len(found) // 50) for found in rows.values())


def test_freed_memory_is_handed_back(settings: RunSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[None] = []
    monkeypatch.setattr(loop_module, "hand_back_freed_memory", lambda: times.append(None))
    monkeypatch.setattr(loop_module, "HAND_BACK_EVERY", 3)
    path = tmp_path / "variants.yaml"
    path.write_text("ance: {experts: 0, penalty-weight: 0}\n")
    table = ablate(settings, read_variants(path, settings), seeds=1, learning_rates=[1e-3])
    steps = table.rows[1].cells[0].steps
    assert steps % 3  # so that its end is another moment
    assert len(times) == steps // 3 + 1
