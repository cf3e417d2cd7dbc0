"""What is published: a wheel that works by itself, and a source archive with everything that its tests need."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import st_clp

pytest.importorskip("setuptools", minversion="77")
ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source archive, wheel), the wheel made of what the archive holds."""
    folder = tmp_path_factory.mktemp("dist")
    tree = folder / "tree"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no checkout, so nobody knows which files are to be published")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    for what in ("build_sdist", "build_wheel"):
        subprocess.run([sys.executable, "-c", BUILD, what, str(folder)], cwd=tree, capture_output=True, check=True)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def test_the_version_is_one(built: tuple[Path, Path]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == st_clp.__version__
    assert f"## {st_clp.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert all(st_clp.__version__ in path.name for path in built)


def test_the_wheel_holds_the_product_and_works_by_itself(built: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "installed")
    for package in ("st_clp", "evaluators"):
        files = [path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(ROOT).as_posix() for path in files} <= names
    assert {"st_clp/py.typed", "evaluators/py.typed", "evaluators/page/page.html.jinja"} <= names
    assert not [name for name in names if name.split("/")[0] in ("tests", "tools", "examples", "docs", "benchmarks")]
    code = (
        "import st_clp, evaluators, pathlib; from evaluators.page import write_page\n"
        "assert 'installed' in st_clp.__file__ and 'installed' in evaluators.__file__\n"
        "print(len(st_clp.Collection.load('embedded/ko/dev').queries))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert "st-clp = st_clp.cli:main" in (tmp_path / "installed" / entry).read_text()


def test_the_source_archive_is_complete(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    left_out = {name for name in listed.splitlines() if (ROOT / name).is_file()} - names
    # What only a checkout needs.
    assert {name.split("/")[0] for name in left_out} <= {".ci", ".github", ".gitignore", ".gitattributes"}
