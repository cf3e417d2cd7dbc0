"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

from st_clp.extras import import_package
from st_clp.option_values import SettingsError
from st_clp.options import ClusterOptions

LOCAL = "local"
# Ray reads it when it is imported. A cluster of one machine then listens on the loopback address alone.
_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


def import_ray() -> Any:
    """The module ``ray``.

    Raises:
        ModuleNotFoundError: It is not installed; the message says how to.
    """
    return import_package("ray", "working on a cluster", "st-clp[ray]")


def connect(options: ClusterOptions) -> Any:
    """Be part of the cluster that the options name, which this process stays until it ends; return ``ray``.

    A process that is part of a cluster already stays in that one.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        SettingsError: There is no such cluster.
    """
    if options.ray == LOCAL:
        os.environ.update({name: value for name, value in _LOOPBACK_ONLY.items() if name not in os.environ})
    ray = import_ray()
    if ray.is_initialized():
        return ray
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if options.ray == LOCAL:
            # What the user's shell names is another cluster.
            ray.init(address="local", include_dashboard=False, **quiet)
        else:
            _require_answer(str(options.ray))
            ray.init(address=options.ray, **quiet)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())
        if options.ray == LOCAL:
            raise SettingsError(f"ray: Ray cannot be started on this machine: {reason}") from error
        raise SettingsError(
            f"ray: there is no Ray cluster at {options.ray!r} ({reason}); start one with `ray start --head`, give its "
            "address, or give local for one on this machine"
        ) from error
    return ray


def keep(value: Any) -> Any:
    """A reference to a value that is kept in the cluster's memory, or on its disk where that is full.

    Raises:
        OSError: The disk is full too.
    """
    ray = import_ray()
    try:
        return ray.put(value)
    except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
        raise OSError(
            "Ray has no room for what its workers need, neither in memory nor on the disk: free some of the disk, or "
            "start Ray with more memory (ray start --object-store-memory)"
        ) from error


def address_of(options: ClusterOptions) -> str:
    """Where another process finds the cluster that these options name, which this one joins: ``host:port``."""
    return str(connect(options).get_runtime_context().gcs_address)


def _require_answer(address: str) -> None:
    """Find in some seconds that nothing is there, which Ray takes minutes for.

    Raises:
        OSError: Nothing answers at this ``host:port``.
    """
    if found := re.fullmatch(r"(?:ray://)?\[?([^\[\]]+)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
