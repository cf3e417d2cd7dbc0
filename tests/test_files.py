"""Files appear whole or not at all, and foreign JSON is refused by name."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_clp import files
from st_clp.files import (
    UNFINISHED,
    content_digest,
    parse_object,
    read_json,
    remove_leftovers,
    remove_leftovers_in,
    require_field,
    whole_file,
    whole_folder,
    write_json,
)


def _write_for_ever(path: str) -> None:
    with whole_file(path) as file:
        file.write("begun")
        file.flush()
        time.sleep(60)


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing ``tmp_path / "rows.jsonl"``."""
    process = multiprocessing.get_context("fork").Process(target=_write_for_ever, args=(str(tmp_path / "rows.jsonl"),))
    process.start()
    until = time.monotonic() + 20
    while not any(entry.stat().st_size for entry in tmp_path.glob(f"*{UNFINISHED}")) and time.monotonic() < until:
        time.sleep(0.02)
    yield process
    process.kill()
    process.join()


def test_another_writer_leaves_a_living_ones_file_alone_and_removes_a_dead_ones(tmp_path, writer):
    target = tmp_path / "rows.jsonl"
    write_json(target, {"mine": 1})
    assert len(list(tmp_path.glob(f"*{UNFINISHED}"))) == 1
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    write_json(target, {"mine": 2})
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]
    assert read_json(target) == {"mine": 2}


def _fill_for_ever(path: str) -> None:
    with whole_folder(path) as folder:
        (folder / "rows").write_text("begun")
        time.sleep(60)


def test_a_folder_appears_whole_and_a_dead_ones_unfinished_one_goes(tmp_path):
    target = tmp_path / "step-1"
    filler = multiprocessing.get_context("fork").Process(target=_fill_for_ever, args=(str(target),))
    filler.start()
    until = time.monotonic() + 20
    while not list(tmp_path.glob(f"*{UNFINISHED}/rows")) and time.monotonic() < until:
        time.sleep(0.02)
    with whole_folder(target) as folder:
        (folder / "rows").write_text("1")
        assert not target.exists()
    remove_leftovers_in(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the living one's is left alone
    filler.kill()
    filler.join()
    remove_leftovers_in(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-1"]
    (tmp_path / f"step-1{UNFINISHED}").mkdir()  # as it was once named
    with whole_folder(target) as folder:
        (folder / "other").write_text("2")
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["step-1", "step-1/other"]

    def fail_half_way():
        with whole_folder(target):
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["step-1", "step-1/other"]


def test_a_folder_that_is_linked_to_is_replaced_and_the_link_stays(tmp_path):
    (tmp_path / "big disk").mkdir()
    (tmp_path / "big disk" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "big disk")
    with whole_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [entry.name for entry in (tmp_path / "big disk").iterdir()] == ["new"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["big disk", "link"]


@pytest.mark.parametrize("moves", [0, 1])
def test_a_folder_that_cannot_be_replaced_stays_as_it_was(tmp_path, monkeypatch, moves):
    """Neither where it cannot be moved away, as a mounted one, nor where the new one cannot be moved in."""
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").touch()
    original, moved = Path.rename, []

    def rename(self, other):
        moved.append(self)
        if len(moved) == moves + 1:
            raise OSError("busy")
        return original(self, other)

    def replace():
        with whole_folder(target) as folder:
            (folder / "new").touch()

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="busy"):
        replace()
    assert [str(entry.relative_to(tmp_path)) for entry in tmp_path.rglob("*")] == ["folder", "folder/old"]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    target = tmp_path / "deep" / "a.json"
    write_json(target, {"a": 1})

    def fail_half_way():
        with whole_file(target) as file:
            file.write("{")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert read_json(target) == {"a": 1}
    assert [entry.name for entry in target.parent.iterdir()] == ["a.json"]


def test_only_unfinished_files_of_that_name_are_removed(tmp_path):
    for name in ("rows.jsonl.7.partial", "rows.jsonl.bak", "rows.7.partial", "other.7.partial"):
        (tmp_path / name).write_text("x")
    remove_leftovers(tmp_path / "rows.jsonl")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other.7.partial", "rows.7.partial", "rows.jsonl.bak"]
    remove_leftovers(Path("/no/such/folder/rows.jsonl"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a JSON object is expected, not list"),
        ('{"a":' + "[" * 100_000, "nested too deep"),
        (b'{"a": "\xff"}', "not UTF-8"),
        ('{"a": 1', "not valid JSON .* line 1, column 8"),
        ('{"a": ' + "1" * 5000 + "}", "cannot be read"),
    ],
)
def test_what_is_no_object_is_refused_with_its_place_and_remedy(text, message):
    with pytest.raises(LookupError, match=f"^here: .*{message}.*; do this$"):
        parse_object(text, "here", error=LookupError, remedy="do this")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_a_field_is_of_its_kind_or_refused(value):
    row = json.loads(json.dumps({"rows": value}))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        assert require_field(row, "rows", int, "m.json", least=0) == value
    else:
        with pytest.raises(ValueError, match=r"m\.json: 'rows' must be"):
            require_field(row, "rows", int, "m.json", least=0)


def test_a_digest_is_of_the_bytes(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    one.write_bytes(b"a" * 3_000_000)
    two.write_bytes(b"a" * 2_999_999 + b"b")
    assert content_digest(one) != content_digest(two)
    two.write_bytes(one.read_bytes())
    assert content_digest(one) == content_digest(two)


@pytest.mark.skipif(files.fcntl is None, reason="no locks of files on this system")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_removes_before_it_is_locked_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A process that looks for leftovers may lock what has just been made, and remove it a moment later."""
    original = files.fcntl.flock
    removers: list[threading.Thread] = []

    def flock(file: Any, operation: int) -> None:
        if not removers:
            (unfinished,) = tmp_path.glob("*.partial")
            remover = os.open(unfinished, os.O_RDONLY)
            original(remover, operation)

            def remove() -> None:
                time.sleep(0.1)
                unfinished.rmdir() if unfinished.is_dir() else unfinished.unlink()
                os.close(remover)

            removers.append(threading.Thread(target=remove))
            removers[0].start()
        original(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    if kind == "file":
        with whole_file(tmp_path / "rows") as file:
            removers[0].join()
            file.write("whole")
        assert (tmp_path / "rows").read_text() == "whole"
    else:
        with whole_folder(tmp_path / "rows") as folder:
            removers[0].join()
            (folder / "one").write_text("whole")
        assert (tmp_path / "rows" / "one").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]
