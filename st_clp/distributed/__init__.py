"""Ray for all stages: joining a cluster, and workers that are replaced when they are lost."""

from st_clp.distributed.cluster import address_of, connect, import_ray, keep
from st_clp.distributed.idle import release_idle
from st_clp.distributed.workers import Failure, Workers, gpus_per_worker, has_room

__all__ = [
    "Failure",
    "Workers",
    "address_of",
    "connect",
    "gpus_per_worker",
    "has_room",
    "import_ray",
    "keep",
    "release_idle",
]
