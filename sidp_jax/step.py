"""The programs of one step: embed -> layers -> logits, and logits -> sampled tokens.

Both are one ``jax.shard_map`` over the whole mesh; nothing but token ids and log probabilities
leaves the devices. They are two programs so that the sampler's variants do not multiply with the
modes and the shapes of the batch: the sampler always sees the widest shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sidp_jax import sampling
from sidp_jax.batch import BatchLayout
from sidp_jax.copied_layers import Arrivals, CopiedForward
from sidp_jax.forward import (
    Forwarded,
    embedded,
    last_logits,
    layer_context,
    read_batch,
    resolve_tokens,
    with_tokens,
)
from sidp_jax.kernels.turn_heads import Turner
from sidp_jax.kv_cache import KV_PARTITION, KVCache
from sidp_jax.mesh import POOL, TENSOR
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes import cas, cas_staggered, replicated, was
from sidp_jax.modes.policy import COLLECTIVE, WAS
from sidp_jax.pool import PoolLayout
from sidp_jax.program_cache import CachedProgram, ProgramCache
from sidp_jax.weights import Weights, partitions

RUN_LAYERS = {
    "replicated": replicated.run_layers,
    "was": was.run_layers,
    "cas": cas.run_layers,
    "cas_staggered": cas_staggered.run_layers,
}
"""The modes. All have one signature and return the same numbers."""

_PER_REPLICA = PartitionSpec(POOL)


@dataclass(frozen=True)
class StepProgram:
    """What a step's programs depend on, besides the mode and the shapes of the batch.

    Attributes:
        config: The model's architecture.
        layout: Who owns what.
        mesh: The devices.
        attention: Implementation of attention, chosen explicitly.
        was_fetch: How WaS fetches a layer: by ``collective``, by ``copies``, or from the ``host``.
        cache: Where compiled programs are kept; None for nowhere.
    """

    config: ModelConfig
    layout: PoolLayout
    mesh: Mesh
    attention: str
    was_fetch: str = COLLECTIVE
    cache: ProgramCache | None = field(default=None, compare=False, repr=False)

    @property
    def kernels(self) -> str:
        """Implementation of everything but attention that has one in ``kernels``."""
        return "reference" if self.attention == "cudnn" else self.attention

    def positions(self, positions: Int[Array, "tokens"], dtype: jnp.dtype) -> jax.Array | Turner:
        """Positions for the layers: on Hopper with the kernel that turns heads by them.

        It takes a whole tile of tokens or more.
        """
        if self.kernels != "mosaic":
            return positions
        from sidp_jax.kernels.turn_heads_mosaic import fits

        whole = fits(positions.shape[0], self.config.head_dim, dtype)
        return Turner(positions, "mosaic") if whole else positions

    @cached_property
    def _arrivals(self) -> Arrivals:
        # One for all shapes of the batch: a step brings the first layer of the next, whatever its
        # shape.
        return Arrivals()

    @property
    def tensor_size(self) -> int:
        """Devices of one replica."""
        return self.mesh.shape[TENSOR]

    @property
    def platform(self) -> str:
        """``cpu`` or ``gpu``."""
        kind = self.mesh.devices.flat[0].platform
        return "gpu" if kind in ("gpu", "cuda") else kind

    def per_replica(self) -> NamedSharding:
        """The sharding of everything that has one entry per replica on its first axis."""
        return NamedSharding(self.mesh, _PER_REPLICA)

    def forward(
        self, mode: str, batch_layout: BatchLayout, widest: BatchLayout, weights: Weights
    ) -> jax.stages.Wrapped | CachedProgram | CopiedForward:
        """The jitted forward program of one mode and batch shape.

        Where WaS fetches by copies it is several programs, which ``CopiedForward`` drives.

        Args:
            mode: A key of ``RUN_LAYERS``.
            batch_layout: Shape of the batch.
            widest: The shape that the sampler expects.
            weights: The weights' specification (``weights_spec``).

        Returns:
            ``forward(weights, kv, last_tokens, buffer) -> Forwarded``, with ``kv`` donated.
            ``last_tokens`` is int32 ``[pool, slots]``, ``buffer`` int32 ``[pool, size]``.
        """
        if self.was_fetch != COLLECTIVE and mode == WAS and self.layout.pooled:
            return CopiedForward(self, batch_layout, widest, self._arrivals)
        kv = KVCache(KV_PARTITION, KV_PARTITION)
        mapped = jax.shard_map(
            partial(_forward, self, mode, batch_layout, widest),
            mesh=self.mesh,
            in_specs=(partitions(weights), kv, _PER_REPLICA, _PER_REPLICA),
            out_specs=Forwarded(kv, _PER_REPLICA, _PER_REPLICA),
            check_vma=False,
        )
        jitted = jax.jit(mapped, donate_argnums=1)
        return self.kept(jitted, "forward", mode, batch_layout, widest)

    def sampler(
        self, variant: str, batch_layout: BatchLayout
    ) -> jax.stages.Wrapped | CachedProgram:
        """The jitted sampling program.

        Args:
            variant: ``greedy``, ``random`` or ``full``; see ``sampling.sample``.
            batch_layout: The widest shape of a batch.

        Returns:
            ``sample(logits, buffer, last_tokens, state) -> (last_tokens, state, sampled)``, with
            ``last_tokens`` and ``state`` donated; ``state`` is None unless ``full``.
        """
        mapped = jax.shard_map(
            partial(_sample, self, variant, batch_layout),
            mesh=self.mesh,
            in_specs=_PER_REPLICA,
            out_specs=_PER_REPLICA,
            check_vma=False,
        )
        return self.kept(jax.jit(mapped, donate_argnums=(2, 3)), "sampler", variant, batch_layout)

    def kept(
        self, jitted: jax.stages.Wrapped, *identity: Any
    ) -> jax.stages.Wrapped | CachedProgram:
        """A program whose compiled form is kept, where there is a cache.

        Args:
            jitted: The program.
            identity: What decides it, besides this object and its arguments.
        """
        if self.cache is None:
            return jitted
        return self.cache.program(jitted, tuple(self.mesh.devices.flat), self, *identity)


def _forward(
    program: StepProgram,
    mode: str,
    batch_layout: BatchLayout,
    widest: BatchLayout,
    weights: Weights,
    kv: KVCache,
    last_tokens: Int[Array, "1 slots"],
    buffer: Int[Array, "1 size"],
) -> Forwarded:
    batch = read_batch(buffer, batch_layout)
    tokens = resolve_tokens(batch, last_tokens[0])
    context = layer_context(program, batch, weights.embedding.dtype)
    x = embedded(context, weights.embedding, tokens)
    mine = KVCache(kv.k[0], kv.v[0])
    x, mine = RUN_LAYERS[mode](context, weights, x, mine)
    logits = last_logits(context, weights, batch, x)
    fed = with_tokens(buffer[0], tokens, batch_layout, widest)
    return Forwarded(KVCache(mine.k[None], mine.v[None]), logits[None], fed[None])


def _sample(
    program: StepProgram,
    variant: str,
    batch_layout: BatchLayout,
    logits: Float[Array, "1 rows vocab"],
    buffer: Int[Array, "1 size"],
    last_tokens: Int[Array, "1 slots"],
    state: sampling.SamplerState | None,
):
    batch = read_batch(buffer, batch_layout)
    state = jax.tree.map(lambda array: array[0], state)
    if state is not None:
        state = sampling.update_state(state, batch.tokens, batch)
    sampled = sampling.sample(
        logits[0],
        batch,
        variant=variant,
        vocab_size=program.config.vocab_size,
        implementation=program.kernels,
        state=state,
    )
    slots = jnp.where(batch.samples > 0, batch.slots, last_tokens.shape[1])
    last = last_tokens[0].at[slots].set(sampled.tokens, mode="drop")
    return jax.tree.map(lambda array: array[None], (last, state, sampled))
