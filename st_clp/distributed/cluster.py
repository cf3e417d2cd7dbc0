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
    """Join the cluster that the options name, until this process ends; return the module ``ray``.

    A process that has joined a cluster already stays in it.

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
            # The environment variable of the user's shell may name another cluster.
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
    """Put a value into the cluster's memory (or onto its disk, if memory is full) and return a reference.

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
    """Join the cluster that these options name, and return its address for other processes: ``host:port``."""
    return str(connect(options).get_runtime_context().gcs_address)


def _require_answer(address: str) -> None:
    """Fail within seconds if nothing answers at the address; Ray itself would take minutes.

    Raises:
        OSError: Nothing answers at this ``host:port``.
    """
    if found := re.fullmatch(r"(?:ray://)?\[?([^\[\]]+)\]?:(\d+)", address):
        socket.create_connection((found[1], int(found[2])), timeout=10).close()
