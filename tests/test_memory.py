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
from st_clp.memory import hand_back_freed_memory, keep_freed_memory

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
print(left_by_blocks())
before = held()
hand_back_freed_memory()
print((before - held()) / (NUMBER * SIZE))
"""


def test_freed_blocks_stay_until_they_are_handed_back() -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run([sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True, env=own)
    stayed, handed_back = (float(line) for line in run.stdout.split())
    assert stayed > 0.9
    assert handed_back > 0.9
