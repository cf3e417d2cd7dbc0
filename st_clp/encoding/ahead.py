"""Keep an accelerator busy: tokenise windows ahead of time, and fill batches to the size that its memory allows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from st_clp.encoding.batches import Features, Window, tokenise
from st_clp.encoding.token_lists import ListWindow, TokenLists

AHEAD = 2  # windows
PIECE = 512  # texts that one thread tokenises at a time
MOST_THREADS = 16
LEAST_TOKENS, MOST_TOKENS = 32_768, 131_072
"""Tokens of an accelerator's batches. On an H100 a forward pass of 24 layers of 1,024 reached 57 % of the product peak
with 32,768 tokens and 59 % with 131,072: more would hardly be faster."""
SHARE = 70
"""Percent of the free memory that a batch takes: others use the device too, and long texts take more for attention."""


class TokenBudget:
    """The number of tokens in a batch, found from the memory that the batches so far have taken."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = LEAST_TOKENS
        self._device = device
        self._learns = device.type == "cuda"

    def allocated(self) -> int:
        """Bytes allocated now."""
        return torch.cuda.memory_allocated(self._device) if self._learns else 0

    def learn(self, tokens: int, before: int) -> None:
        """Raise the budget if the memory allows it.

        Args:
            tokens: The tokens of a batch that was given to the device.
            before: Bytes allocated before it.
        """
        if not self._learns or tokens < LEAST_TOKENS // 2 or self.tokens == MOST_TOKENS:
            return
        # The peak may be from something earlier, so this may overestimate but never underestimate; the user's counter
        # is not reset.
        taken = torch.cuda.max_memory_allocated(self._device) - before
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        free = torch.cuda.mem_get_info(self._device)[0] + unused
        self.tokens = max(self.tokens, tokens_that_fit(free, taken, tokens))

    def shrink(self, tokens: int) -> None:
        """Halve the budget after a batch of so many tokens ran out of memory, and stop raising it."""
        self.tokens = max(1, tokens // 2)
        self._learns = False


def tokens_that_fit(free: int, taken: int, tokens: int) -> int:
    """The tokens that fit into a share of the ``free`` bytes, if ``tokens`` took ``taken`` bytes; within bounds."""
    fitting = SHARE * free * tokens // (100 * max(1, taken))
    return min(MOST_TOKENS, max(LEAST_TOKENS, fitting))


def tokenised_ahead(
    windows: Iterator[list[str]],
    token_lists: Callable[[list[str]], TokenLists | None],
    preprocess: Callable[[list[str]], Features],
) -> Iterator[Window | ListWindow | None]:
    """Tokenise windows on all cores while earlier ones are in the model; yields None for an empty window.

    Args:
        windows: Their texts.
        token_lists: Returns a tokeniser into lists if the model's features allow it; called once, with some texts.
        preprocess: The model's own preprocessing, used otherwise.

    An error in reading the texts is raised after the windows that were read before it.
    """
    waiting: deque[Future[Window | ListWindow | None]] = deque()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked: list[TokenLists | None] = []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(min(MOST_THREADS, cores)) as workers:

        def tokenised(texts: list[str]) -> Window | ListWindow | None:
            if not texts:
                return None
            if not asked:
                asked.append(token_lists(texts))
            (lists,) = asked
            if lists is None:
                return tokenise(preprocess, texts)
            pieces = [texts[begin : begin + PIECE] for begin in range(0, len(texts), PIECE)]
            rows: list[np.ndarray] = []
            for piece in workers.map(lists, pieces):
                rows += piece
            return ListWindow(rows, lists)

        def read_ahead() -> None:
            while len(waiting) < AHEAD:
                try:
                    texts = next(windows, None)
                except Exception as error:
                    # Encode what was read before: an error in the texts must not cost a window.
                    failed: Future[Window | ListWindow | None] = Future()
                    failed.set_exception(error)
                    waiting.append(failed)
                    return
                if texts is None:
                    return
                waiting.append(reader.submit(tokenised, texts))

        read_ahead()
        while waiting:
            ready = waiting.popleft()
            read_ahead()
            yield ready.result()
