"""Even use of the experts without a term in the loss.

``Balance`` adjusts a bias that is added to the router's logits for selecting only (auxiliary-loss-free balancing,
Wang et al. 2024, arXiv:2408.15664). A step's tokens are counted in the passes that carry gradients, each token once;
the bias moves when the optimizer has changed the layer, at the next forward pass in training mode. So both passes
of a cached loss see one and the same bias, and so does a layer that gradient checkpointing runs again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import Function

from st_clp.moe.configuration import MoESettings
from st_clp.moe.context import ForwardContext
from st_clp.moe.precise import weighted_sums

if TYPE_CHECKING:
    from st_clp.moe.routing import Router


CENTER_RATE = 0.1
"""How far one optimizer step moves the remembered mean token towards the step's own."""


class Balance:
    """What one router has counted, and the rule that moves its bias.

    The bias of an expert moves by ``rate * spread * (1 - use)`` with ``use`` its tokens relative to an even share and
    ``spread`` the standard deviation of the logits, so that a step does not depend on the scale that the router has
    learnt. The tokens' mean, remembered over steps, is subtracted beforehand (``Router.selection_bias``). The first
    training pass of a router that has no balance yet sets it so that this pass is even.
    """

    def __init__(self, settings: MoESettings) -> None:
        self.settings = settings
        self.reset()
        self._clear()
        self._seen_version = -1
        self._calibrated: bool | None = None

    def reset(self) -> None:
        """Forget the use counted so far (not the balance)."""
        self.used = [0] * self.settings.num_experts

    def _clear(self) -> None:
        self._counts = [0.0] * self.settings.num_experts
        self._tokens = 0
        self._center: Tensor | float = 0.0
        self._logit_mean: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def count(
        self,
        router: Router,
        logits: Tensor,
        tokens: Tensor,
        mask: Tensor | None,
        counts: list[int],
        context: ForwardContext | None,
    ) -> None:
        """Count one forward pass, unless this pass has been counted or is one that shall not count."""
        if context is None or not context.counts or not context.first_time(router):
            return
        self.used = [total + new for total, new in zip(self.used, counts, strict=True)]
        if router.training and self.settings.uses_bias and router.weight.requires_grad:
            self._counts = [total + new for total, new in zip(self._counts, counts, strict=True)]
            self._add(logits if mask is None else logits[mask], _mean(tokens, mask))

    def _add(self, logits: Tensor, center: Tensor) -> None:
        """Add one pass's tokens to the step's: the same result however the step is cut into passes.

        Means and squared deviations are merged as in Chan et al. 1979: a sum of squares would lose them in float32.
        """
        new = len(logits)
        if not new:
            return
        variance, mean = torch.var_mean(logits.float(), dim=0, correction=0)
        share = new / (self._tokens + new)
        shift = mean - self._logit_mean
        self._squares = self._squares + variance * new + shift.square() * (self._tokens * share)
        self._logit_mean = self._logit_mean + shift * share
        self._center = self._center + (center - self._center) * share
        self._tokens += new

    def adjust(self, router: Router, logits: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        """Move the balance if the optimizer has stepped since the last counted pass."""
        if not router.weight.requires_grad:
            return
        if self._calibrated is None:
            self._calibrated = bool(router.balance_bias.any() or router.balance_center.any())
        if not self._calibrated and (mask is None or mask.any()):
            self._calibrated = True
            self._calibrate(router, logits, tokens, mask)
        self._move(router)

    def settle(self, router: Router) -> None:
        """Move the balance now as the next forward pass would, so that a checkpoint holds all there is to know.

        Among several processes one alone may save, and cannot: there the last step's counts stay out of a checkpoint.
        """
        if not _distributed():
            self._move(router)

    @torch.no_grad()
    def _move(self, router: Router) -> None:
        version, device = router.weight._version, router.weight.device
        if version == self._seen_version:
            return
        self._seen_version = version
        if not self._tokens:
            return
        spread = (torch.as_tensor(self._squares, device=device) / self._tokens).sqrt().mean()
        center = torch.as_tensor(self._center, device=device)
        counted = torch.cat([torch.tensor(self._counts, device=device), spread.reshape(1), center])
        if _distributed():
            torch.distributed.all_reduce(counted)
            counted /= torch.distributed.get_world_size()
        experts = self.settings.num_experts
        counts, spread, mean = counted[:experts], counted[experts], counted[experts + 1 :]
        lack = (1 - counts * (experts / counts.sum().clamp(min=1e-9))).clamp(-1, 1)
        router.balance_bias.add_((lack - lack.mean()) * spread, alpha=self.settings.balance_rate)
        router.balance_center.lerp_(mean, CENTER_RATE)
        self._clear()

    def _calibrate(self, router: Router, logits: Tensor, tokens: Tensor, mask: Tensor | None) -> None:
        center = _mean(tokens, mask)
        centered = logits - router.weight.detach().float() @ center
        bias = _even_bias(centered if mask is None else centered[mask], self.settings)
        if _distributed():
            for tensor in (center, bias):
                torch.distributed.broadcast(tensor, src=0)
        router.balance_center.copy_(center)
        router.balance_bias.copy_(bias)


def _mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean token, (dim,) float32."""
    if mask is None:
        return tokens.mean(0, dtype=torch.float32)
    weights = mask.float() / mask.sum().clamp(min=1)
    return weighted_sums(weights.unsqueeze(1), tokens).squeeze(0)


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _spread(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The standard deviation of an expert's logit over the tokens, experts averaged; a scalar."""
    logits = logits if mask is None else logits[mask]
    return logits.std(dim=0, unbiased=False).mean()


def _even_bias(logits: Tensor, settings: MoESettings, rounds: int = 60) -> Tensor:
    """Find a bias (experts,) with which the tokens of ``logits`` (tokens, experts) spread evenly."""
    logits = logits[:8192]
    bias = logits.mean() - logits.mean(dim=0)
    spread = _spread(logits, None)
    for round_ in range(rounds):
        chosen = (logits + bias).topk(settings.num_experts_per_tok, dim=-1).indices
        counts = torch.bincount(chosen.reshape(-1), minlength=settings.num_experts)
        lack = (1 - counts * (settings.num_experts / counts.sum().clamp(min=1))).clamp(-1, 1)
        bias = bias + (lack - lack.mean()) * spread / (1 + round_ / 4)
    return bias


class _BalanceGradient(Function):
    """Pass the logits through; add the auxiliary loss's gradient to theirs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (added,) = ctx.saved_tensors
        return gradient + added, None


def add_balance_gradient(logits: Tensor, mask: Tensor | None, counts: list[int], weight: float) -> Tensor:
    """Return ``logits`` (tokens, experts), whose gradient will hold the load-balance loss's as well.

    The loss is ``weight * experts * sum_e f_e P_e`` with f the share of the tokens that went to expert e and P its
    mean probability (Fedus et al. 2021, arXiv:2101.03961, equation 4), of this forward pass alone. It reaches the
    router with any training loss; it is not divided where gradients are accumulated.
    """
    total = max(sum(counts), 1)
    use = torch.tensor([count / total for count in counts], device=logits.device)
    with torch.no_grad():
        shares = torch.softmax(logits, dim=-1)
        gradient = shares * (use - (shares * use).sum(-1, keepdim=True))
        if mask is not None:
            gradient = gradient * mask.unsqueeze(-1)
        tokens = logits.shape[0] if mask is None else max(sum(counts), 1)
        gradient = gradient * (weight * len(counts) / max(tokens, 1))
    return _BalanceGradient.apply(logits, gradient)
