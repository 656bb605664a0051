"""Compute as a service, staggered: each replica runs one layer behind the one before it.

At stage ``s`` replica ``g`` is at layer ``s - g``, whose owner is ``(s - g) % W``: so at every
stage each owner serves just one replica, ``g = (s - o) % W``, and nobody waits. An owner and the
home that it serves exchange projections and attention results by the reflection
``o <-> (s - o) % W``, which is its own inverse; after the layer the activations move on to the next
owner. Heads are normed and turned at home, where their positions are: a projection travels as the
product leaves it. All of these are permutations that repeat after ``W`` stages. Filling and
draining cost ``W - 1`` stages a step.

The GEMMs see one replica's tokens, as at home: the results have the same bits as ``replicated``,
but with the ``mosaic`` kernels, which round in another order than XLA's GEMMs.

At most stages some owners are one row of the slab behind the others, and one program serves them
all: the row is picked on the device. ``mosaic`` picks it while it loads (``IndexedKernel``);
otherwise XLA first makes a copy of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import jax
import jax.numpy as jnp

from sidp_jax.kernels.indexed_matmul import IndexedKernel
from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import LayerParams, bind_layer
from sidp_jax.modes.loop import Index, LayerContext, head_scales, local_slab, take
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


@dataclass(frozen=True)
class _Parts:
    """What is computed at a stage, each part traced once however many stages a program has.

    Attributes:
        pre_attention: ``(params, guest) -> qkv``, the projection.
        attend: ``(qkv, scales, kv, layer, inside) -> (attended, kv)``.
        post_attention: ``(params, guest, attended) -> guest``.
    """

    pre_attention: Callable[[LayerParams, jax.Array], jax.Array]
    attend: Callable[..., tuple[jax.Array, KVCache]]
    post_attention: Callable[[LayerParams, jax.Array, jax.Array], jax.Array]

    @classmethod
    def of(cls, context: LayerContext) -> _Parts:
        """The parts of this step's layers."""

        def pre_attention(params, guest):
            with jax.named_scope("pre_attention"):
                return bind_layer(context.config, params).project(guest)

        def attend(qkv, scales, kv, layer, inside):
            with jax.named_scope("attention"):
                return context.attend_projection(qkv, scales, layer, kv, layer, inside)

        def post_attention(params, guest, attended):
            with jax.named_scope("post_attention"):
                bound = bind_layer(context.config, params)
                return bound.post_attention(guest, attended, context.reduce)

        return cls(*map(jax.jit, (pre_attention, attend, post_attention)))


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
    slab = local_slab(weights.pooled)
    scales = head_scales(context.config, slab)
    stages = [
        _Stage(s % size, s < size, s - (layers - 1) if s >= layers - 1 else None)
        for s in range(layers + size - 1)
    ]
    super_steps = [tuple(stages[first : first + size]) for first in range(0, len(stages), size)]
    moving = _Moving(guest=jnp.zeros_like(x), own=x, kv=kv)
    run = partial(_super_step, context, _Parts.of(context), slab, scales)
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
    parts: _Parts,
    slab: LayerStack,
    scales: jax.Array | None,
    stages: Sequence[_Stage],
    moving: _Moving,
    number: Index,
) -> _Moving:
    """``W`` stages: every owner serves every replica once."""
    size, layers = context.layout.pool_size, context.layout.num_layers
    me = jax.lax.axis_index(POOL)
    for stage in stages:
        s = number * size + stage.phase
        if stage.enters:
            entered = jax.lax.ppermute(moving.own, POOL, [(stage.phase, 0)])
            moving = replace(moving, guest=jnp.where(me == 0, entered, moving.guest))
        # Owners past the phase are still one row behind: their guest entered a round earlier.
        params = _row(slab, number, me > stage.phase, context.kernels)
        x, kv = _serve(context, parts, params, scales, s - me, stage.phase, moving)
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
    parts: _Parts,
    params: LayerParams,
    scales: jax.Array | None,
    home_layer: jax.Array,
    phase: int,
    moving: _Moving,
) -> tuple[jax.Array, KVCache]:
    """One layer of the guest here, and attention for the own tokens, whose weights are elsewhere.

    Args:
        context: What every layer needs.
        parts: What is computed here.
        params: The layer that this owner runs.
        scales: Of all layers; see ``head_scales``.
        home_layer: The layer that the own tokens are at; outside the model before a replica has
            entered and after it has left.
        phase: The stage's phase.
        moving: The guest's activations and the cache.
    """
    size, layers = context.layout.pool_size, context.layout.num_layers
    exchange = [(owner, (phase - owner) % size) for owner in range(size)]
    qkv = parts.pre_attention(params, moving.guest)
    with jax.named_scope("hop"):
        qkv = jax.lax.ppermute(qkv, POOL, exchange)
    inside = (home_layer >= 0) & (home_layer < layers)
    layer = jnp.clip(home_layer, 0, layers - 1)
    attended, kv = parts.attend(qkv, scales, moving.kv, layer, inside)
    with jax.named_scope("hop"):
        attended = jax.lax.ppermute(attended, POOL, exchange)
    return parts.post_attention(params, moving.guest, attended), kv


def _row(slab: LayerStack, number: Index, behind: jax.Array, kernels: str) -> LayerParams:
    """Row ``number`` of the slab, or the one before it on owners that are ``behind``."""
    if isinstance(slab, tuple):
        before, here = (slab[min(max(row, 0), len(slab) - 1)] for row in (number - 1, number))
        rows = {name: (before[name], here[name]) for name in here}
        row = jnp.where(behind, 0, 1)
    else:
        rows = slab
        count = next(iter(slab.values())).shape[0]
        row = jnp.clip(number - behind.astype(jnp.int32), 0, count - 1)
    indexed = {name for name in rows if kernels == "mosaic" and name.endswith(".kernel")}
    params = {name: IndexedKernel(rows[name], row, kernels) for name in indexed}
    rest = {name: array for name, array in rows.items() if name not in indexed}
    if isinstance(slab, tuple):
        selected = {name: jnp.where(behind, *pair) for name, pair in rest.items()}
    else:
        selected = take(rest, row)
    return params | selected
