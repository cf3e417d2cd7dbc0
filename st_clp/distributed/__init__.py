"""A Ray cluster as encoding and search use it: joining it, and workers that are replaced when they are lost."""

from st_clp.distributed.cluster import connect, import_ray
from st_clp.distributed.workers import Workers, gpus_per_worker

__all__ = ["Workers", "connect", "gpus_per_worker", "import_ray"]
