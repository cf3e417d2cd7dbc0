"""The router: it chooses the experts of each token, learns from the backward pass, and keeps their use even."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from st_clp.moe.balance import ROUTERS, Balance, add_balance_gradient
from st_clp.moe.configuration import MoESettings
from st_clp.moe.context import ForwardContext, current_context, stays_on_device
from st_clp.moe.grouped import counts_by_expert, sort_by_expert
from st_clp.moe.precise import PreciseLinear


@dataclass
class Plan:
    """One routing decision: the tokens of a layer's input, sorted by expert.

    A slot is one token at one of its experts; slot s belongs to token ``s // slots_per_token``. There are two kinds: in
    a processor's eager mode the host knows the ``counts``, and padding is left out; elsewhere they stay on the device
    as ``ends``, and padding is routed too (:mod:`st_clp.moe.grouped`).

    Args:
        leading: The input's shape without its last dimension.
        slots_per_token: Experts a token.
        order: (rows,) the slot of each sorted row; None where all tokens go to one expert in their own order.
        source: (rows,) the token of each sorted row; None where ``order`` is.
        back: (tokens * slots_per_token,) the sorted row of each slot; None where some tokens are padding.
        weights: (tokens, slots_per_token) float32, or None where each token has one expert with weight 1.
        shares: (rows, experts) float32, the router's distribution at each sorted row, or None where nothing learns.
        tried: (tried rows,) the sorted rows whose other experts are tried in the backward pass, or None for none.
        tried_weights: (tried rows,) float32, how many fold each counts, where the host does not know how many there are
            and some of them stand for none.
        known_counts: Rows of each expert, where the host knows them.
        ends: (experts,) int32, where each expert's rows end, where the host does not know.
        owner: (rows,) uint8 or int64, each row's expert, there.
    """

    leading: tuple[int, ...]
    slots_per_token: int
    order: Tensor | None
    source: Tensor | None
    back: Tensor | None
    weights: Tensor | None
    shares: Tensor | None
    tried: Tensor | None = None
    tried_weights: Tensor | None = None
    known_counts: list[int] | None = None
    ends: Tensor | None = None
    owner: Tensor | None = None
    # held until the layer's last projection has run, so that a second up projection need not sort again
    given: Tensor | None = None
    rows: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Rows of each expert; the host waits for the device where it does not know them."""
        if self.known_counts is None:
            assert self.ends is not None
            self.known_counts = torch.diff(self.ends, prepend=self.ends.new_zeros(1)).tolist()
        return self.known_counts


@dataclass
class _Decision:
    """The slots of each expert: ``use`` (experts,) counts those that are not padding; the rest is as in Plan."""

    use: Tensor
    order: Tensor | None = None
    back: Tensor | None = None
    counts: list[int] | None = None
    ends: Tensor | None = None
    owner: Tensor | None = None


class Router(nn.Module):
    """A linear router without bias, ``weight`` (experts, dim), whose decisions are made in float32.

    Args:
        dim: The width of the input that it sees.
        settings: The mixture's settings.
        layer: The index of its layer, for reports.
    """

    balance_bias: Tensor
    balance_center: Tensor

    def __init__(self, dim: int, settings: MoESettings, layer: int, **factory: Any) -> None:
        super().__init__()
        self.settings = settings
        self.layer = layer
        self.weight = nn.Parameter(torch.empty(settings.num_experts, dim, **factory))
        if settings.uses_bias:
            device = factory.get("device")
            self.register_buffer("balance_bias", torch.zeros(settings.num_experts, device=device))
            self.register_buffer("balance_center", torch.zeros(dim, device=device))
        # a number of the module's own: one that is computed from a fraction would be no constant of a compiled graph
        self.sample_stride = settings.sample_stride
        self.balance = Balance(settings)
        # the entropy summed over tokens, and the tokens, while someone measures it
        self.entropy: tuple[float, int] | None = None
        ROUTERS.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, which __init__ has not made
        ROUTERS.add(self)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.settings.uses_bias and not self.balance_bias.is_meta:
            self.balance.look(self)
            self.balance.forget_step(self)

    def draw(self, scale: float, generator: torch.Generator | None) -> None:
        """Draw new weights from a normal distribution with standard deviation ``scale``."""
        values = torch.randn(self.weight.shape, generator=generator) * scale
        with torch.no_grad():
            self.weight.copy_(values.to(self.weight.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Keep the balance in float32 when the model is converted: its steps are below the resolution of bfloat16."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            if value is not None and not value.is_meta:
                setattr(self, name, value.to(device=self.weight.device, dtype=torch.float32))
        if not self.weight.is_meta:
            self.balance.prepare(self.weight.shape[1], self.weight.device)
        return self

    def offset(self) -> Tensor:
        """What is added to the logits for the choice, (experts,): the balance's bias less the mean token's logits.

        Without the latter a step of the weights along the tokens' common direction would move all tokens at once.
        """
        return torch.addmv(self.balance_bias, self.weight.detach().float(), self.balance_center, alpha=-1)

    def forward(self, tokens: Tensor, leading: tuple[int, ...]) -> Plan:
        """Decide for ``tokens`` (tokens, dim), whose shape was ``leading`` + (dim,)."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = PreciseLinear.apply(tokens, self.weight)
            return self._plan(logits, tokens.detach(), leading)

    def _plan(self, logits: Tensor, tokens: Tensor, leading: tuple[int, ...]) -> Plan:
        context = current_context()
        mask = None if context is None else context.mask_for(logits.shape[0])
        kept = None if context is None else context.kept_for(logits.shape[0])
        scores = logits
        if self.settings.uses_bias:
            if self.training:
                self.balance.adjust(self, logits.detach(), tokens, kept)
            scores = logits + self.offset()
        fixed = scores.detach()
        chosen = self._choose(fixed)
        decision = self._on_device(chosen, mask) if stays_on_device(tokens) else self._on_host(chosen, mask)
        self.balance.count(self, fixed, tokens, kept, decision.use, context)
        if self.entropy is not None:
            self._measure_entropy(fixed, mask)
        if self.settings.balance == "loss" and logits.requires_grad and self.training:
            scores = logits = add_balance_gradient(logits, mask, decision.use, self.settings.balance_weight)
        per_token = self.settings.num_experts_per_tok
        plan = Plan(
            leading=leading,
            slots_per_token=per_token,
            order=decision.order,
            source=decision.order if decision.order is None or per_token == 1 else decision.order // per_token,
            back=decision.back,
            weights=torch.softmax(logits.gather(1, chosen), dim=-1) if per_token > 1 else None,
            shares=None,
            known_counts=decision.counts,
            ends=decision.ends,
            owner=decision.owner,
        )
        if per_token == 1 and scores.requires_grad:
            plan.shares = self._shares(scores, plan.source)
            self._set_tried(context, plan, logits.shape[0])
        return plan

    def _on_host(self, chosen: Tensor, mask: Tensor | None) -> _Decision:
        """Sort with counts on the host, leaving padding out."""
        experts, per_token = self.settings.num_experts, self.settings.num_experts_per_tok
        slots = chosen.reshape(-1)
        if mask is not None:
            slots = slots.masked_fill(~_of_slots(mask, per_token), experts)
        use = torch.bincount(slots, minlength=experts + 1)[:experts]
        counts = use.tolist()
        if max(counts) == slots.shape[0]:  # one expert does it all: there is nothing to sort
            return _Decision(use, counts=counts)
        order = torch.argsort(slots, stable=True)[: sum(counts)]
        back = None
        if mask is None:
            back = torch.empty_like(order)
            back[order] = torch.arange(order.numel(), device=order.device)
        return _Decision(use, order, back, counts=counts)

    def _on_device(self, chosen: Tensor, mask: Tensor | None) -> _Decision:
        """Sort on the device, padding included, which does not count as use."""
        experts, per_token = self.settings.num_experts, self.settings.num_experts_per_tok
        slots = chosen.reshape(-1)
        use = counts_by_expert(slots, experts, None if mask is None else _of_slots(mask, per_token))
        found = sort_by_expert(slots, experts)
        order = found.order
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
        return _Decision(use, order, back, ends=found.ends, owner=found.owner)

    def _set_tried(self, context: ForwardContext | None, plan: Plan, tokens: int) -> None:
        """Choose the sorted rows whose other experts are tried."""
        if self.settings.routing != "learned" or not self.sample_stride:
            return
        context = context or ForwardContext(None, counts=False)
        if plan.ends is not None:
            assert plan.back is not None
            places, plan.tried_weights = context.tried_places(self.weight, tokens, self.sample_stride)
            plan.tried = plan.back.index_select(0, places)
            return
        chosen = context.tried_tokens(self.weight, tokens, self.sample_stride)
        plan.tried = (chosen if plan.source is None else chosen.index_select(0, plan.source)).nonzero().squeeze(1)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the experts of each token, (tokens, experts per token)."""
        if self.settings.num_experts_per_tok == 1:
            return scores.argmax(dim=-1, keepdim=True)
        return scores.topk(self.settings.num_experts_per_tok, dim=-1).indices

    def _measure_entropy(self, logits: Tensor, mask: Tensor | None) -> None:
        assert self.entropy is not None
        logits = logits if mask is None else logits[mask]
        logarithms = torch.log_softmax(logits, dim=-1)
        entropy = -(logarithms.exp() * logarithms).sum() / math.log(max(self.settings.num_experts, 2))
        self.entropy = (self.entropy[0] + float(entropy), self.entropy[1] + logits.shape[0])

    def _shares(self, scores: Tensor, source: Tensor | None) -> Tensor:
        """The router's distribution, which replaces the choice in the backward pass."""
        return torch.softmax(scores if source is None else scores.index_select(0, source), dim=-1)

    def extra_repr(self) -> str:
        return f"dim={self.weight.shape[1]}, experts={self.weight.shape[0]}, routing={self.settings.routing!r}"


def _of_slots(mask: Tensor, per_token: int) -> Tensor:
    """The mask (tokens,) of the tokens' slots."""
    return mask if per_token == 1 else mask.repeat_interleave(per_token)
