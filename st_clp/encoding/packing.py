"""Linear layers whose weights lie as a processor's matrix product reads them.

PyTorch's linear layer hands oneDNN plain weights, which it rearranges for each batch anew, and writes the bias into the
result before the product adds to it. Weights that are rearranged once and a bias that the product adds itself save 6 %
of an encoder's time, and the product no longer depends on how many rows there are (``benchmarks/README.md``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

ROWS = 2048
"""The number of rows that the arrangement is chosen for; any number can be multiplied."""


class PackedLinear(nn.Linear):
    """A linear layer for inference that multiplies by a packed copy of its weight.

    The plain weight stays, for encoders that look at it or multiply by it themselves.
    """

    packed: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, "none", [], "")


def pack_linear_layers(encoder: nn.Module) -> int:
    """Pack the linear layers of an encoder of one's own, for inference on a processor; return how many.

    Only plain ``nn.Linear`` layers are, and none inside a module that says ``multiplies_by_weights``: it would not
    call them. Where PyTorch has no such product, the encoder stays as it is.
    """
    layers = list(dict.fromkeys(_linear_layers(encoder)))  # an encoder may use one layer in several places
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return 0
    try:
        packed = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS) for layer in layers]
    except (AttributeError, RuntimeError) as error:  # not in this build, or not for this processor
        logger.debug("linear layers stay as they are (%s)", error)
        return 0
    for layer, weight in zip(layers, packed, strict=True):
        layer.__class__ = PackedLinear
        layer.packed = weight
    return len(layers)


def _linear_layers(module: nn.Module) -> Iterator[nn.Linear]:
    if type(module) is nn.Linear:
        yield module
    elif not getattr(module, "multiplies_by_weights", False):
        for child in module.children():
            yield from _linear_layers(child)
