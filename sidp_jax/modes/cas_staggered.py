"""Compute as a service, staggered: each replica runs one layer behind the one before it.

At stage ``s`` replica ``g`` is at layer ``s - g``, whose owner is ``(s - g) % W``: so at every
stage each owner serves just one replica, ``g = (s - o) % W``, and nobody waits. An owner and the
home that it serves exchange queries, keys, values and attention results by the reflection
``o <-> (s - o) % W``, which is its own inverse; after the layer the activations move on to the next
owner. All of these are permutations that repeat after ``W`` stages. Filling and draining cost
``W - 1`` stages a step.

The GEMMs see one replica's tokens, as at home: the results have the same bits as ``replicated``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp

from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import LayerParams, bind_layer
from sidp_jax.modes.loop import Index, LayerContext, local_slab, take
from sidp_jax.weights import LayerStack, Weights


@dataclass(frozen=True)
class _Stage:
    """What is static about a stage.

    Attributes:
        phase: The stage's number modulo the pool: all of its permutations follow from it.
        enters: Whether the replica of this phase brings its tokens to the first owner.
        leaves: The replica that takes its tokens home from the last owner, or None.
    """

    phase: int
    enters: bool
    leaves: int | None


@dataclass(frozen=True)
class _Moving:
    """What is on its way: the guest's activations at each owner, the own results, the cache."""

    guest: jax.Array
    own: jax.Array
    kv: KVCache


jax.tree_util.register_dataclass(_Moving, ["guest", "own", "kv"], [])


def run_layers(
    context: LayerContext, weights: Weights, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs all layers of a step at their owners. Like ``replicated.run_layers``.

    Raises:
        ValueError: There are resident layers, which have no owner to go to.
    """
    layout = context.layout
    if layout.resident_layers:
        raise ValueError(
            f"resident_layers={layout.resident_layers} must be 0 for the staggered schedule of cas"
        )
    size, layers = layout.pool_size, layout.num_layers
    positions = jax.lax.all_gather(context.positions, POOL)
    slab = local_slab(weights.pooled)
    stages = [
        _Stage(s % size, s < size, s - (layers - 1) if s >= layers - 1 else None)
        for s in range(layers + size - 1)
    ]
    super_steps = [tuple(stages[first : first + size]) for first in range(0, len(stages), size)]
    moving = _Moving(guest=jnp.zeros_like(x), own=x, kv=kv)
    run = partial(_super_step, context, slab, positions)
    for shape, group in groupby(range(len(super_steps)), key=super_steps.__getitem__):
        numbers = list(group)
        if isinstance(slab, tuple) or len(numbers) == 1:
            for number in numbers:
                moving = run(shape, moving, number)
        else:
            moving, _ = jax.lax.scan(
                lambda moving, number, shape=shape: (run(shape, moving, number), None),
                moving,
                jnp.asarray(numbers, jnp.int32),
            )
    return moving.own, moving.kv


def _super_step(
    context: LayerContext,
    slab: LayerStack,
    positions: jax.Array,
    stages: Sequence[_Stage],
    moving: _Moving,
    number: Index,
) -> _Moving:
    """``W`` stages: every owner serves every replica once."""
    size, layers = context.layout.pool_size, context.layout.num_layers
    me = jax.lax.axis_index(POOL)
    for stage in stages:
        s = number * size + stage.phase
        guest = (stage.phase - me) % size
        if stage.enters:
            entered = jax.lax.ppermute(moving.own, POOL, [(stage.phase, 0)])
            moving = replace(moving, guest=jnp.where(me == 0, entered, moving.guest))
        # Owners past the phase are still one row behind: their guest entered a round earlier.
        params = _row(slab, number, me > stage.phase)
        x, kv = _serve(context, params, positions[guest], s - me, stage.phase, moving)
        moving = replace(moving, kv=kv, guest=x)
        if stage.leaves is not None:
            home = stage.leaves
            arrived = jax.lax.ppermute(x, POOL, [((layers - 1) % size, home)])
            moving = replace(moving, own=jnp.where(me == home, arrived, moving.own))
        onward = [(owner, (owner + 1) % size) for owner in range(size)]
        moving = replace(moving, guest=jax.lax.ppermute(moving.guest, POOL, onward))
    return moving


def _serve(
    context: LayerContext,
    params: LayerParams,
    positions: jax.Array,
    home_layer: jax.Array,
    phase: int,
    moving: _Moving,
) -> tuple[jax.Array, KVCache]:
    """One layer of the guest here, and attention for the own tokens, whose weights are elsewhere.

    Args:
        context: What every layer needs.
        params: The layer that this owner runs.
        positions: The guest's positions.
        home_layer: The layer that the own tokens are at; outside the model before a replica has
            entered and after it has left.
        phase: The stage's phase.
        moving: The guest's activations and the cache.
    """
    size, layers = context.layout.pool_size, context.layout.num_layers
    exchange = [(owner, (phase - owner) % size) for owner in range(size)]
    bound = bind_layer(context.config, params)
    with jax.named_scope("pre_attention"):
        qkv = jnp.concatenate(bound.pre_attention(moving.guest, positions), axis=1)
    with jax.named_scope("hop"):
        qkv = jax.lax.ppermute(qkv, POOL, exchange)
    with jax.named_scope("attention"):
        q, k, v = context.split_heads(qkv)
        inside = (home_layer >= 0) & (home_layer < layers)
        layer = jnp.clip(home_layer, 0, layers - 1)
        attended, kv = context.attend(q, k, v, moving.kv, layer, inside)
    with jax.named_scope("hop"):
        attended = jax.lax.ppermute(attended, POOL, exchange)
    with jax.named_scope("post_attention"):
        return bound.post_attention(moving.guest, attended, context.reduce), kv


def _row(slab: LayerStack, number: Index, behind: jax.Array) -> LayerParams:
    """Row ``number`` of the slab, or the one before it on owners that are ``behind``."""
    if not isinstance(slab, tuple):
        rows = next(iter(slab.values())).shape[0]
        return take(slab, jnp.clip(number - behind.astype(jnp.int32), 0, rows - 1))
    here, before = (slab[min(max(row, 0), len(slab) - 1)] for row in (number, number - 1))
    return {name: jnp.where(behind, before[name], here[name]) for name in here}
