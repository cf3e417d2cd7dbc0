"""A Ray cluster of three nodes in this machine, and a collection to work on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from st_clp.data import Collection
from tests.distributed.words import collection_of_words

os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Three nodes of one core each, in this machine; this process is part of the cluster."""
    import ray
    from ray.cluster_utils import Cluster

    # A lost node is noticed in two seconds in place of half a minute.
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="session")
def collection() -> Collection:
    return collection_of_words()
