"""Weight as a service: the weights come to the activations, one layer ahead of the compute.

Two layer buffers exist at any time: the one in use and the one that arrives. A super-step
fetches one row of the slab, so each replica sends one layer in it, and computes one layer behind:
while layer ``l`` runs, layer ``l + 1`` arrives. Source: the SiDP paper (arXiv 2605.28095); that a
fetch is tied to the activations, and super-steps that touch one row alone, are ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import LayerParams
from sidp_jax.modes.loop import LayerContext, Span, local_slab, loop_rows, run_resident, spans
from sidp_jax.weights import Weights

# Parameters below this size travel together in one message: norms and biases are a few KB, and
# a message of its own for each would cost its latency many times over.
_PACKED_BYTES = 1 << 16

Pending = tuple[jax.Array, LayerParams | None]
"""Activations, and the layer that they are about to meet."""


def run_layers(
    context: LayerContext, weights: Weights, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs all layers of a step, fetching the pooled ones. Like ``replicated.run_layers``."""
    head, *after = spans(context.layout)
    if not after:
        return run_resident(context, weights.resident, head, x, kv)
    size = context.layout.pool_size

    def compute(buffer: LayerParams | None, span: Span, x: jax.Array, kv: KVCache):
        if span.pooled is not None:
            x, kv = context.run_layer(buffer, span.pooled, x, kv)
        return run_resident(context, weights.resident, span, x, kv)

    def super_step(carry, row: LayerParams, behind: list[Span]):
        x, kv, buffer = carry
        for owner, span in enumerate(behind):
            with jax.named_scope("fetch"):
                (x, buffer), arriving = fetch(row, owner, context.platform, after=(x, buffer))
            x, kv = compute(buffer, span, x, kv)
            buffer = arriving
        return x, kv, buffer

    ordered = [head, *after]
    behind = [
        ordered[first : min(first + size, len(after))] for first in range(0, len(after), size)
    ]
    slab = local_slab(weights.pooled)
    # Before the first fetch has arrived there is nothing to compute with but resident layers.
    x, kv, buffer = loop_rows(slab, behind, super_step, (x, kv, None))
    return compute(buffer, ordered[-1], x, kv)


def fetch(
    row: LayerParams, owner: int, platform: str, *, after: Pending
) -> tuple[Pending, LayerParams]:
    """The layer that one replica holds in a row of the slab, on every replica.

    Args:
        row: The layer that this replica holds in the row.
        owner: The replica whose layer is wanted.
        platform: ``gpu`` broadcasts from the owner; the CPU, which has no broadcast, sums over
            replicas that hold zeros except the owner, to the same bits.
        after: Activations and layer buffer that the fetch may not start before. Without that XLA
            issues every fetch at the top of the step, or several as one, and holds a buffer
            for every layer instead of two.

    Returns:
        ``after``, through which whatever follows is tied to the fetch, and the layer.
    """
    small = [name for name, array in row.items() if array.nbytes < _PACKED_BYTES]
    messages = {name: array for name, array in row.items() if name not in small}
    if small:
        messages["packed"] = jnp.concatenate([row[name].reshape(-1) for name in small])
    if platform == "gpu":
        messages, after = jax.lax.optimization_barrier((messages, after))
        arrived = {
            name: jax.lax.pbroadcast(array, (POOL,), owner) for name, array in messages.items()
        }
    else:
        mine = (jax.lax.axis_index(POOL) == owner) & _true_after(after)
        arrived = {
            name: jax.lax.psum(jnp.where(mine, array, 0), POOL) for name, array in messages.items()
        }
    if small:
        packed, first = arrived.pop("packed"), 0
        for name in small:
            arrived[name] = packed[first : first + row[name].size].reshape(row[name].shape)
            first += row[name].size
    return after, arrived


def _true_after(arrays: Pending) -> jax.Array:
    """True, but not known before the arrays are: XLA's CPU compiler drops optimization barriers."""
    true = jnp.bool_(True)
    for array in jax.tree.leaves(arrays):
        bits = jax.lax.bitcast_convert_type(array.reshape(-1)[0], f"uint{8 * array.itemsize}")
        true &= (bits | 1) != 0
    return true
