"""Warm-up of a call, and the number of torch threads with which it is fastest."""

import math
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import torch

from torchcall._call.planning import Prepared

# A measurement ends after so many rounds, or the first one that ends after so many seconds.
_ROUNDS = 25
_SECONDS = 0.7
# In a round, each number of threads is timed for so long, or for so many calls.
_VISIT_SECONDS = 5e-3
_VISIT_CALLS = 20
# But for three calls, if they do not last so long: the first may wait for a thread to wake up.
_LEAST_CALLS = 3
_LEAST_SECONDS = 0.1
# The first round of a slow call ends at a number of threads that is slower than another by this.
_HOPELESS = 3.0
# More threads must be faster by this factor: replicas, devices and other programs need cores, too.
_GAIN = 1.05

# Measurements at the same time would distort each other.
_one_at_a_time = threading.Lock()


def warm_up(prepared: Prepared, operands: list[Any], *, measure: bool) -> None:
    """Runs a call twice and waits for it; then chooses its number of threads, if asked to.

    Args:
        prepared: the call.
        operands: arrays with real data.
        measure: whether to choose. Calls on a GPU run with the process's budget in any case.
    """
    operands = jax.device_put(operands)

    def call() -> list[jax.Array]:
        return jax.block_until_ready(prepared.run(*operands))

    call()
    outputs = call()
    if not measure or any(device.platform != "cpu" for device in outputs[0].devices()):
        return
    plan = prepared.plan
    with _one_at_a_time:
        before = plan.threads
        try:
            rounds = time_threads(call, plan.set_threads, numbers_up_to(thread_budget()))
        except BaseException:
            plan.set_threads(before)
            raise
        plan.set_threads(fastest(rounds))
        plan.thread_times = {n: statistics.median(times) for n, times in rounds.items()}


def measured_threads(calls: list[Prepared]) -> list[dict[str, Any]]:
    """What warm-up measured, for those calls where it did."""
    return [
        {
            "operands": call.plan.operand_shapes,
            "threads": call.plan.threads,
            "us": {n: round(1e6 * seconds, 1) for n, seconds in call.plan.thread_times.items()},
        }
        for call in calls
        if call.plan.thread_times is not None
    ]


def thread_budget() -> int:
    """Torch's threads in a call that has no number of its own."""
    return torch.get_num_threads()


def numbers_up_to(budget: int) -> list[int]:
    """1, 2, 4, … below the budget, and the budget."""
    powers = [1 << k for k in range(budget.bit_length())]
    return [*(n for n in powers if n < budget), budget]


def time_threads(
    call: Callable[[], Any], set_threads: Callable[[int], None], numbers: list[int]
) -> dict[int, list[float]]:
    """Times a call with each number of threads, interleaved.

    Args:
        call: runs the call and waits for it.
        set_threads: sets the number for later calls.
        numbers: ascending. Of a slow call, small numbers are left out once fewer threads have made
            it much slower.

    Returns:
        By number of threads: seconds per call in each round, the median of the round's calls.
        Medians, not minima: on cores that other programs use, the best of many calls with several
        threads is fast where most are slow.
    """
    rounds: dict[int, list[float]] = {number: [] for number in numbers}
    end, late = time.perf_counter() + _SECONDS, False
    for turn in range(_ROUNDS):
        shortest = math.inf
        for number in numbers[::-1] if turn % 2 == 0 else numbers:
            set_threads(number)
            call()  # starts threads, or lets them sleep
            seconds = _visit(call)
            rounds[number].append(seconds)
            shortest = min(shortest, seconds)
            late = time.perf_counter() > end
            if late and seconds > _HOPELESS * shortest:
                break
        if late:
            break
    return {number: seconds for number, seconds in rounds.items() if seconds}


def fastest(rounds: dict[int, list[float]]) -> int:
    """The smallest number of threads within 5 % of the fastest.

    They are compared round by round, which cancels what changes more slowly.
    """
    best = min(rounds.values(), key=statistics.median)

    def slower(times: list[float]) -> float:
        return statistics.median(t / least for t, least in zip(times, best, strict=False))

    return min(number for number, times in rounds.items() if slower(times) <= _GAIN)


def _visit(call: Callable[[], Any]) -> float:
    times: list[float] = []
    begun = last = time.perf_counter()
    while len(times) < _VISIT_CALLS:
        call()
        now = time.perf_counter()
        times.append(now - last)
        last = now
        least = _LEAST_SECONDS if len(times) < _LEAST_CALLS else _VISIT_SECONDS
        if now - begun >= least:
            break
    return statistics.median(times)
