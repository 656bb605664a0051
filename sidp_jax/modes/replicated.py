"""Plain data parallelism: every replica holds every layer. The baseline, and the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sidp_jax.kv_cache import KVCache
from sidp_jax.modes.loop import LayerContext
from sidp_jax.weights import Weights


def run_layers(
    context: LayerContext, weights: Weights, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs all layers of a step from local weights.

    Args:
        context: What every layer needs.
        weights: This replica's weights; all layers are resident.
        x: Embedded tokens, ``[tokens, hidden]``.
        kv: This replica's cache.

    Returns:
        The residual stream after the last layer, and the cache.
    """
    layers = weights.resident
    if isinstance(layers, tuple):
        for layer, params in enumerate(layers):
            x, kv = context.run_layer(params, layer, x, kv)
        return x, kv

    def body(carry, xs):
        params, layer = xs
        return context.run_layer(params, layer, *carry), None

    numbers = jnp.arange(context.layout.num_layers)
    (x, kv), _ = jax.lax.scan(body, (x, kv), (layers, numbers))
    return x, kv
