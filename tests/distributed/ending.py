"""Work that ends its process; imports little, so that another is soon there."""

from __future__ import annotations

import os


class Ending:
    """Ends its process at one piece."""

    def __call__(self, number: int) -> int:
        if number == 3:
            os._exit(1)
        return number
