"""Balance the use of experts, without a term in the loss.

``Balance`` adjusts a bias that is added to the router's logits for selecting only (auxiliary-loss-free balancing,
Wang et al. 2024, arXiv:2408.15664). A step's tokens are counted in the passes that carry gradients, each token once;
the bias moves when the optimizer has stepped. So both passes of a cached loss see one and the same bias, and so does a
layer that gradient checkpointing runs again. All layers' move together, in a few operations on stacked sums. PyTorch
tells when an optimizer of its own has stepped. Others are noticed at the next forward pass in training mode that is not
compiled, by the version of the weights, which fused optimizers do not raise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd import Function
from torch.optim.optimizer import register_optimizer_step_post_hook

from st_clp.moe.configuration import MoESettings
from st_clp.moe.context import ForwardContext, stays_on_device
from st_clp.moe.precise import weighted_sums

if TYPE_CHECKING:
    from st_clp.moe.routing import Router


CENTER_RATE = 0.1
"""How far one optimizer step moves the remembered mean token towards the step's own."""


class Balance:
    """The counts of one router, and the rule that updates its bias.

    The bias of an expert moves by ``rate * spread * (1 - use)`` with ``use`` its tokens relative to an even share and
    ``spread`` the standard deviation of the logits, so that a step does not depend on the scale that the router has
    learnt. The tokens' mean, remembered over steps, is subtracted beforehand (``Router.offset``). The first
    training pass of a router that has no balance yet sets it so that this pass is even.

    All counts stay on the router's device until they are read.
    """

    def __init__(self, settings: MoESettings) -> None:
        self.settings = settings
        self.calibrated: bool | None = None
        """Whether there is a balance; None: its values have not been looked at yet."""
        self._used: Tensor | None = None
        self._step: _StepSums | None = None
        self._seen_version = -1

    def prepare(self, dim: int, device: torch.device) -> None:
        """Create missing counters on the device, before a pass that writes to them is compiled.

        Args:
            dim: The tokens' width.
            device: The router's.
        """
        if self._used is not None and self._used.device == device:
            return
        with torch.inference_mode(False):  # so that they can be written to outside of it too
            used = torch.zeros(self.settings.num_experts, dtype=torch.int64, device=device)
            self._used = used if self._used is None else used.copy_(self._used)
            if self.settings.uses_bias:
                self._step = _StepSums(self.settings.num_experts, dim, device)

    @property
    def used(self) -> list[int]:
        """The tokens of each expert since :meth:`reset`; the host waits for the device."""
        return [0] * self.settings.num_experts if self._used is None else self._used.tolist()

    @used.setter
    def used(self, used: Sequence[int]) -> None:
        assert self._used is not None
        self._used.copy_(torch.tensor(used))

    def reset(self) -> None:
        """Reset the counted use (not the balance)."""
        if self._used is not None:
            self._used.zero_()

    def count(
        self,
        router: Router,
        scores: Tensor,
        tokens: Tensor,
        kept: Tensor | None,
        use: Tensor,
        context: ForwardContext | None,
    ) -> None:
        """Count one forward pass, unless it was counted before or must not count.

        Args:
            router: The router.
            scores: (tokens, experts) the logits, with the mean token's subtracted and the bias added.
            tokens: (tokens, dim).
            kept: (tokens, 1) float32, 1 at tokens and 0 at padding; or None.
            use: (experts,) the tokens that each expert has.
            context: The forward pass.
        """
        if context is None or not context.counts:
            return
        self.prepare(tokens.shape[1], use.device)
        assert self._used is not None
        self._used.add_(use)
        if router.training and self._step is not None and router.weight.requires_grad:
            self._step.add(scores, tokens, kept, use)

    def adjust(self, router: Router, logits: Tensor, tokens: Tensor, kept: Tensor | None) -> None:
        """Update the balance if the optimizer has stepped since the last counted pass."""
        if not router.weight.requires_grad:
            return
        if self.calibrated is None or not (self.calibrated or torch.compiler.is_compiling()):
            self.look(router)
        if not self.calibrated and (kept is None or stays_on_device(kept) or bool(kept.any())):
            self.calibrated = True
            center = _sum(tokens, kept) / (tokens.shape[0] if kept is None else kept.sum().clamp(min=1))
            keep = logits.new_ones(logits.shape[0]) if kept is None else kept.squeeze(1)
            calibrate = calibration if torch.compiler.is_compiling() else _calibration
            found = calibrate(logits, center, router.weight.detach(), keep, self.settings.num_experts_per_tok)
            router.balance_center.copy_(found[: center.numel()])
            router.balance_bias.copy_(found[center.numel() :])
        if not torch.compiler.is_compiling():
            move([router])

    @torch.compiler.disable
    def look(self, router: Router) -> None:
        """Check whether the router has a balance, as after loading; the host waits for the device."""
        self.calibrated = bool(router.balance_bias.any() or router.balance_center.any())

    def settle(self, router: Router) -> None:
        """Update the balance now, as the next forward pass would, so that a checkpoint is complete.

        With several processes, where one alone may be saving, this is not possible: the last step's counts are not in
        the checkpoint.
        """
        if not _distributed():
            move([router])

    def sees_step(self, router: Router, *, stepped: bool = False) -> bool:
        """Whether there are counts of a step since which the optimizer has changed the router; true once a step.

        Args:
            router: The router.
            stepped: Whether the optimizer is known to have stepped, so that nothing needs to be noticed.
        """
        version = router.weight._version
        if version == self._seen_version and not stepped:
            return False
        self._seen_version = version
        return self._step is not None

    def forget_step(self, router: Router) -> None:
        """Forget the counts since the last step: other weights were loaded, to which they do not belong."""
        self._seen_version = router.weight._version
        if self._step is not None:
            self._step.clear()


@torch.no_grad()
def move(routers: Iterable[Router], *, stepped: bool = False) -> None:
    """Update the balance of those ``routers`` that the optimizer has changed since their last counted pass.

    Routers of one width and number of experts move together. The order is the one given, which must be the same in all
    processes: they sum their counts.

    Args:
        routers: The routers.
        stepped: Whether the optimizer is known to have stepped all of them just now.
    """
    alike: dict[tuple[int, int, torch.device], list[Router]] = {}
    for router in routers:
        if router.balance.sees_step(router, stepped=stepped):
            alike.setdefault((*router.weight.shape, router.weight.device), []).append(router)
    for group in alike.values():
        _move_together(group)


def _move_together(routers: Sequence[Router]) -> None:
    steps = [router.balance._step for router in routers]
    counts, spread, mean = _StepSums.counted([step for step in steps if step is not None], routers[0].weight.device)
    total = counts.sum(1, keepdim=True)
    lack = (1 - counts * (counts.shape[1] / total.clamp(min=1e-9))).clamp(-1, 1)
    moved = total > 0  # a step of padding alone says nothing
    change = moved * (lack - lack.mean(1, keepdim=True)) * spread
    weight = moved * CENTER_RATE
    for at, router in enumerate(routers):
        router.balance_bias.add_(change[at], alpha=router.settings.balance_rate)
        router.balance_center.lerp_(mean[at], weight[at])


class _StepSums:
    """Sums over one optimizer step's tokens, independent of how the step is split into passes.

    The mean token's logits are subtracted before, so that squares lose no precision in float32. The bias, which is
    added before too, is the same at all tokens and changes no standard deviation.
    """

    def __init__(self, experts: int, dim: int, device: torch.device) -> None:
        self._moments = torch.zeros(1 + experts, 1 + experts, device=device)
        self._counts, self._tokens = torch.zeros(experts, device=device), torch.zeros(dim, device=device)

    def add(self, scores: Tensor, tokens: Tensor, kept: Tensor | None, use: Tensor) -> None:
        """Add one pass's ``scores`` (tokens, experts), its ``tokens`` (tokens, dim) and ``use`` (experts,)."""
        one_and_scores = torch.nn.functional.pad(scores, (1, 0), value=1.0)
        # in place: a captured graph writes where it wrote when it was captured
        self._moments.addmm_(one_and_scores.t(), one_and_scores if kept is None else one_and_scores * kept)
        self._tokens.add_(_sum(tokens, kept))
        self._counts.add_(use)

    def clear(self) -> None:
        """Start the next step."""
        for sums in (self._moments, self._counts, self._tokens):
            sums.zero_()

    @staticmethod
    def counted(steps: Sequence[_StepSums], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Read the sums of several routers, as means over all processes, and start their next step.

        Returns:
            (routers, experts) counts; (routers, 1) the scores' standard deviation; (routers, dim) the mean token.
        """
        moments = torch.stack([step._moments for step in steps])
        number = moments[:, 0, :1].clamp(min=1)
        mean, squares = moments[:, 0, 1:] / number, moments.diagonal(dim1=1, dim2=2)[:, 1:] / number
        spread = (squares - mean.square()).clamp(min=0).sqrt().mean(1, keepdim=True)
        counts = torch.stack([step._counts for step in steps])
        found = torch.cat([counts, spread, torch.stack([step._tokens for step in steps]) / number], dim=1).to(device)
        for step in steps:
            step.clear()
        if _distributed():
            torch.distributed.all_reduce(found)
            found /= torch.distributed.get_world_size()
        experts = counts.shape[1]
        return found[:, :experts], found[:, experts : experts + 1], found[:, experts + 1 :]


def move_after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Update the balance of the routers that ``optimizer`` has stepped.

    The order is the optimizer's, which is the same in all processes.
    """
    waiting = {id(router.weight): router for router in ROUTERS}
    if waiting:
        parameters = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
        move((waiting[weight] for weight in parameters if weight in waiting), stepped=True)


ROUTERS: WeakSet[Router] = WeakSet()
"""Every router there is."""
register_optimizer_step_post_hook(move_after)


def _sum(tokens: Tensor, kept: Tensor | None) -> Tensor:
    """The sum of the tokens that ``kept`` (tokens, 1) float32 has, (dim,) float32."""
    if kept is None:
        return tokens.sum(0, dtype=torch.float32)
    return weighted_sums(kept, tokens).squeeze(0)


def _distributed() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _calibration(logits: Tensor, center: Tensor, weight: Tensor, keep: Tensor, per_token: int) -> Tensor:
    """The initial balance: the mean token (dim,), then a bias (experts,) with which this pass's tokens spread evenly.

    Args:
        logits: (tokens, experts).
        center: (dim,) the mean token.
        weight: (experts, dim) the router's.
        keep: (tokens,) 1 at tokens, 0 at padding.
        per_token: Experts a token.
    """
    bias = _even_bias(logits - weight.float() @ center, keep, per_token)
    found = torch.cat([center, bias])
    if _distributed():
        torch.distributed.broadcast(found, src=0)
    return found


calibration = torch.library.custom_op("st_clp::calibration", _calibration, mutates_args=())
"""The same as one operation of a compiled graph, which its many rounds would swell otherwise."""
calibration.register_fake(
    lambda logits, center, weight, keep, per_token: center.new_empty(center.numel() + logits.shape[1])
)


def _even_bias(logits: Tensor, keep: Tensor, per_token: int, rounds: int = 60) -> Tensor:
    """Find a bias (experts,) with which the tokens of ``logits`` (tokens, experts) that ``keep`` has spread evenly."""
    logits, keep = logits[:8192], keep[:8192].unsqueeze(1)
    experts, tokens = logits.shape[1], keep.sum().clamp(min=1)
    mean = (logits * keep).sum(0) / tokens
    spread = (((logits - mean).square() * keep).sum(0) / tokens).sqrt().mean()
    bias = mean.mean() - mean
    every = torch.arange(experts, device=logits.device)
    for round_ in range(rounds):
        chosen = (logits + bias).topk(per_token, dim=-1).indices
        counts = ((chosen.unsqueeze(2) == every).sum(1) * keep).sum(0)
        lack = (1 - counts * (experts / counts.sum().clamp(min=1))).clamp(-1, 1)
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


def add_balance_gradient(logits: Tensor, mask: Tensor | None, use: Tensor, weight: float) -> Tensor:
    """Return ``logits`` (tokens, experts), whose gradient will hold the load-balance loss's as well.

    The loss is ``weight * experts * sum_e f_e P_e`` with f the share of the tokens that went to expert e, which ``use``
    (experts,) counts, and P its mean probability (Fedus et al. 2021, arXiv:2101.03961, equation 4), of this forward
    pass alone. It reaches the router with any training loss; it is not divided where gradients are accumulated.
    """
    total = use.sum().clamp(min=1)
    with torch.no_grad():
        use = use / total
        shares = torch.softmax(logits, dim=-1)
        gradient = shares * (use - (shares * use).sum(-1, keepdim=True))
        if mask is not None:
            gradient = gradient * mask.unsqueeze(-1)
        tokens = logits.shape[0] if mask is None else total
        gradient = gradient * (weight * use.numel() / tokens)
    return _BalanceGradient.apply(logits, gradient)
