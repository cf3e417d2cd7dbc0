"""Write files and folders atomically, and read JSON and YAML that may be broken."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout

import st_clp

try:
    import fcntl
except ImportError:  # Windows: there a file that is open cannot be removed, which is all the lock is for
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

UNFINISHED = ".partial"
"""How the name of a file or folder ends that is being written."""


@contextmanager
def whole_file(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Write a file under a temporary name and rename it to ``path`` once it is complete.

    Several processes may write the same file: each has its own unfinished one, and the last to finish wins. What
    killed writers left beside ``path`` is removed first.

    Args:
        path: Where the file shall be; its folder is made if it is not there.
        mode: ``"w"`` for UTF-8 text, ``"wb"`` for bytes.

    Raises:
        OSError: The file cannot be written; ``path`` is then as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    file, unfinished = _open_unfinished(target, mode)
    try:
        with file:
            yield file
            file.flush()
            # before it is closed, and so unlocked: a file without its lock may be taken for a leftover
            if fcntl is not None:
                unfinished.replace(target)
        if fcntl is None:
            unfinished.replace(target)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def _open_unfinished(target: Path, mode: str) -> tuple[IO[Any], Path]:
    while True:
        unfinished = target.with_name(_own_name(target))
        file = open(unfinished, mode, encoding=None if "b" in mode else "utf-8")  # noqa: SIM115
        if fcntl is None:
            return file, unfinished
        with suppress(OSError):  # a file system without locks: nothing is removed there either
            fcntl.flock(file, fcntl.LOCK_EX)  # waits for another process that is just removing it
        if unfinished.exists():  # else another process took it for a leftover before it was locked
            return file, unfinished
        file.close()


@contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Fill a folder under a temporary name, and move it to ``path`` once it is complete.

    As :func:`whole_file` for a folder: several processes may make the same one, and what killed ones left beside
    ``path`` is removed first.

    Args:
        path: Where the folder shall be; a folder that is there is replaced, and one that it links to in the link's
            place.

    Raises:
        OSError: The folder cannot be written, or the one that is there cannot be moved; it is then as it was.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    unfinished, lock = _make_unfinished(target)
    try:
        yield unfinished
        while not _put_in_place(unfinished, target):
            pass  # another process has put its own there meanwhile
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _put_in_place(unfinished: Path, target: Path) -> bool:
    """Move the folder to ``target``, and what is there away first; false if another came between."""
    before = None
    if target.is_dir():
        # Not under an unfinished one's name yet: if this process is killed now, it is all that there is.
        before = target.with_name(f"{target.name}.replaced-{uuid.uuid4().hex[:8]}")
        try:
            target.rename(before)
        except FileNotFoundError:
            return False
    try:
        unfinished.rename(target)
    except OSError:
        if target.is_dir():
            return False
        if before is not None:
            before.rename(target)
        raise
    finally:
        if before is not None and target.is_dir() and before.exists():
            shutil.rmtree(before.rename(before.with_name(_own_name(target))), ignore_errors=True)
    return True


def _make_unfinished(target: Path) -> tuple[Path, int | None]:
    while True:
        unfinished = target.with_name(_own_name(target))
        unfinished.mkdir()
        if fcntl is None:
            return unfinished, None
        with suppress(OSError):  # taken for a leftover before it was opened
            lock = os.open(unfinished, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks: nothing is removed there either
                fcntl.flock(lock, fcntl.LOCK_EX)  # waits for another process that is just removing it
            if unfinished.exists():
                return unfinished, lock
            os.close(lock)


def _own_name(target: Path) -> str:
    return f"{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{UNFINISHED}"


@contextmanager
def locked(path: Path, work: str) -> Iterator[None]:
    """Wait until no other process holds the lock file ``path``, and hold it. A killed process releases it.

    Args:
        path: The file; it is made, and stays.
        work: What the other process is doing, for the notice while this one waits.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is %s; waiting for it", work)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove the unfinished files and folders beside ``path`` that no process is writing any more."""
    target = Path(path)
    _remove_left(target.parent, f"{target.name}.")


def remove_leftovers_in(folder: str | os.PathLike[str]) -> None:
    """Remove everything unfinished in a folder that no process is writing any more."""
    _remove_left(Path(folder), "")


def _remove_left(folder: Path, start: str) -> None:
    try:
        found = [entry for entry in folder.iterdir() if entry.name.startswith(start)]
    except OSError:
        return
    for entry in found:
        if entry.name.endswith(UNFINISHED):
            _remove_if_left(entry)


def _remove_if_left(unfinished: Path) -> None:
    remove = shutil.rmtree if unfinished.is_dir() and not unfinished.is_symlink() else Path.unlink
    with suppress(OSError):  # gone meanwhile, locked by its writer, or not ours to remove
        if fcntl is None:
            remove(unfinished)
            return
        lock = os.open(unfinished, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(unfinished)
        finally:
            os.close(lock)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; see :func:`whole_file`."""
    with whole_file(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], content: Any, *, indent: int | None = 1) -> None:
    """Write a JSON file, whole or not at all; see :func:`whole_file`."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False))


def read_json(path: str | os.PathLike[str], *, error: type[Exception] = ValueError, remedy: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        error: What to raise where it cannot be read.
        remedy: What to do then; it ends the message.

    Raises:
        error: The file is no UTF-8, no JSON, nested too deep, or no object.
        FileNotFoundError: There is no such file.
    """
    return parse_object(Path(path).read_bytes(), str(path), error=error, remedy=remedy)


def parse_object(
    text: str | bytes, where: str, *, error: type[Exception] = ValueError, remedy: str = ""
) -> dict[str, Any]:
    """Read a JSON object from text that may be anything.

    Args:
        text: The text, or its bytes in UTF-8.
        where: What the message names: a file, with the line where there are several.
        error: What to raise where it cannot be read.
        remedy: What to do then; it ends the message.

    Raises:
        error: It is no UTF-8, no JSON, nested too deep, or no object.
    """
    ending = f"; {remedy}" if remedy else ""
    try:
        found = json.loads(text)
    except RecursionError:
        raise error(f"{where}: JSON nested too deep to be read{ending}") from None
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 text ({problem.reason}){ending}") from None
    except json.JSONDecodeError as problem:
        place = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{where}: not valid JSON ({problem.msg} at {place}){ending}") from None
    except ValueError as problem:  # an integer of more digits than Python converts
        raise error(f"{where}: JSON that cannot be read ({problem}){ending}") from None
    if not isinstance(found, dict):
        raise error(f"{where}: a JSON object is expected, not {type(found).__name__}{ending}")
    return found


def require_field(
    row: dict[str, Any],
    name: str,
    kind: type | tuple[type, ...],
    where: str,
    *,
    error: type[Exception] = ValueError,
    remedy: str = "",
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """The value under ``name``, checked for type and range. ``True`` is not accepted as a number; an int is as a float.

    Args:
        row: What was read.
        name: The field.
        kind: What it must be, or several of which it may be one.
        where: What the message names: a file, with the line where there are several.
        error: What to raise.
        remedy: What to do then; it ends the message.
        least: The smallest number that it may be.
        most: The largest.

    Raises:
        error: The field is missing, of another kind, or out of range.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    ending = f"; {remedy}" if remedy else ""
    if name not in row:
        raise error(f"{where}: {name!r} is missing{ending}")
    value = row[name]
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("null" if one is type(None) else one.__name__ for one in kinds)
        raise error(f"{where}: {name!r} must be {expected}, not {shown(value)}{ending}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high = (float("-inf") if least is None else least), (float("inf") if most is None else most)
        if not low <= value <= high:
            raise error(f"{where}: {name!r} must be between {low:g} and {high:g}, not {shown(value)}{ending}")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it, in at most 80 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, or nested too deep
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def content_digest(path: str | os.PathLike[str]) -> str:
    """A digest of a file's bytes, 32 hexadecimal digits (BLAKE2b)."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_mapping(path: str | os.PathLike[str], kind: str, content: str, error_class: type[Exception]) -> dict[Any, Any]:
    """Read a YAML file that holds a mapping.

    Args:
        path: The file.
        kind: What it is, for the message when it is not there.
        content: What it must hold, with an example, for the message when it holds something else.
        error_class: What to raise.

    Raises:
        Exception: Of ``error_class``; the file is not there, is no UTF-8, no YAML or no mapping.
    """
    try:
        values = parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise error_class(f"the {kind} {path} is not there") from error
    except UnicodeDecodeError as error:
        raise error_class(f"{path} is no UTF-8 text ({error.reason}, byte {error.start})") from error
    except ValueError as error:
        raise error_class(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise error_class(f"{path} must hold {content}")
    return values


def parse(text: str) -> Any:
    """Parse YAML text into plain values, lists and mappings.

    Raises:
        ValueError: It is no YAML, names a tag that is no plain value, or is nested too deep.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("nested too deep to be read") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        # Raised for a value that looks like a date or number but is not one, such as 2026-13-01, or a tag with the
        # wrong content.
        raise ValueError(f"a value that cannot be read ({error})") from error


# Packages whose versions results may depend on.
PACKAGES = ("sentence-transformers", "transformers", "torch", "faiss-cpu", "beir", "ir-datasets", "datasets")


def versions(*further: str) -> dict[str, str]:
    """The versions of st-clp, Python and all that figures may depend on; what is not installed is absent.

    Args:
        *further: More packages.
    """
    found = {"st-clp": st_clp.__version__, "python": platform.python_version()}
    for package in (*PACKAGES, *further):
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def inside(place: str | os.PathLike[str], name: str) -> str:
    """Join a name to a folder, or to an address such as ``s3://bucket/folder``."""
    return f"{os.fspath(place).rstrip('/')}/{name}"
