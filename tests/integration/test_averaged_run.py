"""A run whose weights are averaged with the base's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from st_clp import cli

GIVEN = (
    "--sentence-queries 0 --num-negatives 2 --range-max 20 --epochs 1 --learning-rate 3e-3 --scale 20 --no-bf16 "
    "--encode-dtype model"
)


def test_a_run_averages_with_the_base_and_says_by_how_much(
    tiny_model_path: Path, collection_path: Path, tmp_path: Path
) -> None:
    given = ["run", "--model", str(tiny_model_path), "--collection", str(collection_path), *GIVEN.split()]
    reports = {}
    for share in ("auto", "0"):
        output = tmp_path / share
        result = CliRunner().invoke(cli.app, [*given, "--average-with-base", share, "--output", str(output)])
        assert result.exit_code == 0, result.output
        report = reports[share] = json.loads((output / "report.json").read_text())
        averaged = report["training"]["averaged"]
        assert f"- Weights: {averaged['share']:.0%} the trained ones" in (output / "README.md").read_text()
    (name,) = reports["0"]["scores"]["before"]
    before = reports["0"]["scores"]["before"][name]
    assert reports["0"]["scores"]["after"][name] == pytest.approx(before)  # a share of 0 is the base
    averaged = reports["auto"]["training"]["averaged"]
    assert averaged["scores"][f"{averaged['share']:g}"] >= averaged["scores"]["0"]
    assert reports["auto"]["scores"]["after"][name]["ndcg@10"] > before["ndcg@10"]
    trained_on, all_rows = (sum(reports[share]["training"]["rows"].values()) for share in ("auto", "0"))
    assert trained_on < all_rows  # what a share is chosen by is not trained on
