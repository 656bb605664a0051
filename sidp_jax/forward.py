"""The parts of a forward program, inside ``shard_map``: embed, what the layers need, logits.

A step is one program of them (``step``), or several where the host owns layers (``copied_layers``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from sidp_jax.batch import BatchLayout, StepBatch, unpack, widen
from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL, TENSOR
from sidp_jax.models.decoder import embed, head_logits
from sidp_jax.modes.loop import LayerContext
from sidp_jax.weights import Weights

if TYPE_CHECKING:
    from sidp_jax.step import StepProgram


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


def read_batch(buffer: Int[Array, "1 size"], layout: BatchLayout) -> StepBatch:
    """This replica's batch, inside ``shard_map``."""
    return unpack(buffer[0], layout, jax.lax.bitcast_convert_type)


def layer_context(program: StepProgram, batch: StepBatch, dtype: jnp.dtype) -> LayerContext:
    """What the layers of a step need besides weights, inside ``shard_map``.

    Args:
        program: Model, pool and mesh.
        batch: This replica's batch.
        dtype: Type of the activations.
    """
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

    return LayerContext(
        program.config,
        program.layout,
        program.positions(batch.positions, dtype),
        attend,
        program.platform,
        program.kernels,
        program.tensor_size,
    )


def with_tokens(
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


def resolve_tokens(batch: StepBatch, last_tokens: Int[Array, "slots"]) -> Int[Array, "tokens"]:
    """Fills in the tokens that were sampled by the step before and that the host never saw."""
    slots = batch.slots[jnp.minimum(batch.token_rows, batch.slots.shape[0] - 1)]
    sampled = last_tokens[jnp.minimum(slots, last_tokens.shape[0] - 1)]
    return jnp.where(batch.tokens < 0, sampled, batch.tokens)


@jax.named_scope("embed")
def embedded(
    context: LayerContext, embedding: Float[Array, "rows hidden"], tokens: Int[Array, "tokens"]
) -> Float[Array, "tokens hidden"]:
    """Every device looks all tokens up in its part of the vocabulary; the parts are added up."""
    everyone = jax.lax.all_gather(tokens, POOL, tiled=True)
    place = jax.lax.axis_index(POOL) * context.tensor_size + jax.lax.axis_index(TENSOR)
    part = embed(embedding, everyone, place * embedding.shape[0])
    return context.reduce(jax.lax.psum_scatter(part, POOL, tiled=True))


@jax.named_scope("head")
def last_logits(
    context: LayerContext, weights: Weights, batch: StepBatch, x: Float[Array, "tokens hidden"]
) -> Float[Array, "seqs vocab"]:
    """Logits of each row's last token, in float32.

    There are no more rows with a token than tokens; the others' logits stay zeros.
    """
    rows = batch.logit_rows[: x.shape[0]]
    logits = _logits(context, weights, x[rows])
    return jnp.pad(logits, ((0, batch.logit_rows.size - rows.size), (0, 0)))


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
