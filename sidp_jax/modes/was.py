"""Weight as a service: the weights come to the activations, one layer ahead of the compute.

Each tensor is fetched when its like in the layer before has been used: while layer ``l`` runs its
feed-forward part, the attention's kernels of layer ``l + 1`` arrive, and once the up projection is
over, the feed-forward kernels of ``l + 1`` do. So a layer and the down projection of another are
held at most, not two layers. Every tensor has GEMMs of the layer before to hide beneath.
Fetched by copies, from owners or the host, a step is several programs instead: ``copied_layers``.
Source: the SiDP paper (arXiv 2605.28095); the order of the tensors, and super-steps
that touch one row of the slab alone, are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import ATTENTION, FEED_FORWARD, DecoderLayer, LayerParams, bind_layer
from sidp_jax.modes.loop import (
    Index,
    LayerContext,
    Span,
    local_slab,
    loop_rows,
    run_resident,
    spans,
    take,
)
from sidp_jax.weights import LayerStack, Weights

Tied = TypeVar("Tied")
"""Arrays that a fetch is tied to."""

_KERNELS = (*ATTENTION, *FEED_FORWARD)
_UP, _DOWN = FEED_FORWARD

# XLA starts a collective some GEMMs before its result is needed; one that is marked so, as early
# as its ties allow. On the link all collectives run in the order in which they start.
_EARLY_START = {"_xla_gpu_collective_stream": "p2p"}


def run_layers(
    context: LayerContext, weights: Weights, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs all layers of a step, fetching the pooled ones. Like ``replicated.run_layers``."""
    head, *after = spans(context.layout)
    if not after:
        return run_resident(context, weights.resident, head, x, kv)
    size = context.layout.pool_size
    ordered = [head, *after]
    behind = [
        ordered[first : min(first + size, len(after))] for first in range(0, len(after), size)
    ]
    slab = local_slab(weights.pooled)
    vectors = _gather_vectors(slab)
    first = _Source(slab, vectors, 0, 0, context.platform)
    stages = _Stages(context, first.spec())

    def super_step(carry, k: Index, behind: list[Span]):
        x, kv, buffer = carry
        for owner, span in enumerate(behind):
            source = _Source(slab, vectors, k, owner, context.platform)
            if span.pooled is None:
                # Nothing but resident layers can run before the first fetch has arrived. The last
                # kernel is fetched while the first layer runs, if that is in this super-step.
                kernels = _KERNELS[:-1] if len(behind) > 1 else _KERNELS
                row, x = source.read(kernels, after=x)
                arriving, x = source.fetch(row, kernels, after=x)
                buffer = {**arriving, **source.vectors()}
            else:
                x, kv, buffer = _run_fetched(stages, buffer, source, first, span.pooled, x, kv)
            x, kv = run_resident(context, weights.resident, span, x, kv)
        return x, kv, buffer

    x, kv, buffer = loop_rows(slab, behind, super_step, (x, kv, None))
    x, kv = context.run_layer(buffer, ordered[-1].pooled, x, kv)
    return run_resident(context, weights.resident, ordered[-1], x, kv)


def _run_fetched(
    stages: _Stages,
    buffer: LayerParams,
    source: _Source,
    first: _Source,
    layer: Index,
    x: jax.Array,
    kv: KVCache,
) -> tuple[jax.Array, KVCache, LayerParams]:
    """``LayerContext.run_layer``, while the next layer is fetched.

    Args:
        stages: The parts of a layer.
        buffer: The layer; of the first pooled one the down projection is missing.
        source: Where the next layer is.
        first: Where the first pooled layer is.
        layer: The layer's number.
        x: Residual stream, ``[tokens, hidden]``.
        kv: This replica's cache.

    Returns:
        The activations and the cache after the layer, and the next layer.
    """
    x, kv = stages.attention(_only(buffer, ATTENTION), layer, x, kv)
    if _DOWN not in buffer:
        row, x = first.read([_DOWN], after=x)
        missing, x = first.fetch(row, [_DOWN], after=x)
        buffer = {**buffer, **missing}
    row, (x, up) = source.read((*ATTENTION, _UP), after=(x, buffer[_UP]))
    early, x = source.fetch(row, ATTENTION, after=x)
    gated = stages.up({**_only(buffer, ()), _UP: up}, x)
    # What was fetched before has to be here first: then the link, which is busy with that up to
    # now, has nothing else to do, and XLA cannot start these later.
    late, tied = source.fetch(row, [_UP], after=(gated, early, buffer[_DOWN]))
    row, tied = source.read([_DOWN], after=tied)
    last, (gated, early, down) = source.fetch(row, [_DOWN], after=tied)
    x = stages.down({_DOWN: down}, x, gated)
    return x, kv, {**early, **late, **last, **source.vectors()}


def _only(buffer: LayerParams, kernels: Sequence[str]) -> LayerParams:
    """Some kernels of a layer, and all its vectors."""
    left_out = set(_KERNELS) - set(kernels)
    return {name: array for name, array in buffer.items() if name not in left_out}


@dataclass(frozen=True)
class _Stages:
    """The parts of a layer that fetches start between, each traced once per program.

    Attributes:
        context: What every layer needs.
        specs: Shape and type of every parameter of a layer.
    """

    context: LayerContext
    specs: LayerParams

    @cached_property
    def attention(self) -> Callable[..., tuple[jax.Array, KVCache]]:
        """``attention(parameters, layer, x, kv) -> (x, kv)``."""

        def attention(parameters: LayerParams, layer: Index, x: jax.Array, kv: KVCache):
            bound = self._bind(parameters)
            with jax.named_scope("pre_attention"):
                q, k, v = bound.pre_attention(x, self.context.positions)
            with jax.named_scope("attention"):
                attended, kv = self.context.attend(q, k, v, kv, layer)
            with jax.named_scope("post_attention"):
                return bound.add_attention(x, attended, self.context.reduce), kv

        return jax.jit(attention)

    @cached_property
    def up(self) -> Callable[..., jax.Array]:
        """``up(parameters, x) -> gated``."""

        def up(parameters: LayerParams, x: jax.Array) -> jax.Array:
            with jax.named_scope("post_attention"):
                return self._bind(parameters).feed_forward(x)

        return jax.jit(up)

    @cached_property
    def down(self) -> Callable[..., jax.Array]:
        """``down(parameters, x, gated) -> x``."""

        def down(parameters: LayerParams, x: jax.Array, gated: jax.Array) -> jax.Array:
            with jax.named_scope("post_attention"):
                bound = self._bind(parameters)
                return bound.add_feed_forward(x, gated, self.context.reduce)

        return jax.jit(down)

    def _bind(self, parameters: LayerParams) -> DecoderLayer:
        return bind_layer(self.context.config, {**self.specs, **parameters})


@dataclass(frozen=True)
class _Source:
    """Where a layer is: with one replica, in one row of its slab.

    Attributes:
        slab: The rows of this replica.
        gathered: What ``_gather_vectors`` returns.
        row: The row's number.
        owner: The replica.
        platform: ``gpu`` broadcasts from the owner; the CPU, which has no broadcast, sums over
            replicas that hold zeros except the owner, to the same bits.
    """

    slab: LayerStack
    gathered: LayerParams
    row: Index
    owner: int
    platform: str

    def spec(self) -> LayerParams:
        """Shape and type of each of the layer's parameters."""
        return jax.eval_shape(lambda slab: take(slab, 0), self.slab)

    def vectors(self) -> LayerParams:
        """The layer's small parameters, which are here already."""
        return {name: array[self.owner, self.row] for name, array in self.gathered.items()}

    def read(self, names: Sequence[str], *, after: Tied) -> tuple[LayerParams, Tied]:
        """Kernels of the row, as ``fetch`` wants them.

        A collective reads no slice in place: on a GPU the scan form copies the kernels, and what
        follows is tied to the copies. With an index of its own each owner's copy is made before its
        fetch; shared by all owners it would be held for the whole super-step.
        """
        row, copies = self.row, not isinstance(self.slab, tuple) and self.platform == "gpu"
        if copies:
            row, after = jax.lax.optimization_barrier((jnp.asarray(row, jnp.int32), after))
        kernels = {name: array for name, array in take(self.slab, row).items() if name in names}
        return jax.lax.optimization_barrier((kernels, after)) if copies else (kernels, after)

    def fetch(
        self, kernels: LayerParams, names: Sequence[str], *, after: Tied
    ) -> tuple[LayerParams, Tied]:
        """Some of the layer's kernels, on every replica.

        Args:
            kernels: What ``read`` returned.
            names: Those wanted, in the order in which they are to arrive.
            after: Arrays that the fetch may not start before. Without that XLA issues every fetch
                at the top of the step, or several as one, and holds a buffer for every layer.

        Returns:
            The kernels, and ``after``, through which whatever follows is tied to the fetch.
        """
        wanted = {name: kernels[name] for name in names}
        with jax.named_scope("fetch"):
            if self.platform != "gpu":
                mine = (jax.lax.axis_index(POOL) == self.owner) & _true_after(after)
                kept = {name: jnp.where(mine, array, 0) for name, array in wanted.items()}
                return jax.lax.psum(kept, POOL), after
            wanted, after = jax.lax.optimization_barrier((wanted, after))
            fetched = {}
            for name in names:
                with set_xla_metadata(**(_EARLY_START if name in FEED_FORWARD else {})):
                    fetched[name] = jax.lax.pbroadcast(wanted[name], (POOL,), self.owner)
            return fetched, after


def _gather_vectors(slab: LayerStack) -> LayerParams:
    """The norms and biases of all layers, ``[pool, rows, ...]``, in one message.

    They are a few KB in each layer: with the kernels they would cost the latency of a message.
    """
    rows = slab if isinstance(slab, tuple) else (slab,)
    names = sorted(name for name in rows[0] if name not in _KERNELS)
    join = jnp.stack if isinstance(slab, tuple) else jnp.concatenate
    own = {name: join([row[name] for row in rows]) for name in names}
    flat = [array.reshape(len(array), -1) for array in own.values()]
    sizes = np.cumsum([array.shape[1] for array in flat])[:-1]
    with jax.named_scope("fetch"):
        everyone = jax.lax.all_gather(jnp.concatenate(flat, axis=1), POOL)
    parts = jnp.split(everyone, sizes, axis=2)
    return {
        name: part.reshape(*part.shape[:2], *own[name].shape[1:])
        for name, part in zip(names, parts, strict=True)
    }


def _true_after(arrays: Tied) -> jax.Array:
    """True, but not known before the arrays are: XLA's CPU compiler drops optimization barriers."""
    true = jnp.bool_(True)
    for array in jax.tree.leaves(arrays):
        bits = jax.lax.bitcast_convert_type(array.reshape(-1)[0], f"uint{8 * array.itemsize}")
        true &= (bits | 1) != 0
    return true
