"""A mixture of experts in any encoder."""

from st_clp.moe.configuration import MoESettings
from st_clp.moe.convert import known_architectures, register_architecture
from st_clp.moe.transformer import MoETransformer, is_moe
from st_clp.moe.upcycling import TrainableParameters, load, to_dense, train_only, upcycle
from st_clp.moe.usage import ExpertUsage, ExpertUsageCallback, LayerUsage, expert_usage, reset_usage

__all__ = [
    "ExpertUsage",
    "ExpertUsageCallback",
    "LayerUsage",
    "MoESettings",
    "MoETransformer",
    "TrainableParameters",
    "expert_usage",
    "is_moe",
    "known_architectures",
    "load",
    "register_architecture",
    "reset_usage",
    "to_dense",
    "train_only",
    "upcycle",
]
