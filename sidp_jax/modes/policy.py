"""Which mode a step runs in: a pure function of numbers, with hysteresis. No jax.

The cost of one layer in each mode: the dense compute of the step's tokens or one read of the
layer's weights, whichever takes longer, and what has to cross the link.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sidp_jax.hardware import Hardware

WAS = "was"
CAS = "cas"
CAS_STAGGERED = "cas_staggered"
REPLICATED = "replicated"


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
    """

    num_layers: int
    weight_bytes: int
    flops_per_token: float
    activation_bytes: int
    qkv_bytes: int
    attended_bytes: int


def layer_seconds(
    mode: str, tokens: int, pool_size: int, shape: LayerShape, hardware: Hardware
) -> float:
    """Seconds for one pooled layer of a step, without attention: it is the same in every mode.

    Args:
        mode: ``replicated``, ``was``, ``cas`` (lockstep) or ``cas_staggered``.
        tokens: Tokens per replica in the step.
        pool_size: Replicas of the pool.
        shape: The layer.
        hardware: The GPU and its link.
    """

    def dense(count: int) -> float:
        return max(
            count * shape.flops_per_token / hardware.flops,
            shape.weight_bytes / hardware.memory_bandwidth,
        )

    if mode == REPLICATED:
        return dense(tokens)
    if mode == WAS:
        return max(dense(tokens), shape.weight_bytes / hardware.link_bandwidth)
    if mode == CAS:
        # Into the owner come everyone's activations and attention results, out of it go everyone's
        # queries, keys, values and results, one after the other.
        there = shape.activation_bytes + shape.attended_bytes
        back = shape.qkv_bytes + shape.activation_bytes
        moved = (pool_size - 1) * tokens * (there + back)
        return (
            dense(pool_size * tokens) + moved / hardware.link_bandwidth + 4 * hardware.hop_latency
        )
    if mode == CAS_STAGGERED:
        # One replica's queries, keys, values, results and activations move, each in a hop of its
        # own; the pipeline is filled and drained once a step.
        moved = tokens * (shape.qkv_bytes + shape.attended_bytes + shape.activation_bytes)
        stage = dense(tokens) + moved / hardware.link_bandwidth + 3 * hardware.hop_latency
        return stage * (1 + (pool_size - 1) / shape.num_layers)
    raise ValueError(f"unknown mode {mode!r}; known: {REPLICATED}, {WAS}, {CAS}, {CAS_STAGGERED}")


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
    """

    modes: tuple[str, ...]
    pool_size: int
    shape: LayerShape
    hardware: Hardware
    margin: float = 0.04

    def __post_init__(self) -> None:
        if not self.modes:
            raise ValueError("a policy needs at least one mode to choose from")
        if not 0 <= self.margin < 0.05:
            raise ValueError(f"margin={self.margin} must lie in [0, 0.05)")

    def seconds(self, mode: str, tokens: int) -> float:
        """Estimated seconds of one layer; see ``layer_seconds``."""
        return layer_seconds(mode, tokens, self.pool_size, self.shape, self.hardware)

    def may_run(self, mode: str, tokens: int) -> bool:
        """Whether ``decide`` can ever answer this mode for a step of so many tokens."""
        best = min(self.seconds(other, tokens) for other in self.modes)
        return self.seconds(mode, tokens) * (1 - self.margin) <= best

    def decide(self, state: PolicyState, tokens: int) -> tuple[PolicyState, Switch | None]:
        """The mode for a step of so many tokens per replica.

        Args:
            state: What was decided before.
            tokens: Tokens of the step's largest replica, as padded: what the step really computes.

        Returns:
            The new state, whose ``mode`` is the decision, and the switch if it is one.
        """
        best = min(self.modes, key=lambda mode: self.seconds(mode, tokens))
        decided = replace(state, steps=state.steps + 1)
        if state.mode is None or best == state.mode:
            return replace(decided, mode=best), None
        old, new = self.seconds(state.mode, tokens), self.seconds(best, tokens)
        if old - new <= self.margin * old:
            return decided, None
        return replace(decided, mode=best), Switch(state.steps, tokens, state.mode, best, old, new)
