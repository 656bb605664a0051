"""The weights on the devices: one pytree, its abstract shapes and where every part lies."""

from __future__ import annotations

from math import prod
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sidp_jax.mesh import POOL, TENSOR, parameter_partition
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import LayerParams, layer_spec
from sidp_jax.pool import PoolLayout, padded_vocab

LayerLoop = Literal["scan", "unrolled"]
"""``scan``: layers stacked on an axis, one loop body. ``unrolled``: an array for each layer."""

HOST_MEMORY = "pinned_host"
"""Where layers lie that the host owns: jax's name for memory that a GPU copies from by itself."""

LayerStack = LayerParams | tuple[LayerParams, ...]
"""Several layers: arrays with one more axis (scan), or one dict for each (unrolled)."""


class Weights(NamedTuple):
    """All parameters of a model.

    Attributes:
        pooled: The slab. ``unrolled``: for each row, arrays ``[pool, ...]``; ``scan``: arrays
            ``[pool, rows, ...]``. Entry ``o`` of axis 0 lies on replica ``o``, its owner; where the
            host is the owner, kernels lie in its pinned memory, norms and biases on the device.
        resident: Layers that every replica holds. ``unrolled``: a dict for each; ``scan``: arrays
            ``[layers, ...]``. Empty when there is none.
        embedding: ``[padded vocabulary, hidden]``, vocabulary-sharded over the whole mesh.
        final_norm: ``[hidden]``, replicated.
        head: Like ``embedding``; None when the two are tied.
    """

    pooled: LayerStack
    resident: LayerStack
    embedding: jax.Array | jax.ShapeDtypeStruct
    final_norm: jax.Array | jax.ShapeDtypeStruct
    head: jax.Array | jax.ShapeDtypeStruct | None


def weights_spec(
    config: ModelConfig, layout: PoolLayout, mesh: Mesh, *, layer_loop: LayerLoop, dtype: jnp.dtype
) -> Weights:
    """The abstract weights: a ``ShapeDtypeStruct`` with its sharding for every array.

    Args:
        config: The model's architecture.
        layout: Who owns what.
        mesh: The devices.
        layer_loop: Form of the layers.
        dtype: Type of all parameters.

    Raises:
        ValueError: The host owns layers, and they are to be stacked.
    """
    if layout.on_host and layer_loop == "scan":
        raise ValueError(f"{layer_loop=} must be 'unrolled' where the host owns layers")

    def leaf(
        shape: tuple[int, ...], partition: PartitionSpec, memory: str | None = None
    ) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, partition, memory_kind=memory)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def layer(*leading: tuple[int, str | None]) -> LayerParams:
        sizes, names = [size for size, _ in leading], [name for _, name in leading]
        fetched = HOST_MEMORY if layout.on_host and POOL in names else None
        return {
            name: leaf(
                (*sizes, *spec.shape),
                parameter_partition(spec.axes, *names),
                fetched if name.endswith(".kernel") else None,
            )
            for name, spec in layer_spec(config).items()
        }

    pool, rows, resident = layout.pool_size, layout.rows, layout.resident_layers
    vocab = padded_vocab(config.vocab_size, pool * mesh.shape[TENSOR])
    table = leaf((vocab, config.hidden_size), PartitionSpec((POOL, TENSOR)))
    return Weights(
        pooled=_form(layer_loop, rows, (pool, POOL), layer),
        resident=_form(layer_loop, resident, None, layer),
        embedding=table,
        final_norm=leaf((config.hidden_size,), PartitionSpec()),
        head=None if config.tie_word_embeddings else table,
    )


def _form(layer_loop: LayerLoop, count: int, owner: tuple[int, str] | None, layer) -> LayerStack:
    owners = () if owner is None else (owner,)
    if count == 0:
        return ()
    if layer_loop == "scan":
        return layer(*owners, (count, None))
    return tuple(layer(*owners) for _ in range(count))


def partitions(spec: Any) -> Any:
    """The partition spec of every array of the weights or of a part of them, for ``shard_map``."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, spec)


def nbytes_per_device(spec: Any) -> int:
    """Bytes that one device holds of the weights or other arrays, without what lies on the host."""
    return sum(
        jnp.dtype(leaf.dtype).itemsize * prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(spec)
        if not is_on_host(leaf)
    )


def is_on_host(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether an array lies in the host's pinned memory."""
    return leaf.sharding.memory_kind == HOST_MEMORY
