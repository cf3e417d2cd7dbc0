"""How a mixture's model card says to open it: sentence-transformers' own snippet would be refused."""

from __future__ import annotations

import re

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from st_clp.moe.convert import expert_layers

INSTALL = """
This model has a mixture of experts of [st-clp](https://pypi.org/project/st-clp/), which must be installed as well:

```bash
pip install -U st-clp
```

`trust_remote_code=True` allows its class to be imported from there; `st_clp.load(path)` opens a folder without it.

"""

_plain_snippet = SentenceTransformerModelCardData.generate_usage_snippet


def forget_card(model: SentenceTransformer) -> None:
    """Let the model have a new card when it is saved: the one that it came with tells how to open another."""
    model._model_card_text = None


def _usage_snippet(data: SentenceTransformerModelCardData) -> str:
    """The snippet of a model card, which opens a mixture too."""
    snippet = _plain_snippet(data)
    if data.model is None or not expert_layers(data.model):
        return snippet
    opened = re.sub(r'SentenceTransformer\("([^"]*)"\)', r'SentenceTransformer("\1", trust_remote_code=True)', snippet)
    return INSTALL + opened


def write_own_snippets() -> None:
    """Have the card of every mixture open it, however the model came into memory and by whomever it is saved.

    A card is written by the model, which knows nothing of what its modules need, so this is where it has to be said.
    """
    setattr(SentenceTransformerModelCardData, "generate_usage_snippet", _usage_snippet)  # noqa: B010
