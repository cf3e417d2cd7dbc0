"""What commands print, on terminals of every encoding and width."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

from st_clp import cli
from st_clp.options import DEFAULT_METRICS
from st_clp.run.report import print_scores, short_names
from st_clp.terminal import NARROWEST, new_console, print_whole, show_what_can_be_shown

SCORES = dict.fromkeys(DEFAULT_METRICS, 0.1234)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8"])
def test_what_the_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    show_what_can_be_shown()
    print_scores(new_console(width=80), {"한국어/dev": SCORES}, {"한국어/dev": SCORES})
    print("half a surrogate \ud800")
    sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert text.count(".123 → .123" if encoding == "utf-8" else ".123 -> .123") == len(DEFAULT_METRICS)
    assert ("한국어" in text) == (encoding == "utf-8")
    assert "half a surrogate ?" in text


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_the_entry_point_prints_help_in_any_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    monkeypatch.setattr(sys, "argv", ["st-clp", "run", "--help"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_width_cuts_off_a_figure(width: int) -> None:
    name = "/home/somebody/with/a/long/path/[/b]:bomb:[red]mine/dev"
    written = io.StringIO()
    print_scores(new_console(file=written, width=width), {name: SCORES}, {name: SCORES})
    lines = written.getvalue().splitlines()
    assert written.getvalue().count(".123 → .123") == len(DEFAULT_METRICS)
    assert max(map(len, lines)) <= max(80, width)
    # what is folded is all there, and no markup
    assert "".join(line.split("│")[1].strip() for line in lines if line.startswith("│")) == short_names([name])[name]


def test_a_table_of_many_figures_is_whole_too() -> None:
    table = Table()
    table.add_column("name", overflow="fold", min_width=NARROWEST)
    for number in range(12):
        table.add_column(f"metric {number}", no_wrap=True)
    table.add_row("a" * 30, *(f"{number}.12345" for number in range(12)))
    written = io.StringIO()
    print_whole(new_console(file=written, width=80), table)
    assert all(f"{number}.12345" in written.getvalue() for number in range(12))


@pytest.mark.parametrize("arguments", [["store", "ls"], ["report"], ["search"], ["evaluate", "--output"]])
def test_names_that_are_not_utf8_are_refused_by_every_command(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, [*arguments, "caf\udce9"])
    assert result.exit_code == 1, result.output
    assert "is not valid UTF-8" in result.output


def test_names_are_not_taken_for_markup_by_the_store_commands(tmp_path: Path) -> None:
    folder = tmp_path / "[red]x"
    folder.mkdir()
    result = CliRunner().invoke(cli.app, ["store", "ls", str(folder)])
    assert "[red]x holds no embedding store" in " ".join(result.output.split())


def test_long_names_are_told_apart_by_their_ends() -> None:
    names = ["/home/me/data/one/mine/dev", "/home/me/data/two/mine/dev", "/srv/other/dev", "miracl/ko/dev", "alone"]
    assert short_names(names) == {
        names[0]: "one/mine/dev",
        names[1]: "two/mine/dev",
        names[2]: "other/dev",
        names[3]: "ko/dev",
        names[4]: "alone",
    }
    assert short_names(["a/dev", "b/a/dev"]) == {"a/dev": "a/dev", "b/a/dev": "b/a/dev"}
