"""Norm and rotary embedding of query and key heads for Hopper, in Pallas' Mosaic GPU dialect.

XLA makes four kernels of this in every layer: it cuts the projection's result apart before it
works on the parts. Here one kernel reads the result once and writes queries, keys and values.

An item is one head of one tile of tokens. Each block takes a run of them, tile by tile, and loads
the cosines and sines of a tile once; a head is turned in place, while the next one arrives.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.mosaic import gpu_kernel, load, swizzled
from sidp_jax.kernels.turn_heads import rotary_tables

ROWS = 64  # tokens of one tile
BLOCKS = 396  # three blocks on each of the 132 multiprocessors of an H100 or H200
_COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def fits(tokens: int, head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes heads of this size and type, of so many tokens."""
    whole = tokens >= ROWS and tokens % 8 == 0  # swizzled rows are copied in groups of eight
    return whole and head_dim == 128 and dtype == jnp.bfloat16


def check_fits(qkv: Array) -> None:
    """Raise ValueError if the kernel cannot take this shape and type."""
    tokens, head_dim = qkv.shape[0], qkv.shape[3]
    if not fits(tokens, head_dim, qkv.dtype):
        raise ValueError(
            f"{qkv.dtype=} must be bfloat16, {head_dim=} 128 and {tokens=} a multiple of 8, "
            f"{ROWS} or more, for the mosaic kernel; use 'reference'"
        )


def turn_heads_mosaic(
    qkv: Float[Array, "tokens kv_heads group head_dim"],
    q_scale: Float[Array, "head_dim"] | None,
    k_scale: Float[Array, "head_dim"] | None,
    positions: Int[Array, "tokens"],
    inverse_frequencies: Float[Array, "half"],
    *,
    eps: float,
    interpret: Any = None,
) -> tuple[
    Float[Array, "tokens heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
]:
    """`turn_heads` with the Hopper kernel; `interpret` runs it on the CPU (tests)."""
    check_fits(qkv)
    # Alike in all layers of a step: XLA makes the two tables once.
    cos, sin = rotary_tables(positions, inverse_frequencies)
    tokens, kv_heads, group, head_dim = qkv.shape
    queries, half = group - 2, head_dim // 2
    tiles = pl.cdiv(tokens, ROWS)
    items = tiles * kv_heads * group
    blocks = min(items, BLOCKS)
    norm = q_scale is not None
    scales = (q_scale, k_scale) if norm else ()

    def columns(ref, first):
        """Half of a scale, for all rows of a tile."""
        x = ref[pl.ds(first, half)] if interpret else load(ref.at[pl.ds(first, half)], _COLUMNS)
        return lax.broadcast_in_dim(x, (ROWS, half), [1])

    def tile_of(ref, first):
        if interpret:
            return ref[:, pl.ds(first, half)]
        return load(ref.at[:, pl.ds(first, half)], plgpu.Layout.WGMMA)

    def kernel(qkv_ref, cos_ref, sin_ref, *refs):
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        q_out, k_out, v_out, x_smem, cos_smem, sin_smem, x_loaded, tables_loaded = refs
        block = lax.axis_index("block")
        begin = lax.div(block * items, jnp.int32(blocks))
        end = lax.div((block + 1) * items, jnp.int32(blocks))

        def place_of(number):
            """The item's tile, its tokens and its head."""
            tile = lax.div(number, jnp.int32(kv_heads * group))
            # The last tile begins early enough to be whole: some rows are written twice, alike.
            rows = pl.ds(jnp.minimum(tile * ROWS, tokens - ROWS), ROWS)
            return tile, rows, lax.rem(number, jnp.int32(kv_heads * group))

        def send_for(number):
            _, rows, head = place_of(number)
            slot = lax.rem(number, jnp.int32(2))
            plgpu.copy_gmem_to_smem(qkv_ref.at[rows, head], x_smem.at[slot], x_loaded.at[slot])

        send_for(begin)

        def item(number, tile_before):
            tile, rows, head = place_of(number)
            kv_head = lax.div(head, jnp.int32(group))
            place = lax.rem(head, jnp.int32(group))
            slot = lax.rem(number, jnp.int32(2))
            x = x_smem.at[slot]

            @pl.when(tile != tile_before)
            def _tables():
                plgpu.commit_smem()  # everybody has read those of the tile before
                plgpu.copy_gmem_to_smem(cos_ref.at[rows], cos_smem, tables_loaded)
                plgpu.copy_gmem_to_smem(sin_ref.at[rows], sin_smem, tables_loaded)

            @pl.when(number + 1 < end)
            def _next():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                send_for(number + 1)

            pl.when(tile != tile_before)(lambda: plgpu.barrier_wait(tables_loaded))
            plgpu.barrier_wait(x_loaded.at[slot])

            @pl.when(place <= queries)
            def _turn():
                parts = [tile_of(x, first).astype(jnp.float32) for first in (0, half)]
                if norm:
                    square = parts[0] * parts[0] + parts[1] * parts[1]
                    mean = square.sum(axis=1) * (1.0 / head_dim)
                    shrink = lax.broadcast_in_dim(lax.rsqrt(mean + eps), (ROWS, half), [0])
                    is_key = place == queries
                    for n, first in enumerate((0, half)):
                        scale = [columns(ref, first) for ref in scale_refs]
                        scale = jnp.where(is_key, scale[1], scale[0])
                        normed = (parts[n] * shrink).astype(qkv.dtype)
                        parts[n] = (scale * normed).astype(jnp.float32)
                cosine, sine = tile_of(cos_smem, 0), tile_of(sin_smem, 0)
                first, second = parts
                turned = (first * cosine - second * sine, second * cosine + first * sine)
                plgpu.commit_smem()  # everybody has read the head
                for begin, part in zip((0, half), turned, strict=True):
                    x[:, pl.ds(begin, half)] = part.astype(qkv.dtype)
                plgpu.commit_smem()

            @pl.when(place < queries)
            def _query():
                plgpu.copy_smem_to_gmem(x, q_out.at[rows, kv_head * queries + place])

            for out, at in ((k_out, queries), (v_out, queries + 1)):

                @pl.when(place == at)
                def _key_or_value(out=out):
                    plgpu.copy_smem_to_gmem(x, out.at[rows, kv_head])

            return tile

        lax.fori_loop(begin, end, item, jnp.int32(-1))
        plgpu.wait_smem_to_gmem(0)

    heads = (kv_heads * queries, kv_heads, kv_heads)
    tile = (ROWS, head_dim)
    return tuple(
        gpu_kernel(
            kernel,
            name="turn_heads",
            grid=blocks,
            out_type=[jax.ShapeDtypeStruct((tokens, n, head_dim), qkv.dtype) for n in heads],
            scratch=[
                swizzled((2, *tile), qkv.dtype),
                swizzled((ROWS, half), jnp.float32),
                swizzled((ROWS, half), jnp.float32),
                plgpu.Barrier(num_barriers=2),
                plgpu.Barrier(num_arrivals=2),
            ],
            interpret=interpret,
        )(qkv.reshape(tokens, kv_heads * group, head_dim), cos, sin, *scales)
    )
