"""Ragged paged attention for Hopper, in Pallas' Mosaic GPU dialect.

Two kernels share one entry, `ragged_attention_mosaic`:

- prefill (`ragged_prefill_mosaic`): rows with more queries, after FlashAttention 3, in two forms.
- decode (`ragged_decode_mosaic`): rows with one query. The line of all tiles is cut into equal
  pieces; who ends what a cut divides takes in the results of the others.

What they do with one tile of K and V is in `ragged_tiles_mosaic`, and so is `TuningConfig`, which
both need; it is imported from here.

Which row goes where is decided on the device, by a plan of a few small integer arrays. The plan
depends on the batch alone: XLA computes it once for all layers of a step.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.mosaic import in_place
from sidp_jax.kernels.ragged_decode_mosaic import MIN_TILES, call_decode, decode_plan
from sidp_jax.kernels.ragged_prefill_mosaic import call_prefill, prefill_plan
from sidp_jax.kernels.ragged_tiles_mosaic import (
    LOG2E,
    PREFILL_ORDERS,
    PREFILL_PRODUCTS,
    ROWS,
    TuningConfig,
)

__all__ = [
    "MIN_TILES",
    "PREFILL_ORDERS",
    "PREFILL_PRODUCTS",
    "TuningConfig",
    "check_fits",
    "decode_plan",
    "prefill_plan",
    "ragged_attention_mosaic",
]


def check_fits(q, k_pages, block_tables, config: TuningConfig) -> None:
    """Raise ValueError if the kernels cannot take these shapes and types."""
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = k_pages.shape[1], k_pages.shape[3]
    if head_dim not in (64, 128):
        raise ValueError(f"{head_dim=} must be 64 or 128 for the mosaic kernels; use 'reference'")
    if page_size not in (16, 32, 64, 128):
        raise ValueError(f"{page_size=} must be 16, 32, 64 or 128 for the mosaic kernels")
    if heads // kv_heads > 16:
        raise ValueError(
            f"{heads=} / {kv_heads=} must be 1 to 16 for the mosaic kernels; use 'reference' or "
            "'cudnn'"
        )
    if q.dtype != k_pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"{q.dtype=} and {k_pages.dtype=} must both be bfloat16 (or float16)")
    pages = k_pages.shape[0] * kv_heads * k_pages.shape[2]
    if pages >= 2**31:
        raise ValueError(f"{pages=} of all layers and heads must be below 2**31")


def ragged_attention_mosaic(
    q: Float[Array, "tokens heads head_dim"],
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    layer: Int[Array, ""] | int,
    block_tables: Int[Array, "seqs max_pages"],
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    scale: float,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "tokens heads head_dim"]:
    """`ragged_attention` with the Hopper kernels; `interpret` runs them on the CPU (tests)."""
    config = config or TuningConfig()
    check_fits(q, k_pages, block_tables, config)
    layer = jnp.asarray(layer, jnp.int32)
    batch = (block_tables, query_starts, context_lens)
    return _attend(
        *(q, k_pages, v_pages, layer, *batch), scale=scale, config=config, interpret=interpret
    )


# A function of its own, so that a program with many layers holds the kernels once: lowering them
# takes seconds.
@functools.partial(jax.jit, static_argnames=("scale", "config", "interpret"))
def _attend(
    q,
    k_pages,
    v_pages,
    layer,
    block_tables,
    query_starts,
    context_lens,
    *,
    scale,
    config,
    interpret,
):
    tokens, heads, head_dim = q.shape
    layers, kv_heads, num_pages, page_size, _ = k_pages.shape
    groups = heads // kv_heads
    # TMA reads tiles of 64 queries; the hardware fills what lies past the end, but a dimension
    # must hold whole tiles of eight rows. The interpreter fills nothing.
    padded = max(-(-tokens // 8) * 8, ROWS) + (2 * ROWS if interpret else 0)
    if padded != tokens:
        q = jnp.pad(q, ((0, padded - tokens), (0, 0), (0, 0)))
    flat = (layers * kv_heads * num_pages, page_size, head_dim)
    shared = (
        k_pages.reshape(flat),
        v_pages.reshape(flat),
        layer.reshape(1),
        block_tables.astype(jnp.int32),
    )
    static = {
        "config": config,
        "kv_heads": kv_heads,
        "groups": groups,
        "num_pages": num_pages,
        "factor": scale * LOG2E,
        "interpret": bool(interpret),
    }
    query_starts = query_starts.astype(jnp.int32)
    context_lens = context_lens.astype(jnp.int32)
    rows = decode_plan(
        query_starts,
        context_lens,
        kv_heads=kv_heads,
        block_kv=config.decode_block_kv,
        workers=config.decode_workers,
    )
    tiles = prefill_plan(
        query_starts,
        context_lens,
        tokens=tokens,
        block_q=2 * ROWS // (2 if groups % 2 == 0 else 1),
    )
    out, flags = call_prefill(q, shared, tiles, static, interpret)
    out_ref = in_place(out.reshape(-1, head_dim), interpret=bool(interpret))
    flags_ref = in_place(flags, interpret=bool(interpret))
    call_decode(out_ref, flags_ref, q, shared, rows, static, interpret)
    return out_ref[...].reshape(padded, heads, head_dim)[:tokens]
