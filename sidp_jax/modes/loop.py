"""What the modes share: the order of the layers, and one loop for both forms of the slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from sidp_jax.kv_cache import KVCache
from sidp_jax.mesh import POOL, TENSOR
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import LayerParams, bind_layer, turn_projection
from sidp_jax.models.layers import HeadTurner
from sidp_jax.pool import PoolLayout
from sidp_jax.weights import LayerStack

Index = int | jax.Array
"""A layer or row number: known at trace time (unrolled) or on the device alone (scan)."""

Attend = Callable[..., tuple[jax.Array, KVCache]]
"""``attend(q, k, v, kv, layer, active=None) -> (attended, kv)``.

Writes K and V to the cache, then attends. Where ``active`` is false nothing is written, and the
result means nothing.
"""

Carry = TypeVar("Carry")


@dataclass(frozen=True)
class LayerContext:
    """What every layer of a step needs, besides its own weights.

    Attributes:
        config: The model's architecture.
        layout: Who owns what.
        positions: Position of each token of this replica, ``[tokens]``, or what turns heads by
            them.
        attend: Attention over this replica's KV cache.
        platform: ``cpu`` or ``gpu``: some collectives exist on one of them alone.
        kernels: Implementation of products with weights that the device picks:
            ``indexed_matmul.IMPLEMENTATIONS``.
        tensor_size: Devices of one replica, which share its heads and feed-forward layers.
    """

    config: ModelConfig
    layout: PoolLayout
    positions: jax.Array | HeadTurner
    attend: Attend
    platform: str
    kernels: str
    tensor_size: int = 1

    def reduce(self, partial: jax.Array) -> jax.Array:
        """The sum of what the devices of a replica have computed each."""
        return partial if self.tensor_size == 1 else jax.lax.psum(partial, TENSOR)

    def attend_projection(
        self,
        qkv: jax.Array,
        scales: jax.Array | None,
        place: Index,
        kv: KVCache,
        layer: Index,
        active: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Norms and turns the heads of this replica's tokens, then attends.

        Args:
            qkv: The projection, computed by the layer's owner.
            scales: See ``head_scales``.
            place: The layer's place in them.
            kv: This replica's cache.
            layer: The layer's number in the model.
            active: As for ``attend``.
        """
        of_layer = (None, None) if scales is None else tuple(scales[place])
        heads = turn_projection(self.config, qkv, of_layer, self.positions)
        return self.attend(*heads, kv, layer, active)

    @cached_property
    def run_layer(
        self,
    ) -> Callable[[LayerParams, Index, jax.Array, KVCache], tuple[jax.Array, KVCache]]:
        """``_run_layer``, traced once however many layers a program has."""
        return jax.jit(self._run_layer)

    def _run_layer(
        self, params: LayerParams, layer: Index, x: jax.Array, kv: KVCache
    ) -> tuple[jax.Array, KVCache]:
        """Runs one layer whose weights are here.

        Args:
            params: The layer's parameters.
            layer: Its number in the model.
            x: Residual stream, ``[tokens, hidden]``.
            kv: This replica's cache.
        """
        bound = bind_layer(self.config, params)
        with jax.named_scope("pre_attention"):
            q, k, v = bound.pre_attention(x, self.positions)
        with jax.named_scope("attention"):
            attended, kv = self.attend(q, k, v, kv, layer)
        with jax.named_scope("post_attention"):
            return bound.post_attention(x, attended, self.reduce), kv


def take(stack: LayerStack, index: Index) -> LayerParams:
    """One layer of a stack, whichever form it has."""
    if isinstance(stack, tuple):
        return stack[index]
    return {
        name: jax.lax.dynamic_index_in_dim(array, index, keepdims=False)
        for name, array in stack.items()
    }


def local_slab(pooled: LayerStack) -> LayerStack:
    """This replica's part of the slab, inside ``shard_map``, without the axis of the pool."""
    return jax.tree.map(lambda array: array[0], pooled)


def head_scales(config: ModelConfig, slab: LayerStack) -> jax.Array | None:
    """Scales of the norms of query and key heads of all pooled layers, from their owners.

    Args:
        config: The model's architecture.
        slab: This replica's part of the slab.

    Returns:
        ``[rows * pool, 2, head_dim]``, in order of the layers; None where there are none.
    """
    if not config.qk_norm or not slab:
        return None
    names = "q_norm.scale", "k_norm.scale"
    if isinstance(slab, tuple):
        mine = jnp.stack([jnp.stack([row[name] for name in names]) for row in slab])
    else:
        mine = jnp.stack([slab[name] for name in names], axis=1)
    everyone = jax.lax.all_gather(mine, POOL, axis=1)  # [rows, pool, 2, head_dim]
    return everyone.reshape(-1, *mine.shape[1:])


@dataclass(frozen=True)
class Span:
    """A pooled layer (None before the first one) and the resident layers that follow it.

    Attributes:
        pooled: Number of the pooled layer.
        resident: Numbers of the resident layers up to the next pooled one.
        first_resident: Place of the first of them among all resident layers.
    """

    pooled: Index | None
    resident: tuple[Index, ...]
    first_resident: Index

    @property
    def shape(self) -> tuple[bool, int]:
        """What of the span is visible in a program: two equal shapes can share a loop body."""
        return self.pooled is not None, len(self.resident)

    @property
    def numbers(self) -> np.ndarray:
        """What differs between spans of one shape: the numbers, as one int32 vector."""
        pooled = [] if self.pooled is None else [self.pooled]
        return np.array([self.first_resident, *pooled, *self.resident], np.int32)

    def renumbered(self, numbers: Sequence[Index]) -> Span:
        """The same shape with other numbers, which may be traced."""
        first, *layers = numbers
        pooled = None if self.pooled is None else layers.pop(0)
        return Span(pooled, tuple(layers), first)


def spans(layout: PoolLayout) -> list[Span]:
    """The layers in order: those before the first pooled layer, then a span per pooled layer."""
    heads = (None, *layout.pooled)
    ends = (*layout.pooled, layout.num_layers)
    result, seen = [], 0
    for pooled, end in zip(heads, ends, strict=True):
        start = 0 if pooled is None else pooled + 1
        result.append(Span(pooled, tuple(range(start, end)), seen))
        seen += end - start
    return result


def run_resident(
    context: LayerContext, resident: LayerStack, span: Span, x: jax.Array, kv: KVCache
) -> tuple[jax.Array, KVCache]:
    """Runs the resident layers of a span."""
    for offset, layer in enumerate(span.resident):
        x, kv = context.run_layer(take(resident, span.first_resident + offset), layer, x, kv)
    return x, kv


def loop_rows(
    slab: LayerStack,
    rows: Sequence[Sequence[Span]],
    body: Callable[[Carry, Index, Sequence[Span]], Carry],
    carry: Carry,
) -> Carry:
    """Runs ``body`` for every row of the slab, a super-step each.

    Unrolled, rows are visited one by one. In the scan form each run of rows of the same shape is
    one ``lax.scan`` over the row's number and the numbers of its layers; a row that differs (the
    first, a partly absent last one, one with other resident layers) is visited by itself.

    Args:
        slab: This replica's rows.
        rows: For each row the spans that its super-step runs.
        body: ``body(carry, row, spans) -> carry``; ``row`` is the row's number.
        carry: What a super-step hands to the next.
    """

    def shape(k: int) -> tuple:
        return tuple(span.shape for span in rows[k])

    for _, run in groupby(range(len(rows)), key=shape):
        run = list(run)
        if isinstance(slab, tuple) or len(run) == 1:
            for k in run:
                carry = body(carry, k, rows[k])
            continue
        template = rows[run[0]]
        numbers = tuple(jnp.stack([rows[k][i].numbers for k in run]) for i in range(len(template)))

        def scanned(carry, xs, template=template):
            k, numbers = xs
            renumbered = [
                span.renumbered(list(row)) for span, row in zip(template, numbers, strict=True)
            ]
            return body(carry, k, renumbered), None

        carry, _ = jax.lax.scan(scanned, carry, (jnp.asarray(run, jnp.int32), numbers))
    return carry
