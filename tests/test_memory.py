"""What glibc does with freed memory, seen from outside, in processes of their own: it is told for good."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")

SCRIPT = """
import ctypes, os
from st_clp.memory import handing_back_large_blocks, keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes, libc.free.argtypes = (
    ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), (ctypes.c_void_p,)
)
NUMBER, SIZE = 40, 4 << 20

def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def left_by_blocks():
    '''Bytes that stay after blocks were taken and freed, each with a small one behind it that is not.'''
    before = held()
    blocks = []
    for _ in range(NUMBER):
        block = libc.malloc(SIZE)
        libc.memset(block, 1, SIZE)
        blocks.append(block)
        libc.malloc(4096)
    for block in blocks:
        libc.free(block)
    return (held() - before) / (NUMBER * SIZE)

keep_freed_memory()
with handing_back_large_blocks():
    print(left_by_blocks())
print(left_by_blocks())
"""


def shares(**environment: str) -> list[float]:
    """The shares of freed blocks that stay with a process: within the block, and after it."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, env={**own, **environment}
    )
    return [float(line) for line in run.stdout.split()]


def test_large_blocks_go_back_to_the_system_for_a_while_and_stay_again_afterwards() -> None:
    within, after = shares()
    assert within < 0.1
    assert after > 0.9


@pytest.mark.parametrize(
    "by_hand",
    [
        {"MALLOC_MMAP_THRESHOLD_": "33554432", "MALLOC_TRIM_THRESHOLD_": "1073741824"},
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=1073741824"},
    ],
)
def test_what_the_user_has_set_stays(by_hand: dict[str, str]) -> None:
    within, after = shares(**by_hand)
    assert within > 0.9
    # The second time the blocks that were freed serve again.
    assert after < 0.1
