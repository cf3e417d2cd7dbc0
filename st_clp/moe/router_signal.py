"""What the backward pass tells the router about its choice: how a router learns with one expert per token.

The softmax over one selected logit is the constant 1 and has no gradient. Here the layer computes
``y = sum_j m_j E_j(x)`` with ``m`` one at the chosen expert and zero elsewhere, so the forward pass is the chosen
expert alone; in the backward pass ``m`` stands for the router's distribution ``p`` (a straight-through estimate).
Then ``dL/dp_j = <dL/dy, E_j(x)>``, and through the softmax the logit of expert j falls by
``p_j <dL/dy, E_j(x) - sum_i p_i E_i(x)>``: to first order, by how much the loss would grow if j did the work rather
than the mean expert. That needs the other experts' results too. They are computed for one token in n only (drawn by
:func:`drawn`, counted n-fold, so the estimate has no bias), which costs a share of 1/n of one product an expert.

At conversion the experts are equal and that difference is zero. A hundredth of the chosen expert's own term, at all
tokens, then breaks the tie; as soon as the experts differ, the comparison outweighs it.

A token's lot depends on its text, its place in the text and the router's weights, so on nothing that differs between
one way of computing a step and another: the division into mini-batches, padding, the order of the rows, a layer that
gradient checkpointing runs again. A cached loss therefore has the gradients of the plain one, and a resumed training
those of one that was not stopped. The weights change with each step, and with them the lots.

How far two kinds of text part company (0 to 1, mean of two layers and four seeds of a tiny model, 200 steps; before
the mean token was taken off in the balance): router fixed 0.14, the chosen expert's own term alone 0.29, its
deviation from the batch's mean 0.27 (and uneven use), the comparison on an eighth of the tokens 0.33, on all 0.35.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from st_clp.moe.precise import inner_products


def token_marks(features: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """A number for each token of a batch, the same wherever the same text is embedded.

    Args:
        features: What the tokenizer gave: ``input_ids`` (batch, length), or (1, tokens) of texts one after the other
            with ``position_ids`` that begin anew with each.
        mask: (batch, length), true at tokens and false at padding; None where every position is a token.

    Returns:
        (batch * length,) int64, or None where there are no token ids.
    """
    ids = features.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or (mask is not None and mask.shape != ids.shape):
        return None
    positions = features.get("position_ids")
    if mask is None and isinstance(positions, Tensor) and positions.shape == ids.shape and ids.shape[0] == 1:
        places = positions
        texts = (positions == positions[:, :1]).cumsum(1).reshape(-1) - 1
    else:
        kept = torch.ones_like(ids) if mask is None else (mask != 0).to(ids.dtype)
        places = kept.cumsum(1) * kept  # 0 at padding on either side; counted from the first token
        texts = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1])
    places = places.reshape(-1).long()
    tokens = _mixed(ids.reshape(-1).long() * 0x10001 + places * 0x3C6EF372)
    if mask is not None:
        tokens = tokens.masked_fill(places == 0, 0)
    whole = torch.zeros(ids.numel(), dtype=torch.int64, device=ids.device).index_add_(0, texts, tokens)
    return _mixed(whole.index_select(0, texts) + places * 0x3C6EF372)


def drawn(marks: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Draw one token in ``stride``.

    Args:
        marks: (tokens,) int64, what tells the tokens apart.
        weight: The router's weights; other weights, other lots.
        stride: Of how many tokens one is drawn; 1 draws all.

    Returns:
        (tokens,) bool.
    """
    # in bfloat16, whose bits two ways of computing the same step hardly ever disagree on
    seed = weight.detach().to(torch.bfloat16).contiguous().view(torch.int16).long().sum()
    return torch.remainder(_mixed(marks + _mixed(seed)), stride) == 0


def _mixed(values: Tensor) -> Tensor:
    """Spread int64 values over all 64 bits, after the finalizer of splitmix64 (Steele et al. 2014)."""
    values = (values ^ (values >> 30)) * -0x40A7B892E31B1A47
    values = (values ^ (values >> 27)) * -0x6B2FB644ECCEEE15
    return values ^ (values >> 31)


TIE_BREAK = 0.01


class RouterSignal:
    """Fill in the gradient of the router's distribution at each sorted row of one forward pass.

    Args:
        stride: Of how many tokens one has its other experts tried; 0: of none, and the chosen expert's term is all
            there is, at full weight.
        tried: (tried rows,) the sorted rows whose other experts are tried, in ascending order; None where none is.
    """

    def __init__(self, stride: int, tried: Tensor | None) -> None:
        self.stride = stride
        self.tried = tried

    def __call__(
        self,
        into: Tensor,
        gradient: Tensor,
        rows: Tensor,
        rows_gradient: Tensor | None,
        result: Tensor | None,
        parts: Sequence[slice],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        """Add to ``into`` (rows, experts) float32.

        Args:
            into: The gradient to fill, zero so far.
            gradient: (rows, out) of the layer's output.
            rows: (rows, in), its input.
            rows_gradient: (rows, in), ``gradient`` times the chosen expert's weight; not needed with ``result``.
            result: (rows, out), the layer's output, or None. Given, inner products are taken there, otherwise on
                the side of the input: they are the same.
            parts: Each expert's slice of the rows.
            weights: Each expert's weight (out, in).
            biases: Each expert's bias (out,) or None.
        """
        if result is not None:
            own = inner_products(gradient, result)
        else:
            assert rows_gradient is not None
            own = inner_products(rows_gradient, rows)
            for part, bias in zip(parts, biases, strict=True):
                if bias is not None:
                    own[part] += (gradient[part] @ bias).float()
        for expert, part in enumerate(parts):
            into[part, expert] = own[part] * (TIE_BREAK if self.stride else 1.0)
        tried = self.tried
        if tried is None or not tried.numel():
            return
        gradient, rows = gradient.index_select(0, tried), rows.index_select(0, tried)
        ends = torch.tensor([part.stop for part in parts], device=tried.device)
        lasts = torch.searchsorted(tried, ends).tolist()
        for expert, (first, last, weight, bias) in enumerate(
            zip([0, *lasts[:-1]], lasts, weights, biases, strict=True)
        ):
            mine, others = tried[first:last], torch.cat([tried[:first], tried[last:]])
            into[mine, expert] += own[mine] * self.stride
            theirs = torch.cat([gradient[:first], gradient[last:]])
            given = torch.cat([rows[:first], rows[last:]])
            if result is not None:
                value = inner_products(theirs, torch.nn.functional.linear(given, weight, bias))
            else:
                value = inner_products(theirs @ weight, given)
                if bias is not None:
                    value += (theirs @ bias).float()
            into[others, expert] += value * self.stride
