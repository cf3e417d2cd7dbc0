"""The modules that take the place of a feed-forward's projections.

They hand each other the tokens sorted by expert, so that the wide rows between the up and the down projection are
never moved: the first projection of a layer sorts (narrow rows), the last one puts back in order (narrow rows).
"""

from __future__ import annotations

import threading
from typing import Any, cast

import torch
from torch import Tensor, nn

from st_clp.moe.configuration import MoESettings
from st_clp.moe.grouped import StackedLinear
from st_clp.moe.products import GatherRows, GroupedLinear, ScatterRows, gathered_products
from st_clp.moe.router_signal import RouterSignal
from st_clp.moe.routing import Plan, Router


class Dispatch:
    """What the projections of one feed-forward share: the routing decision of the pass that is under way."""

    def __init__(self) -> None:
        # the module that holds a dense down projection, and its name there, if that projection takes sorted rows
        self.sorted_down: tuple[nn.Module, str] | None = None
        self._local = threading.local()

    @property
    def plan(self) -> Plan | None:
        return getattr(self._local, "plan", None)

    @plan.setter
    def plan(self, plan: Plan | None) -> None:
        self._local.plan = plan

    def carries_on(self) -> bool:
        """Whether the next projection takes sorted rows; it does not where an adapter has been put around it."""
        return self.sorted_down is None or isinstance(getattr(*self.sorted_down), SortedLinear)

    def __getstate__(self) -> dict[str, Any]:
        return {"sorted_down": self.sorted_down}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.sorted_down = state["sorted_down"]
        self._local = threading.local()


class ExpertLinear(nn.Module):
    """A linear projection with one weight per expert, in the place of an ``nn.Linear``.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        bias: Whether the experts have one.
        settings: The mixture's settings.
        layer: The index of the layer.
        dispatch: What it shares with the layer's other projections.
        routes: Whether it holds the layer's router; one projection of a layer does.
        sorts: Whether its input is in token order, so that it must sort, or sorted already.
        restores: Whether its output is in token order again, or stays sorted for the next projection.
        last_sorted: Whether no other projection of the layer needs its sorted input any more.
    """

    gate: Router | None
    multiplies_by_weights = True
    """Its experts are not called, so packing them for inference would gain nothing."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        settings: MoESettings,
        layer: int,
        dispatch: Dispatch,
        *,
        routes: bool,
        sorts: bool,
        restores: bool,
        last_sorted: bool = True,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Linear(in_features, out_features, bias, **factory) for _ in range(settings.num_experts)
        )
        self.gate = Router(in_features, settings, layer, **factory) if routes else None
        self.in_features, self.out_features = in_features, out_features
        self.settings, self.layer, self.dispatch = settings, layer, dispatch
        self.sample_stride = settings.sample_stride
        self.sorts, self.restores, self.last_sorted = sorts, restores, last_sorted

    @property
    def weight(self) -> Tensor:
        """The first expert's weight: some encoders look at a projection's weight for its type."""
        return cast(nn.Linear, self.experts[0]).weight

    @property
    def bias(self) -> Tensor | None:
        return cast(nn.Linear, self.experts[0]).bias

    def forward(self, hidden: Tensor) -> Tensor:
        if self.gate is not None and self.last_sorted:
            plan, tokens = self._route(hidden)
            result = self._products(tokens, plan, unsorted=True)
        elif self.gate is not None:
            plan, rows, unsorted = self._sort_for_two(hidden)
            result = self._products(rows, plan, unsorted)
        else:
            plan, rows, unsorted = self._sorted_by_another(hidden)
            result = self._products(rows, plan, unsorted)
        if not self.restores and self.dispatch.carries_on():
            return result
        if self.last_sorted and self.restores:
            self.dispatch.plan = None
        return restore(result, plan)

    def _route(self, hidden: Tensor) -> tuple[Plan, Tensor]:
        """Decide; the tokens come back as rows."""
        assert self.gate is not None
        tokens = hidden.reshape(-1, hidden.shape[-1])
        plan = self.gate(tokens, tuple(hidden.shape[:-1]))
        self.dispatch.plan = plan
        return plan, tokens

    def _sort_for_two(self, hidden: Tensor) -> tuple[Plan, Tensor, bool]:
        """Decide and sort, for this projection and another after it that takes the same input."""
        plan, tokens = self._route(hidden)
        plan.given = hidden
        if plan.ends is not None:  # each sorts for itself, as it adds its bias
            plan.rows = tokens
            return plan, tokens, True
        plan.rows = gather(tokens, plan)
        return plan, plan.rows, False

    def _sorted_by_another(self, hidden: Tensor) -> tuple[Plan, Tensor, bool]:
        plan = self.dispatch.plan
        if plan is None or (self.sorts and (plan.given is not hidden or plan.rows is None)):
            raise RuntimeError(
                f"A projection of layer {self.layer} was called before the one that holds the layer's router, or on "
                "another input. Name an architecture's projections in the order in which its layer calls them."
            )
        if not self.sorts:
            return plan, hidden, False
        rows = cast(Tensor, plan.rows)
        if self.last_sorted:
            plan.given = plan.rows = None
        return plan, rows, plan.ends is not None

    def _products(self, rows: Tensor, plan: Plan, unsorted: bool) -> Tensor:
        """The experts' products with sorted rows, or with tokens that are to be sorted first."""
        experts = list(self.experts)
        if any(type(expert) is not nn.Linear for expert in experts):  # adapters around the experts
            if unsorted:
                rows = gather(rows, plan)
            parts = torch.split(rows, plan.counts)
            return torch.cat([expert(part) for expert, part in zip(experts, parts, strict=True)])
        weights: list[Tensor] = [cast(nn.Linear, expert).weight for expert in experts]
        biases: list[Tensor | None] = [cast(nn.Linear, expert).bias for expert in experts]
        autocast = torch.is_autocast_enabled(rows.device.type)
        if autocast:
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        if plan.ends is not None:
            return self._stacked(rows, plan, unsorted, weights, biases)
        if autocast:
            weights = [weight.to(rows.dtype) for weight in weights]
            biases = [None if bias is None else bias.to(rows.dtype) for bias in biases]
        if unsorted and plan.source is not None:
            if not torch.is_grad_enabled():
                return gathered_products(rows, plan.source, plan.counts, [weight.t() for weight in weights], biases)
            rows = gather(rows, plan)
        signal = None if self._stride(plan) is None else RouterSignal(self.sample_stride, plan.tried)
        return GroupedLinear.apply(rows, plan.shares, plan.counts, signal, *weights, *biases)

    def _stacked(
        self, rows: Tensor, plan: Plan, unsorted: bool, weights: list[Tensor], biases: list[Tensor | None]
    ) -> Tensor:
        """The same by one product of all experts, while the counts stay on the device."""
        source, back = (plan.source, plan.back) if unsorted else (None, None)
        return StackedLinear.apply(
            rows,
            plan.shares,
            source,
            back,
            plan.slots_per_token,
            plan.ends,
            plan.owner,
            self._stride(plan),
            plan.tried,
            plan.tried_weights,
            *weights,
            *biases,
        )

    def _stride(self, plan: Plan) -> int | None:
        """Of how many tokens one has its other experts tried; None where the router learns nothing."""
        return self.sample_stride if self.settings.routing == "learned" and plan.shares is not None else None

    def extra_repr(self) -> str:
        # PEFT shows the module that it refuses, so this is what someone reads whose target_modules name the layer
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, layer={self.layer}, adapters go around "
            'its experts (target_modules=r".*experts\\.\\d+") or past it (exclude_modules)'
        )


class SortedLinear(nn.Module):
    """A dense down projection that takes rows sorted by expert and puts its narrow output in token order.

    It is no ``nn.Linear``, so that an adapter library that would wrap one leaves it alone rather than adding rows of
    two different orders; wrapped all the same, it works as a dense layer on rows in token order.
    """

    def __init__(self, dense: nn.Linear, layer: int, dispatch: Dispatch) -> None:
        super().__init__()
        self.weight, self.bias = dense.weight, dense.bias
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.layer, self.dispatch = layer, dispatch

    def forward(self, rows: Tensor) -> Tensor:
        result = nn.functional.linear(rows, self.weight, self.bias)
        if not self.dispatch.carries_on():
            return result
        plan, self.dispatch.plan = self.dispatch.plan, None
        if plan is None:
            raise RuntimeError(f"The down projection of layer {self.layer} was called without the up projection.")
        return restore(result, plan)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, layer="
            f"{self.layer}, takes rows sorted by expert, so no adapter (leave it to PEFT's exclude_modules)"
        )


def gather(tokens: Tensor, plan: Plan) -> Tensor:
    """Sort tokens (tokens, dim) by expert: a row for each token and each of its experts."""
    if plan.source is None:
        return tokens
    return GatherRows.apply(tokens, plan.source, plan.back, plan.slots_per_token)


def restore(rows: Tensor, plan: Plan) -> Tensor:
    """Put sorted rows back in token order, each token's experts summed by weight: ``plan.leading`` + (dim,)."""
    if plan.order is not None:
        slots = plan.slots_per_token
        for size in plan.leading:
            slots *= size
        rows = ScatterRows.apply(rows, plan.order, plan.back, slots)
    if plan.weights is not None:
        per_token = rows.view(-1, plan.slots_per_token, rows.shape[-1])
        rows = torch.bmm(plan.weights.to(rows.dtype).unsqueeze(1), per_token).squeeze(1)
    return rows.view(*plan.leading, rows.shape[-1])
