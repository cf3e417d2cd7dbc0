"""Read and write files at addresses that fsspec knows (``s3://bucket/folder``, ``gs://…``).

Credentials come from the environment or the provider's own files, as its fsspec library reads them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from st_clp.encoding.shards import MANIFEST

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is such an address and not a local folder."""
    return _ADDRESS.match(os.fspath(path)) is not None


class Place:
    """A folder at an address.

    Every method raises:
        OSError: It cannot be reached, read or written; the message names it.

    Args:
        address: Such as ``s3://bucket/embeddings/ko``.

    Raises:
        ModuleNotFoundError: The package for such addresses is not installed.
        ValueError: fsspec does not know such addresses.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        try:
            self._files, self._root = url_to_fs(self.address)
        except ImportError as error:
            extra = "pip install 'st-clp[s3]'" if address.startswith("s3") else str(error)
            raise ModuleNotFoundError(f"{address} cannot be used: {extra}") from error
        except ValueError as error:
            raise ValueError(f"{address} is no address that fsspec {fsspec.__version__} knows: {error}") from error

    def sizes(self) -> dict[str, int]:
        """Name to bytes of every file below, such as ``part-1/ids.jsonl``; empty where there is nothing."""
        with self._said():
            self._files.invalidate_cache()  # others write here too
            found = self._files.find(self._root, detail=True)
        return {name.removeprefix(self._root).lstrip("/"): about["size"] for name, about in found.items()}

    def read(self, names: Sequence[str]) -> dict[str, bytes]:
        """The contents of these files; missing files are left out."""
        if not names:
            return {}
        paths = {self._path(name): name for name in names}
        with self._said():
            found: dict[str, Any] = self._files.cat(list(paths), on_error="return")
            for content in found.values():
                if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
                    raise content
        return {paths[path]: content for path, content in found.items() if isinstance(content, bytes)}

    def read_ranges(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (name, begin, end)."""
        if not ranges:
            return []
        names, begins, ends = zip(*ranges, strict=True)
        with self._said():
            return self._files.cat_ranges([self._path(name) for name in names], list(begins), list(ends))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, replacing an existing one."""
        with self._said():
            self._files.pipe_file(self._path(name), content)

    def put(self, folder: Path, name: str) -> None:
        """Copy a folder's files to a folder of this name, the manifest last: it says that the others are there."""
        with self._said():
            self._files.makedirs(self._path(name), exist_ok=True)  # where there are folders
            for file in sorted(folder.iterdir(), key=lambda path: path.name == MANIFEST):
                self._files.put_file(str(file), self._path(f"{name}/{file.name}"))

    def remove(self, name: str) -> None:
        """Remove a folder and what is in it."""
        with self._said(), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of whatever library talks to the provider
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"{self.address} cannot be read or written: {reason} (credentials come from the environment or the "
                "provider's own files)"
            ) from error
