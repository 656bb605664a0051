"""Compute as a service, lockstep: the activations of all replicas go to the owner of each layer.

The owner runs both halves of the layer for every replica; projections go home in between, where
heads are normed and turned, since a request's KV cache never leaves its home. One replica works and
the others wait, so this pays when a step has few tokens: the tail of a job. Source: the SiDP paper
(arXiv 2605.28095).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import LayerParams, bind_layer
from sidp_jax.modes.loop import (
    Index,
    LayerContext,
    Span,
    head_scales,
    local_slab,
    loop_rows,
    run_resident,
    spans,
    take,
)
from sidp_jax.weights import Weights


def run_layers(
    context: LayerContext, weights: Weights, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs all layers of a step at their owners. Like ``replicated.run_layers``."""
    head, *after = spans(context.layout)
    size = context.layout.pool_size
    slab = local_slab(weights.pooled)
    scales = head_scales(context.config, slab)

    def super_step(carry, k: Index, served: list[Span]):
        x, kv = carry
        row = take(slab, k)
        for owner, span in enumerate(served):
            x, kv = _serve(context, row, owner, scales, k * size + owner, span.pooled, x, kv)
            x, kv = run_resident(context, weights.resident, span, x, kv)
        return x, kv

    x, kv = run_resident(context, weights.resident, head, x, kv)
    served = [after[first : first + size] for first in range(0, len(after), size)]
    return loop_rows(slab, served, super_step, (x, kv))


def _serve(
    context: LayerContext,
    row: LayerParams,
    owner: int,
    scales: jax.Array | None,
    place: Index,
    layer: Index,
    x: jax.Array,
    kv: KVCache,
) -> tuple[jax.Array, KVCache]:
    """Runs one layer for all replicas on its owner, and attention at home."""
    bound = bind_layer(context.config, row)

    def post_attention(x: jax.Array, attended: jax.Array) -> jax.Array:
        return bound.post_attention(x, attended, context.reduce)

    with jax.named_scope("hop"):
        everyone = _gather(x)
    with jax.named_scope("pre_attention"):
        qkv = _on_owner(owner, context.platform, bound.project, everyone)
    with jax.named_scope("hop"):
        qkv = _send_home(qkv)
    with jax.named_scope("attention"):
        attended, kv = context.attend_projection(qkv, scales, place, kv, layer)
    with jax.named_scope("hop"):
        attended = _gather(attended)
    with jax.named_scope("post_attention"):
        y = _on_owner(owner, context.platform, post_attention, everyone, attended)
    with jax.named_scope("hop"):
        return _send_home(y), kv


def _on_owner(
    owner: int, platform: str, function: Callable[..., jax.Array], *arguments: jax.Array
) -> jax.Array:
    """The function's value on the owner, zeros elsewhere.

    On a GPU a branch on the device's own index reads a predicate back to the host at every layer,
    so there all replicas compute on what they hold and the others' result is dropped.
    """
    mine = jax.lax.axis_index(POOL) == owner
    if platform == "gpu":
        return jnp.where(mine, function(*arguments), 0)
    result = jax.eval_shape(function, *arguments)
    return jax.lax.cond(
        mine, function, lambda *_: jnp.zeros(result.shape, result.dtype), *arguments
    )


def _gather(x: jax.Array) -> jax.Array:
    """The tokens of all replicas, ``[pool * tokens, ...]``."""
    return jax.lax.all_gather(x, POOL, tiled=True)


def _send_home(x: jax.Array) -> jax.Array:
    """Each replica's own tokens of what the owner computed; exact, as the others add zeros."""
    return jax.lax.psum_scatter(x, POOL, tiled=True)
