"""The programs of one step: embed -> layers -> logits, and logits -> sampled tokens.

Both are one ``jax.shard_map`` over the whole mesh; nothing but token ids and log probabilities
leaves the devices. They are two programs so that the sampler's variants do not multiply with the
modes and the shapes of the batch: the sampler always sees the widest shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sidp_jax import sampling
from sidp_jax.batch import BatchLayout, StepBatch, unpack, widen
from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kernels.turn_heads import Turner
from sidp_jax.kv_cache import KV_PARTITION, KVCache
from sidp_jax.mesh import POOL, TENSOR
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import embed, head_logits
from sidp_jax.modes import cas, cas_staggered, replicated, was
from sidp_jax.modes.loop import LayerContext
from sidp_jax.pool import PoolLayout
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
    """

    config: ModelConfig
    layout: PoolLayout
    mesh: Mesh
    attention: str

    @property
    def kernels(self) -> str:
        """Implementation of the cache update and of products with weights that the device picks."""
        return "reference" if self.attention == "cudnn" else self.attention

    def positions(
        self, mode: str, positions: Int[Array, "tokens"], dtype: jnp.dtype
    ) -> jax.Array | Turner:
        """Positions for the layers of a mode: on Hopper with the kernel that turns heads by them.

        It takes a whole tile of tokens or more. In CaS a layer's owner turns the heads of others,
        whose positions travel as an array.
        """
        if self.kernels != "mosaic" or mode not in ("replicated", "was"):
            return positions
        from sidp_jax.kernels.turn_heads_mosaic import fits

        whole = fits(positions.shape[0], self.config.head_dim, dtype)
        return Turner(positions, "mosaic") if whole else positions

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
    ) -> jax.stages.Wrapped:
        """The jitted forward program of one mode and batch shape.

        Args:
            mode: A key of ``RUN_LAYERS``.
            batch_layout: Shape of the batch.
            widest: The shape that the sampler expects.
            weights: The weights' specification (``weights_spec``).

        Returns:
            ``forward(weights, kv, last_tokens, buffer) -> Forwarded``, with ``kv`` donated.
            ``last_tokens`` is int32 ``[pool, slots]``, ``buffer`` int32 ``[pool, size]``.
        """
        kv = KVCache(KV_PARTITION, KV_PARTITION)
        mapped = jax.shard_map(
            partial(_forward, self, mode, batch_layout, widest),
            mesh=self.mesh,
            in_specs=(partitions(weights), kv, _PER_REPLICA, _PER_REPLICA),
            out_specs=Forwarded(kv, _PER_REPLICA, _PER_REPLICA),
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=1)

    def sampler(self, variant: str, batch_layout: BatchLayout) -> jax.stages.Wrapped:
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
        return jax.jit(mapped, donate_argnums=(2, 3))


class Forwarded(NamedTuple):
    """What the forward program returns.

    Attributes:
        kv: The cache, updated in place.
        logits: Of each row's last token, float32 ``[pool, rows, padded vocabulary]``.
        buffer: The batch in its widest shape, with every token that was fed, int32
            ``[pool, size]``.
    """

    kv: KVCache
    logits: jax.Array | PartitionSpec
    buffer: jax.Array | PartitionSpec


def _read(buffer: Int[Array, "1 size"], layout: BatchLayout) -> StepBatch:
    return unpack(buffer[0], layout, jax.lax.bitcast_convert_type)


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
    batch = _read(buffer, batch_layout)
    tokens = _resolve_tokens(batch, last_tokens[0])
    scale = program.config.head_dim**-0.5

    @jax.jit  # so that the kernels are traced once, however many layers there are
    def attend(q, k, v, kv, layer, active=None):
        slots = batch.kv_slots if active is None else jnp.where(active, batch.kv_slots, -1)
        kv = KVCache(*update_kv(kv.k, kv.v, k, v, layer, slots, implementation=program.kernels))
        attended = ragged_attention(
            q,
            kv.k,
            kv.v,
            layer,
            batch.block_tables,
            batch.query_starts,
            batch.context_lens,
            scale=scale,
            implementation=program.attention,
        )
        return attended, kv

    context = LayerContext(
        program.config,
        program.layout,
        program.positions(mode, batch.positions, weights.embedding.dtype),
        attend,
        program.platform,
        program.kernels,
        program.tensor_size,
    )
    with jax.named_scope("embed"):
        x = _embed(context, weights.embedding, tokens)
    mine = KVCache(kv.k[0], kv.v[0])
    x, mine = RUN_LAYERS[mode](context, weights, x, mine)
    with jax.named_scope("head"):
        # There are no more rows with a token than tokens; the others' logits stay zeros.
        rows = batch.logit_rows[: batch_layout.tokens]
        logits = _logits(context, weights, x[rows])
        logits = jnp.pad(logits, ((0, batch_layout.seqs - rows.size), (0, 0)))
    fed = _with_tokens(buffer[0], tokens, batch_layout, widest)
    return Forwarded(KVCache(mine.k[None], mine.v[None]), logits[None], fed[None])


def _with_tokens(
    buffer: Int[Array, "size"],
    tokens: Int[Array, "tokens"],
    layout: BatchLayout,
    widest: BatchLayout,
) -> Int[Array, "widest_size"]:
    """The batch with the tokens that were really fed, in its widest shape."""
    known = jax.lax.dynamic_update_slice(buffer, tokens, (layout.fields["tokens"].offset,))
    return widen(
        known,
        layout,
        widest,
        lambda part, count, value: jnp.pad(part, (0, count), constant_values=value),
        jnp.concatenate,
    )


def _resolve_tokens(batch: StepBatch, last_tokens: Int[Array, "slots"]) -> Int[Array, "tokens"]:
    """Fills in the tokens that were sampled by the step before and that the host never saw."""
    slots = batch.slots[jnp.minimum(batch.token_rows, batch.slots.shape[0] - 1)]
    sampled = last_tokens[jnp.minimum(slots, last_tokens.shape[0] - 1)]
    return jnp.where(batch.tokens < 0, sampled, batch.tokens)


def _embed(
    context: LayerContext, embedding: Float[Array, "rows hidden"], tokens: Int[Array, "tokens"]
) -> Float[Array, "tokens hidden"]:
    """Every device looks all tokens up in its part of the vocabulary; the parts are added up."""
    everyone = jax.lax.all_gather(tokens, POOL, tiled=True)
    place = jax.lax.axis_index(POOL) * context.tensor_size + jax.lax.axis_index(TENSOR)
    part = embed(embedding, everyone, place * embedding.shape[0])
    return context.reduce(jax.lax.psum_scatter(part, POOL, tiled=True))


def _logits(
    context: LayerContext, weights: Weights, x: Float[Array, "rows hidden"]
) -> Float[Array, "rows vocab"]:
    """Every device computes its part of the vocabulary for all rows; the parts go home."""
    everyone = jax.lax.all_gather(x, POOL, tiled=True)
    head = weights.embedding if weights.head is None else weights.head
    part = head_logits(everyone, weights.final_norm, head, context.config.rms_norm_eps)
    home = jax.lax.all_to_all(part, POOL, split_axis=0, concat_axis=1, tiled=True)
    if context.tensor_size == 1:
        return home
    # The vocabulary is cut by replica first, then by the devices of a replica.
    parts = home.reshape(x.shape[0], context.layout.pool_size, head.shape[0])
    whole = jax.lax.all_gather(parts, TENSOR, axis=2)
    return whole.reshape(x.shape[0], -1)


def _sample(
    program: StepProgram,
    variant: str,
    batch_layout: BatchLayout,
    logits: Float[Array, "1 rows vocab"],
    buffer: Int[Array, "1 size"],
    last_tokens: Int[Array, "1 slots"],
    state: sampling.SamplerState | None,
):
    batch = _read(buffer, batch_layout)
    state = jax.tree.map(lambda array: array[0], state)
    if state is not None:
        state = sampling.update_state(state, batch.tokens, batch)
    sampled = sampling.sample(
        logits[0], batch, variant=variant, vocab_size=program.config.vocab_size, state=state
    )
    slots = jnp.where(batch.samples > 0, batch.slots, last_tokens.shape[1])
    last = last_tokens[0].at[slots].set(sampled.tokens, mode="drop")
    return jax.tree.map(lambda array: array[None], (last, state, sampled))
