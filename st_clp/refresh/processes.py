"""One process mines and decides, all do the same: what the processes of a training agree on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

HEARTBEAT = 0.2  # seconds


class Processes:
    """The processes of a training; one alone is the first."""

    def __init__(self) -> None:
        distributed = torch.distributed
        self.several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self.first = not self.several or distributed.get_rank() == 0

    def share(self, value: Any) -> Any:
        """What the first process has here, in all of them. All must come here at about the same time."""
        if not self.several:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def from_first(self, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Let the first process work while the others wait.

        However long that takes, no collective operation does, so none runs into its time limit.

        Args:
            work: Must not raise.
        """
        if not self.several:
            return work()
        results: list[dict[str, Any]] = []
        thread = threading.Thread(target=_on_device(lambda: results.append(work())), daemon=True)
        if self.first:
            thread.start()
        while True:
            if self.first:
                thread.join(HEARTBEAT)
                if not thread.is_alive() and not results:
                    raise RuntimeError("the work of the first process ended without a result")
            result = self.share(results[0] if results else None)
            if result is not None:
                return result


def _on_device(work: Callable[[], None]) -> Callable[[], None]:
    """The work on this thread's GPU: another thread would begin with the first one."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return work
    device = torch.cuda.current_device()

    def there() -> None:
        with torch.cuda.device(device):
            work()

    return there
