"""Commands keep the memory of a model's tensors between its calls."""

import sys

import pytest
from models import run_python

_STEPS = """
import resource
import torch
from torchcall._command.memory import keep_memory

if {keep}:
    keep_memory()
torch.set_num_threads(1)


def step():
    return [torch.ones(2_000_000) for _ in range(16)]


step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(folder, *, keep, **env):
    return int(run_python(folder, _STEPS.format(keep=keep), **env).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_memory_is_not_returned_between_calls(tmp_path):
    # 3 steps of 16 tensors of 8 MB: thousands of pages, fewer where pages are huge.
    kept = _page_faults(tmp_path, keep=True)
    assert _page_faults(tmp_path, keep=False) > 3 * kept
    own = {"MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_MMAP_THRESHOLD_": "131072"}
    assert _page_faults(tmp_path, keep=True, **own) > 3 * kept
