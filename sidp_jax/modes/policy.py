"""Which mode a step runs in: a pure function of numbers, with hysteresis. No jax.

The cost of a step's layers in each mode: the dense compute of its tokens or one read of the
weights, whichever takes longer, and what has to cross the link. ``layers_seconds`` is the one
formula; the plan, the engine's policy and the node simulator all use it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise

from sidp_jax.hardware import Hardware, value_at
from sidp_jax.pool import PoolLayout

WAS = "was"
CAS = "cas"
CAS_STAGGERED = "cas_staggered"
REPLICATED = "replicated"

COLLECTIVE = "collective"
COPIES = "copies"
HOST = "host"
"""How a layer comes in WaS: broadcast by its owner, copied from there, or from the host."""

MOST_BY_COPIES = 2
"""Replicas of a pool up to which copies are preferred: three buffers for each layer of a row that
others own are three layers then, and nine with four replicas, which pooling is to save."""

FETCH_RIDES_UNDER_ATTENTION = False
"""Whether attention, too, hides a broadcast: in today's compiled schedule of WaS it does not."""

ROW_COPY = 1.2
"""Reads of a layer that XLA spends on picking a slab row on the device, without an indexed GEMM:
0.94 ms a stage instead of 0.44 for 1.755 GB at 4.28 TB/s, one H200, 16 tokens."""


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer costs, on one device.

    Attributes:
        num_layers: Layers of the model, over which a step's fixed costs are spread.
        weight_bytes: Bytes of its parameters.
        flops_per_token: Dense FLOPs per token, without attention.
        activation_bytes: Bytes of one token's residual stream.
        qkv_bytes: Bytes of one token's queries, keys and values.
        attended_bytes: Bytes of one token's attention result.
        reduced_bytes: Bytes of one token that one reduction over the devices of a replica moves
            into each of them; 0 where a replica is one device.
    """

    num_layers: int
    weight_bytes: int
    flops_per_token: float
    activation_bytes: int
    qkv_bytes: int
    attended_bytes: int
    reduced_bytes: float = 0.0


def layers_seconds(
    mode: str,
    tokens: int,
    pool_size: int,
    shape: LayerShape,
    hardware: Hardware,
    resident_layers: int = 0,
    attention: float = 0.0,
    was_fetch: str = COLLECTIVE,
) -> float:
    """Seconds of all layers of one step.

    Args:
        mode: ``replicated``, ``was``, ``cas`` (lockstep) or ``cas_staggered``.
        tokens: Tokens per replica in the step.
        pool_size: Replicas of the pool.
        shape: One layer.
        hardware: The GPU and its link.
        resident_layers: Layers that every replica keeps.
        attention: Seconds of one layer's attention, of the replica that takes longest.
        was_fetch: How a layer comes in WaS: ``collective``, ``copies`` or ``host``.

    Raises:
        ValueError: The mode is unknown, or staggered with resident layers.
    """
    layers = shape.num_layers
    reduction = reduction_seconds(tokens, shape, hardware)
    dense = hardware.dense_seconds(tokens, shape.weight_bytes, shape.flops_per_token)
    home = dense + reduction + attention
    first, *later = _spans(layers, pool_size, resident_layers, was_fetch == HOST)
    if mode == REPLICATED or (mode in (WAS, CAS, CAS_STAGGERED) and not later):
        return layers * home
    if mode == WAS:
        spans = (first, *later)
        if was_fetch == COLLECTIVE:
            return _was_seconds(spans, dense, reduction, attention, shape, hardware)
        fetch = fetch_seconds(shape, hardware, was_fetch, pool_size)
        return _copied_seconds(spans, home, fetch, pool_size, hardware, was_fetch)
    if mode == CAS:
        everyone = pool_size * tokens
        served = hardware.dense_seconds(everyone, shape.weight_bytes, shape.flops_per_token)
        served += reduction_seconds(everyone, shape, hardware) + attention
        served += lockstep_hop_seconds(tokens, pool_size, shape, hardware)
        return len(later) * served + resident_layers * home
    if mode == CAS_STAGGERED:
        if resident_layers:
            raise ValueError(f"resident_layers={resident_layers} must be 0 for {mode}")
        # The pipeline is filled and drained once a step.
        stage = _indexed(dense, tokens, shape, hardware) + reduction + attention
        stage += staggered_hop_seconds(tokens, shape, hardware)
        return stage * (layers + pool_size - 1)
    raise ValueError(f"unknown mode {mode!r}; known: {REPLICATED}, {WAS}, {CAS}, {CAS_STAGGERED}")


def _was_seconds(
    spans: tuple[int, ...],
    dense: float,
    reduction: float,
    attention: float,
    shape: LayerShape,
    hardware: Hardware,
) -> float:
    """A fetch rides under the layers before it; nothing is before the first one's."""
    fetch = fetch_seconds(shape, hardware)
    hidden = attention if FETCH_RIDES_UNDER_ATTENTION else 0.0
    *before, last = spans
    seconds = sum(spans) * (attention - hidden) + last * (dense + reduction + hidden)
    for count in before:
        computed = count * (dense + reduction + hidden)
        # Reductions share the link with the fetch, so they lengthen it.
        seconds += max(computed, fetch + count * reduction)
        seconds += hardware.fetch_interference * min(computed, fetch)
    return seconds


def _copied_seconds(
    spans: tuple[int, ...],
    home: float,
    fetch: float,
    pool_size: int,
    hardware: Hardware,
    was_fetch: str,
) -> float:
    """Copies ride under all that a layer does, a row of the slab under the row before it.

    The first row comes under the last one of the step before. A row that is the only one is sent
    for once, and stays.
    """
    first, *later = spans
    rows = [later[at : at + pool_size] for at in range(0, len(later), pool_size)]
    if len(rows) == 1:
        return sum(spans) * home
    share = hardware.copy_interference if was_fetch == COPIES else 0.0
    seconds = first * home
    for row, arriving in zip(rows, (*rows[1:], rows[0]), strict=True):
        # The layers before the first pooled one hide the first row's copies, too.
        hiding = sum(row) + (first if arriving is rows[0] else 0)
        computed, copied = hiding * home, len(arriving) * fetch
        seconds += sum(row) * home + max(0.0, copied - computed) + share * min(computed, copied)
    return seconds


def _indexed(dense: float, tokens: int, shape: LayerShape, hardware: Hardware) -> float:
    """Dense compute whose slab row is known only on the device."""
    if hardware.indexed_matmul_ratio:
        return dense * value_at(hardware.indexed_matmul_ratio, tokens)
    return dense + ROW_COPY * shape.weight_bytes / hardware.memory_bandwidth


def fetch_seconds(
    shape: LayerShape, hardware: Hardware, was_fetch: str = COLLECTIVE, pool_size: int = 1
) -> float:
    """Seconds that one layer takes over the link, or from the host.

    By copies a row of the slab crosses at once, each layer from another owner: on average a layer
    takes as long as the share of replicas that it has to be sent to.
    """
    if was_fetch == HOST:
        return shape.weight_bytes / hardware.host_bandwidth
    if was_fetch == COPIES:
        sent = shape.weight_bytes * (pool_size - 1) / pool_size
        return sent / (hardware.copy_bandwidth or hardware.link_bandwidth)
    return shape.weight_bytes / hardware.link_bandwidth


def preferred_fetch(hardware: Hardware, pool_size: int) -> str:
    """How WaS fetches unless it is told: by copies where their speed is known, in small pools."""
    return COPIES if hardware.copy_bandwidth and pool_size <= MOST_BY_COPIES else COLLECTIVE


def lockstep_hop_seconds(
    tokens: int, pool_size: int, shape: LayerShape, hardware: Hardware
) -> float:
    """Seconds that the activations of one layer are under way in lockstep CaS.

    Into the owner come everyone's activations and attention results, out of it go everyone's
    queries, keys, values and results, one after the other.
    """
    there = shape.activation_bytes + shape.attended_bytes
    back = shape.qkv_bytes + shape.activation_bytes
    moved = (pool_size - 1) * tokens * (there + back)
    return moved / hardware.link_bandwidth + 4 * hardware.hop_latency


def staggered_hop_seconds(tokens: int, shape: LayerShape, hardware: Hardware) -> float:
    """The same in staggered CaS: one replica's queries, keys and values, results, activations."""
    parts = shape.qkv_bytes, shape.attended_bytes, shape.activation_bytes
    return sum(hardware.hop_seconds(tokens * part) for part in parts)


def reduction_seconds(tokens: int, shape: LayerShape, hardware: Hardware) -> float:
    """Seconds of a layer's two reductions over the devices of a replica."""
    if not shape.reduced_bytes:
        return 0.0
    return 2 * (tokens * shape.reduced_bytes / hardware.link_bandwidth + hardware.hop_latency)


@cache
def _spans(num_layers: int, pool_size: int, resident_layers: int, on_host: bool) -> tuple[int, ...]:
    """Layers before the first pooled one, then from each pooled one to the next."""
    pooled = PoolLayout(num_layers, pool_size, resident_layers, on_host).pooled
    return tuple(end - start for start, end in pairwise((0, *pooled, num_layers)))


@dataclass(frozen=True)
class Switch:
    """One change of mode, with the numbers that caused it.

    Attributes:
        step: The step that first ran in the new mode.
        tokens: Tokens per replica of that step.
        old: Mode before.
        new: Mode from then on.
        old_seconds: What the old mode would have cost per layer.
        new_seconds: What the new one costs.
    """

    step: int
    tokens: int
    old: str
    new: str
    old_seconds: float
    new_seconds: float

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.old} -> {self.new} at {self.tokens} tokens per replica "
            f"({self.old_seconds * 1e6:.1f} -> {self.new_seconds * 1e6:.1f} us per layer)"
        )


@dataclass(frozen=True)
class PolicyState:
    """What the policy remembers between steps.

    Attributes:
        mode: Mode of the last step; None before the first.
        steps: Steps decided so far.
    """

    mode: str | None = None
    steps: int = 0


@dataclass(frozen=True)
class Policy:
    """Picks the cheapest mode of each step.

    A change must promise to save at least ``margin`` of the step: around a crossover the modes cost
    the same, and to alternate between them would gain nothing.

    Attributes:
        modes: Modes to choose from.
        pool_size: Replicas of the pool.
        shape: One decoder layer.
        hardware: The GPU and its link.
        margin: Least saving that is worth a switch, as a share of the current mode's cost. Below
            0.05, so that no mode is kept that costs over 5% more than the best.
        resident_layers: Layers that every replica keeps; they cost the same in every mode.
        was_fetch: How a layer comes in WaS: ``collective``, ``copies`` or ``host``.
    """

    modes: tuple[str, ...]
    pool_size: int
    shape: LayerShape
    hardware: Hardware
    margin: float = 0.04
    resident_layers: int = 0
    was_fetch: str = COLLECTIVE

    def __post_init__(self) -> None:
        if not self.modes:
            raise ValueError("a policy needs at least one mode to choose from")
        if not 0 <= self.margin < 0.05:
            raise ValueError(f"margin={self.margin} must lie in [0, 0.05)")

    def seconds(self, mode: str, tokens: int) -> float:
        """Estimated seconds of a step's layers without attention, per layer of the model."""
        key = mode, tokens
        if key not in self._known:
            self._known[key] = self.step_seconds(mode, tokens) / self.shape.num_layers
        return self._known[key]

    def step_seconds(self, mode: str, tokens: int, attention: float = 0.0) -> float:
        """Estimated seconds of all layers of a step; see ``layers_seconds``."""
        return layers_seconds(
            mode,
            tokens,
            self.pool_size,
            self.shape,
            self.hardware,
            self.resident_layers,
            attention,
            self.was_fetch,
        )

    @cached_property
    def _known(self) -> dict[tuple[str, int], float]:
        return {}

    def may_run(self, mode: str, tokens: int) -> bool:
        """Whether ``decide`` can ever answer this mode for a step of so many tokens."""
        best = self.seconds(self.best(tokens), tokens)
        return self.seconds(mode, tokens) * (1 - self.margin) <= best

    def best(self, tokens: int) -> str:
        """The cheapest mode for a step of so many tokens."""
        return min(self.modes, key=lambda mode: self.seconds(mode, tokens))

    def decide(self, state: PolicyState, tokens: int) -> tuple[PolicyState, Switch | None]:
        """The mode for a step of so many tokens per replica.

        Args:
            state: What was decided before.
            tokens: Tokens of the step's largest replica, as padded: what the step really computes.

        Returns:
            The new state, whose ``mode`` is the decision, and the switch if it is one.
        """
        best = self.best(tokens)
        decided = replace(state, steps=state.steps + 1)
        if state.mode is None or best == state.mode:
            return replace(decided, mode=best), None
        old, new = self.seconds(state.mode, tokens), self.seconds(best, tokens)
        if old - new <= self.margin * old:
            return decided, None
        return replace(decided, mode=best), Switch(state.steps, tokens, state.mode, best, old, new)
