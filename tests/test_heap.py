"""The bounded heap: tensors that are freed between others that stay leave the resident set."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers_engine import environment

# 3 MB of every 11 stay. Of its own accord glibc takes both from the heap once a larger tensor has been freed.
HOLES = """\
import sys, torch
from pathlib import Path
from scaletransfer.engine.heap import bound_heap
if sys.argv[1] != "glibc's own":
    assert bound_heap() == (sys.argv[1] == "bounded")
del_me = torch.ones(7_500_000); del del_me
before = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
stay, go = [], []
for _ in range(50):
    go.append(torch.ones(2_000_000)); stay.append(torch.ones(750_000))
del go
print(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 - before - sum(4 * t.numel() for t in stay))
"""


def holes(how: str, **settings: str) -> int:
    command = [sys.executable, "-c", HOLES, how]
    done = subprocess.run(command, env=environment() | settings, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_freed_tensors_leave_no_holes():
    assert holes("glibc's own") > 200e6 > 50e6 > holes("bounded")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heap")
def test_limits_of_the_environment_stay():
    assert holes("from outside", MALLOC_MMAP_THRESHOLD_=str(32 * 2**20), MALLOC_TRIM_THRESHOLD_=str(2**30)) > 200e6
