"""Work that says where it is done, and work that ends its process; imports little, so that workers are soon there."""

from __future__ import annotations

import os


class Named:
    """Says what it was given, and in which process it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, number: int) -> tuple[str, int]:
        if number < 0:
            raise ValueError("no such number")
        return self.name, os.getpid()


class Ending:
    """Ends its process at one piece."""

    def __call__(self, number: int) -> int:
        if number == 3:
            os._exit(1)
        return number
