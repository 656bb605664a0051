"""Random weights for benchmarks, drawn on the devices that own them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, UInt32

from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig

SCALE = 1e-3
"""Values lie in ``[-SCALE, SCALE)``. GEMM speed depends on the data: this is vLLM's choice."""

AbstractParams = dict[str, jax.ShapeDtypeStruct]
NamedArrays = Iterator[tuple[str, jax.Array]]


class DummySource:
    """Uniform values that depend on seed, parameter name, layer and position alone.

    A value is a hash of its position, so that a device draws its own shard and nothing else. The
    counter-based generator of ``jax.random`` would do too, but its programs take seconds to
    compile for every shape, and benchmark weights need no such quality.
    """

    def __init__(self, config: ModelConfig, seed: int):
        self._config = config
        self._seed = seed

    def __enter__(self) -> DummySource:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def pooled_row(self, layers: tuple[int | None, ...], leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        owned = np.array([layer is not None for layer in layers])
        for name, leaf in leaves.items():
            keys = np.stack([self._key(name, layer or 0) for layer in layers])
            yield name, _draw_row(leaf.shape, leaf.dtype, leaf.sharding)(keys, owned)

    def resident_layer(self, layer: int, leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        for name, leaf in leaves.items():
            draw = _draw(leaf.shape, leaf.dtype, leaf.sharding, leaf.shape[0])
            yield name, draw(self._key(name, layer))

    def outer(self, leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        shapes = hf.outer_shapes(self._config)
        for name, leaf in leaves.items():
            draw = _draw(leaf.shape, leaf.dtype, leaf.sharding, shapes[name][0])
            yield name, draw(self._key(name, 0))

    def _key(self, name: str, layer: int) -> np.ndarray:
        """Two words for one parameter of one layer."""
        entropy = (self._seed, zlib.crc32(name.encode()), layer)
        return np.random.SeedSequence(entropy).generate_state(2, np.uint32)


@cache
def _draw_row(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding
) -> jax.stages.Wrapped:
    """Draws ``[pool, ...]`` from one key for each owner; zeros where an owner has no layer."""

    def draw(keys: jax.Array, owned: jax.Array) -> jax.Array:
        values = jax.vmap(lambda key: _uniform(key, shape[1:]))(keys)
        mask = owned.reshape(-1, *(1 for _ in shape[1:]))
        return jnp.where(mask, values, 0.0).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


@cache
def _draw(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding, used_rows: int
) -> jax.stages.Wrapped:
    """Draws an array whose rows from ``used_rows`` on are zero."""

    def draw(key: jax.Array) -> jax.Array:
        rows = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        return jnp.where(rows < used_rows, _uniform(key, shape), 0.0).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def _uniform(key: UInt32[Array, "2"], shape: tuple[int, ...]) -> jax.Array:
    """Float32 values in ``[-SCALE, SCALE)``, from their positions in C order."""
    assert prod(shape) <= 2**32, shape
    position = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        position = position * jnp.uint32(size)
        position = position + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    bits = _mix(_mix(position + key[0]) ^ key[1])
    # 24 bits, all that a float32 holds.
    unit = (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)
    return unit * jnp.float32(2 * SCALE) - jnp.float32(SCALE)


def _mix(x: jax.Array) -> jax.Array:
    """Chris Wellons' ``lowbias32``, an integer hash (https://nullprogram.com/blog/2018/07/31)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
