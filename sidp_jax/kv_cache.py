"""The paged KV cache on the devices."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sidp_jax.mesh import POOL, TENSOR
from sidp_jax.models.config import ModelConfig


class KVCache(NamedTuple):
    """Keys and values of all layers in pages.

    Attributes:
        k: ``[pool, layers, kv_heads, pages, page_size, head_dim]``; inside a step, where each
            replica sees its own, without the first axis.
        v: The same for values.
    """

    k: jax.Array | jax.ShapeDtypeStruct
    v: jax.Array | jax.ShapeDtypeStruct


KV_PARTITION = PartitionSpec(POOL, None, TENSOR)


def kv_cache_spec(
    config: ModelConfig, mesh: Mesh, *, num_pages: int, page_size: int, dtype: jnp.dtype
) -> KVCache:
    """The abstract cache, with its sharding.

    Args:
        config: The model's architecture.
        mesh: The devices.
        num_pages: Pages of each replica.
        page_size: Tokens of a page.
        dtype: Type of keys and values.
    """
    shape = (
        mesh.shape[POOL],
        config.num_layers,
        config.num_kv_heads,
        num_pages,
        page_size,
        config.head_dim,
    )
    pages = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, KV_PARTITION))
    return KVCache(pages, pages)


def allocate(spec: KVCache) -> KVCache:
    """An empty cache, made on its devices."""
    return jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), spec),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, spec),
    )()
