"""What the backward pass tells the router about its choice: how a router learns with one expert per token.

The softmax over one selected logit is the constant 1 and has no gradient. Here the layer computes
``y = sum_j m_j E_j(x)`` with ``m`` one at the chosen expert and zero elsewhere, so the forward pass is the chosen
expert alone; in the backward pass ``m`` stands for the router's distribution ``p`` (a straight-through estimate).
Then ``dL/dp_j = <dL/dy, E_j(x)>``, and through the softmax the logit of expert j falls by
``p_j <dL/dy, E_j(x) - sum_i p_i E_i(x)>``: to first order, by how much the loss would grow if j did the work rather
than the mean expert. That needs the other experts' results too. They are computed for one token in n only (drawn by
``sampling.py``, counted n-fold, so the estimate has no bias), which costs a share of 1/n of one product an expert.

At conversion the experts are equal and that difference is zero. A hundredth of the chosen expert's own term, at all
tokens, then breaks the tie; as soon as the experts differ, the comparison outweighs it.

How far two kinds of text part company (0 to 1, mean of two layers and four seeds of a tiny model, 200 steps; before
the mean token was taken off in the balance): router fixed 0.14, the chosen expert's own term alone 0.29, its
deviation from the batch's mean 0.27 (and uneven use), the comparison on an eighth of the tokens 0.33, on all 0.35.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from st_clp.moe.precise import inner_products

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
