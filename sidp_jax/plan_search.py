"""Which mode is best for a step, and which configuration for a workload. No jax.

Both by the estimates of ``estimate.py``: the modes by their crossover, the configurations by trying
them all.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, product
from math import ceil

from sidp_jax.estimate import (
    Candidate,
    Memory,
    Setting,
    Throughput,
    Workload,
    memory,
    throughput,
)
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import (
    CAS,
    CAS_STAGGERED,
    HOST,
    REPLICATED,
    WAS,
    Policy,
    fetch_seconds,
    preferred_fetch,
)

SEQS_LADDER = (64, 128, 256, 512, 1024, 2048)
BUDGET_LADDER = (2048, 4096, 8192, 16384)
RESIDENT_STEPS = 10
"""Shares of resident layers that the search tries."""

_BUDGET_MARGINS = (1.03, 1.15)
_BUDGET_STEP = 128

_MOST_TOKENS = 1 << 18
"""Beyond this many tokens per replica and step no mode is looked for."""


def mode_ranges(policy: Policy) -> list[tuple[int, str]]:
    """The cheapest mode by tokens per replica: where each range starts, and its mode.

    Looks at numbers of tokens that lie 5% apart, and for the exact change between two of them.
    """
    ranges = [(1, policy.best(1))]
    below = 1
    while below < _MOST_TOKENS:
        above = max(below + 1, int(below * 1.05))
        mode = policy.best(above)
        if mode != ranges[-1][1]:
            first = _first(lambda tokens, mode=mode: policy.best(tokens) == mode, below, above)
            ranges.append((first, mode))
        below = above
    return ranges


def fetch_hidden_from(policy: Policy) -> int | None:
    """The first number of tokens per replica whose compute takes as long as a fetch."""
    shape, hardware = policy.shape, policy.hardware
    # Of the host's layers there are fewer than of those that a fetch rides under.
    pooled = shape.num_layers - policy.resident_layers
    layers = shape.num_layers / pooled if policy.was_fetch == HOST and pooled else 1
    fetch = fetch_seconds(shape, hardware, policy.was_fetch, policy.pool_size) / layers

    def hidden(tokens: int) -> bool:
        size = shape.weight_bytes, shape.flops_per_token
        return hardware.dense_seconds(tokens, *size) >= fetch

    return _first(hidden, 0, _MOST_TOKENS) if hidden(_MOST_TOKENS) else None


def _first(holds: Callable[[int], bool], below: int, above: int) -> int:
    """The first number after ``below`` for which something holds that holds for ``above``."""
    return below + 1 + bisect(range(below + 1, above), False, key=holds)


@dataclass(frozen=True)
class Option:
    """A configuration with its estimates; ``speed`` is None where it does not fit."""

    candidate: Candidate
    held: Memory
    speed: Throughput | None

    @property
    def rate(self) -> float:
        """Output tokens/s of the node, as estimated; 0 where it does not fit."""
        return 0.0 if self.speed is None else self.speed.output_tokens_per_second

    @property
    def is_pool(self) -> bool:
        """Whether replicas share layers, or could."""
        return self.candidate.pool_size > 1


def evaluate(setting: Setting, candidate: Candidate, workload: Workload) -> Option:
    """Estimates memory and, where it fits, throughput."""
    held = memory(setting, candidate)
    speed = throughput(setting, candidate, held, workload) if held.fits else None
    return Option(candidate, held, speed)


def tensor_sizes(model: ModelConfig, num_devices: int) -> list[int]:
    """Devices of a replica that divide a node, the key heads and the feed-forward layer."""
    counts = num_devices, model.num_kv_heads, model.intermediate_size
    return [size for size in range(1, num_devices + 1) if not any(n % size for n in counts)]


def plain_candidates(model: ModelConfig, num_devices: int, size: int) -> Iterator[Candidate]:
    """Plain data parallelism over replicas of ``size`` devices, in all sizes of a step."""
    for seqs, budget in _step_sizes():
        pools = num_devices // size
        yield Candidate(1, size, pools, model.num_layers, (REPLICATED,), seqs, budget)


def pooled_candidates(
    model: ModelConfig, num_devices: int, modes: tuple[str, ...], hardware: Hardware
) -> Iterator[Candidate]:
    """Every way to pool the devices of a node; resident layers rule out the staggered schedule."""
    residents = range(0, model.num_layers, ceil(model.num_layers / RESIDENT_STEPS))
    for size in tensor_sizes(model, num_devices):
        replicas = num_devices // size
        for pool in range(2, min(replicas, model.num_layers) + 1):
            if replicas % pool == 0:
                fetch = preferred_fetch(hardware, pool)
                for resident, (seqs, budget) in product(residents, _step_sizes()):
                    able = tuple(mode for mode in modes if not resident or mode != CAS_STAGGERED)
                    rest = able, seqs, budget, None, fetch
                    if able:
                        yield Candidate(pool, size, replicas // pool, resident, *rest)


def plain_options(
    setting: Setting, num_devices: int, workload: Workload
) -> dict[int, Option | None]:
    """The best plain configuration for each number of devices of a replica."""
    return {
        size: best(setting, plain_candidates(setting.model, num_devices, size), workload)
        for size in tensor_sizes(setting.model, num_devices)
    }


def pooled_modes(setting: Setting) -> tuple[str, ...]:
    """The modes of ``mode: auto`` in a pool."""
    schedules = (CAS, CAS_STAGGERED) if setting.hardware.indexed_matmul_ratio else (CAS,)
    return (WAS, *schedules)


def pooled_options(
    setting: Setting, num_devices: int, modes: tuple[str, ...], workload: Workload
) -> dict[int, Option]:
    """The best pool for each number of devices of a replica with which one fits."""
    found = {}
    candidates = pooled_candidates(setting.model, num_devices, modes, setting.hardware)
    for size, same in groupby(candidates, key=lambda candidate: candidate.tensor_size):
        option = best(setting, same, workload)
        if option is not None:
            found[size] = option
    return found


def _step_sizes() -> Iterator[tuple[int, int]]:
    return ((s, b) for s, b in product(SEQS_LADDER, BUDGET_LADDER) if s <= b)


def best(setting: Setting, candidates: Iterable[Candidate], workload: Workload) -> Option | None:
    """The candidate of most throughput, the simplest of equals; None where none fits.

    Each that fits is also tried in steps fitted to the workload, see ``_fitted``.
    """
    fitting = []
    for candidate in candidates:
        option = evaluate(setting, candidate, workload)
        if option.speed is None:
            continue
        fitting.append(option)
        fitting += (
            evaluate(setting, fitted, workload)
            for fitted in _fitted(candidate, option.speed.running, workload)
        )
    fits = [option for option in fitting if option.speed is not None]
    return max(fits, key=lambda option: option.rate, default=None)


def _fitted(candidate: Candidate, running: int, workload: Workload) -> Iterator[Candidate]:
    """The candidate with no more sequences than the cache holds, and with steps of even size.

    What holds more sequences than it has pages for preempts them, and reserves more for sampling.
    Where the budget of a step is little more than the mean load, every step prefills as much: the
    shapes are full, and no replica of a pool waits for another one's prompt.
    """
    if running < candidate.max_num_seqs:
        candidate = replace(candidate, max_num_seqs=running)
        yield candidate
    load = running * (1 + workload.prompt / workload.output)
    for margin in _BUDGET_MARGINS:
        budget = ceil(load * margin / _BUDGET_STEP) * _BUDGET_STEP
        if candidate.max_num_seqs <= budget < candidate.max_num_batched_tokens:
            yield replace(candidate, max_num_batched_tokens=budget)
