"""The loss itself: (1 - penalty_weight) * contrastive + penalty_weight * penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from st_clp.losses.batch import Batch
from st_clp.losses.choices import Options
from st_clp.losses.contrastive import contrastive_terms
from st_clp.losses.penalties import PENALTIES


def objective(batch: Batch, rows: slice, options: Options, penalty: str, penalty_weight: float) -> Tensor:
    """What some of this process's rows add to the loss; over all its rows this sums to the loss.

    The mean over processes is the loss of the joined batch, as the mean of the gradients is under DDP: the contrastive
    term is divided by this process's rows, the penalty by the joined weights over the number of processes.

    Args:
        batch: The batch.
        rows: Which rows of this process.
        options: The settings of the terms.
        penalty: The kind of penalty.
        penalty_weight: The paper's lambda.

    Returns:
        A scalar.
    """
    # At scale 50 a cosine in bfloat16 would be off by 0.2 in the logit; beside the encoder float32 costs nothing.
    with torch.autocast(device_type=batch.weights.device.type, enabled=False):
        contrastive = contrastive_terms(batch, rows, options).sum() / batch.size
        if batch.weights.shape[1] == 0:
            return contrastive
        terms = PENALTIES[penalty](batch, rows, options)
        weight_sum = torch.where(batch.weight_sum > 0, batch.weight_sum, 1)  # the mean of nothing is 0
        weighted_mean = (batch.weights[rows] * terms).sum() * (batch.processes / weight_sum)
        return (1 - penalty_weight) * contrastive + penalty_weight * weighted_mean
