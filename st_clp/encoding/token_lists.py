"""Tokens as plain lists, for devices that finish a batch before the next one is padded and turned into tensors.

Padding texts and turning nested lists into tensors takes seven times as long as handing over their ids, and keeps all
other threads of Python waiting. So texts are tokenised one by one, on all cores, and padded when their batch is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Router, Transformer

from st_clp.encoding.batches import Batch, Features

SAMPLE = 32  # texts on which it is tried whether ids are all that a model wants
KNOWN = {"input_ids", "attention_mask", "token_type_ids"}


class TokenLists:
    """Tokenises texts without padding, for a model whose features follow from the ids alone.

    Args:
        tokenizer: The model's own.
        prompt: What is put before each text.
        max_length: Tokens of a text, at most.
        template: What the model's own preprocessing gives for some text: which features there are.
    """

    def __init__(self, tokenizer: Any, prompt: str, max_length: int | None, template: Features) -> None:
        self._tokenizer, self._prompt, self._max_length = tokenizer, prompt, max_length
        self._names = [name for name, value in template.items() if isinstance(value, torch.Tensor)]
        self._constant = {name: value for name, value in template.items() if not isinstance(value, torch.Tensor)}
        self._left = getattr(tokenizer, "padding_side", "right") == "left"

    @classmethod
    def of(
        cls, model: SentenceTransformer, preprocess: Callable[[list[str]], Features], task: str, prompt: str | None,
        texts: Sequence[str],
    ) -> TokenLists | None:  # fmt: skip
        """Make one if it agrees with ``preprocess`` on the first texts and on a very long one; otherwise None."""
        sample = [*texts[:SAMPLE], " ".join(texts[:SAMPLE])]
        template = preprocess(sample)
        if {name for name, value in template.items() if isinstance(value, torch.Tensor)} - KNOWN:
            return None
        for module in _inputs(model):
            tokenizer: Any = module.tokenizer
            if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
                continue
            length = getattr(module, f"{task}_length", None) or module.max_seq_length
            lists = cls(tokenizer, prompt or "", length, template)
            rows = lists(sample)
            found = lists.features(rows, max(len(row) for row in rows))
            if all(torch.equal(found[name], template[name]) for name in lists._names):
                return lists
        return None

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        """The token ids of each text; other threads can run meanwhile."""
        given = [self._prompt + text for text in texts] if self._prompt else texts
        ids = self._tokenizer(
            given,
            truncation="longest_first" if self._max_length else False,
            max_length=self._max_length,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def features(self, rows: Sequence[np.ndarray], width: int) -> Features:
        """The features of a batch of texts, padded to ``width`` tokens."""
        lengths = np.array([len(row) for row in rows])
        kept = np.arange(width) < lengths[:, None]
        if self._left:
            kept = kept[:, ::-1]
        ids = np.full(kept.shape, self._tokenizer.pad_token_id, dtype=np.int64)
        ids[kept] = np.concatenate(rows)
        made = {
            "input_ids": ids,
            "attention_mask": kept.astype(np.int64),
            "token_type_ids": np.zeros(kept.shape, dtype=np.int64),
        }
        return {**{name: torch.from_numpy(made[name]) for name in self._names}, **self._constant}


class ListPreprocess:
    """``model.preprocess`` for a training's data collator, by token lists where they give the same features.

    A step on a GPU waits for its batch, and the tokenizer's padded tensors take the host as long as all of the step's
    other work does.

    Args:
        model: The model that is trained.
    """

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self._lists: dict[tuple[str | None, str | None], TokenLists | None] = {}

    def __call__(
        self, inputs: list[Any], prompt: str | None = None, task: str | None = None, **options: Any
    ) -> Features:
        """The features of texts; of other inputs, and with other options, those of the model's own preprocessing."""
        if options or not inputs or not all(isinstance(text, str) for text in inputs):
            return self._model.preprocess(inputs, prompt=prompt, task=task, **options)
        kind = prompt, task
        if kind not in self._lists:
            own = partial(self._model.preprocess, prompt=prompt, task=task)
            self._lists[kind] = TokenLists.of(self._model, own, task or "document", prompt, inputs)
        lists = self._lists[kind]
        if lists is None:
            return self._model.preprocess(inputs, prompt=prompt, task=task)
        rows = lists(inputs)
        return lists.features(rows, max(map(len, rows)))


class ListWindow:
    """A window's texts as token lists, for batches of any size.

    Args:
        rows: Each text's ids.
        lists: What makes batches of them.
    """

    def __init__(self, rows: list[np.ndarray], lists: TokenLists) -> None:
        self._rows, self._lists = rows, lists
        self.lengths = np.array([len(row) for row in rows], dtype=np.int64)
        self._order = np.argsort(-self.lengths, kind="stable")

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, position: int, tokens: int, batch_size: int | None) -> Batch:
        """The batch that begins at this place in the order by length, as ``Window.batch`` says."""
        width = max(1, int(self.lengths[self._order[position]]))
        number = max(1, tokens // width)
        if batch_size is not None:
            number = min(number, batch_size)
        places = self._order[position : position + number]
        features = self._lists.features([self._rows[place] for place in places], width)
        padded = int(self.lengths[places[-1]]) < width
        return Batch(places, features, len(places) * width, padded)


def _inputs(model: SentenceTransformer) -> Iterator[Transformer]:
    """The modules that tokenise the model's texts."""
    first = model[0]
    found = (
        [next(iter(route.children())) for route in first.sub_modules.values()] if isinstance(first, Router) else [first]
    )
    for module in found:
        if isinstance(module, Transformer):
            yield module
