"""The KV update for Hopper, in Pallas' Mosaic GPU dialect: moves by the copy engine alone."""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.mosaic import gpu_kernel, in_place

BLOCKS = 264  # two blocks on each of the 132 multiprocessors of an H100 or H200
MAX_TOKENS = 8  # of one block's buffer


def check_fits(k_pages: Array, k: Array) -> None:
    """Raise ValueError if the kernel cannot take these shapes and types."""
    kv_heads, head_dim = k.shape[1:]
    if k.dtype != k_pages.dtype or k.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{k.dtype=} and {k_pages.dtype=} must both be bfloat16 (or float16)")
    if head_dim not in (64, 128):
        raise ValueError(f"{head_dim=} must be 64 or 128 for the mosaic kernel; use 'reference'")
    if kv_heads > 64:
        raise ValueError(f"{kv_heads=} must be at most 64 for the mosaic kernel; use 'reference'")


def update_kv_mosaic(
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    layer: Int[Array, ""] | int,
    kv_slots: Int[Array, " tokens"],
    *,
    interpret: Any = None,
) -> tuple[
    Float[Array, "layers kv_heads pages page_size head_dim"],
    Float[Array, "layers kv_heads pages page_size head_dim"],
]:
    """`update_kv` with the Hopper kernel; `interpret` runs it on the CPU (tests)."""
    check_fits(k_pages, k)
    tokens, kv_heads, head_dim = k.shape
    layers, _, pages, page_size, _ = k_pages.shape
    size = min(MAX_TOKENS, pl.cdiv(tokens, BLOCKS))
    if tokens % size:  # whole buffers only
        more = size - tokens % size
        k, v = (jnp.pad(x, ((0, more), (0, 0), (0, 0))) for x in (k, v))
        kv_slots = jnp.pad(kv_slots, (0, more), constant_values=-1)
    pieces = k.shape[0] // size
    blocks = min(pieces, BLOCKS)

    def kernel(k_ref, v_ref, layer_ref, slots_ref, k_out, v_out, k_smem, v_smem, loaded):
        block = lax.axis_index("block")

        def piece(i, _):
            first = (block + i * blocks) * size
            plgpu.copy_gmem_to_smem(k_ref.at[pl.ds(first, size)], k_smem, loaded)
            plgpu.copy_gmem_to_smem(v_ref.at[pl.ds(first, size)], v_smem, loaded)
            slots = [slots_ref[first + t] for t in range(size)]
            plgpu.barrier_wait(loaded)
            for t, slot in enumerate(slots):

                @pl.when(slot >= 0)
                def _write(t=t, slot=slot):
                    for smem, out in ((k_smem, k_out), (v_smem, v_out)):
                        plgpu.copy_smem_to_gmem(smem.at[t], out.at[layer_ref[0], :, slot])

            plgpu.wait_smem_to_gmem(0)

        lax.fori_loop(0, lax.div(pieces - 1 - block, jnp.int32(blocks)) + 1, piece, None)

    flat = (layers, kv_heads, pages * page_size, head_dim)
    k_out, v_out = (
        in_place(x.reshape(flat), interpret=bool(interpret)) for x in (k_pages, v_pages)
    )
    gpu_kernel(
        kernel,
        name="kv_update",
        grid=blocks,
        scratch=[
            plgpu.SMEM((size, kv_heads, head_dim), k.dtype),
            plgpu.SMEM((size, kv_heads, head_dim), v.dtype),
            plgpu.Barrier(num_arrivals=2),
        ],
        interpret=interpret,
    )(k, v, jnp.asarray(layer, jnp.int32).reshape(1), kv_slots.astype(jnp.int32), k_out, v_out)
    return tuple(jax.freeze(x).reshape(k_pages.shape) for x in (k_out, v_out))
