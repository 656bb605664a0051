"""Paged attention over a ragged batch: decode rows and prefill rows in one call.

Row r of the batch has the queries `query_starts[r] : query_starts[r + 1]`; they are the last ones
of its `context_lens[r]` tokens. K and V lie in pages that the row's block table lists.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("reference", "mosaic", "cudnn")
TILE_TOKENS = 64  # of the Hopper kernels: fewer are padded to as many
MASKED = -1e30  # finite: a row of masks alone must give zeros, not NaN


def ragged_attention(
    q: Float[Array, "tokens heads head_dim"],
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    layer: Int[Array, ""] | int,
    block_tables: Int[Array, "seqs max_pages"],
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    scale: float,
    implementation: str,
) -> Float[Array, "tokens heads head_dim"]:
    """Causal attention of a ragged batch of queries to paged K and V.

    Slots past a row's context, in its last page, are masked; "mosaic" and "cudnn" multiply what
    lies there by zero, so that it must be finite: allocate the cache as zeros.

    Args:
        q: queries of all rows, one after the other. Head `k * G + g` uses K/V head `k`.
        k_pages: keys of all layers.
        v_pages: values of all layers.
        layer: index of the layer in the cache.
        block_tables: pages of every row, in order; entries past the context are not read.
        query_starts: first query of every row, and the end of the last; non-decreasing.
        context_lens: tokens of every row, its queries included; 0 for an empty row.
        scale: factor of the logits, usually `head_dim ** -0.5`.
        implementation: "reference" (any backend), "mosaic" (Hopper) or "cudnn" (NVIDIA GPUs).

    Returns:
        One output per query; zeros for tokens at or after `query_starts[-1]`.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation is unknown.
    """
    _check_shapes(q, k_pages, v_pages, block_tables, query_starts, context_lens)
    args = (q, k_pages, v_pages, layer, block_tables, query_starts, context_lens)
    if implementation == "reference":
        return ragged_attention_reference(*args, scale=scale)
    if implementation == "mosaic":
        from sidp_jax.kernels.ragged_attention_mosaic import ragged_attention_mosaic

        return ragged_attention_mosaic(*args, scale=scale)
    if implementation == "cudnn":
        from sidp_jax.kernels.ragged_attention_cudnn import ragged_attention_cudnn

        return ragged_attention_cudnn(*args, scale=scale)
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")


def ragged_attention_reference(
    q: Float[Array, "tokens heads head_dim"],
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    layer: Int[Array, ""] | int,
    block_tables: Int[Array, "seqs max_pages"],
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    scale: float,
    block_tokens: int = 32,
    block_keys: int = 64,
) -> Float[Array, "tokens heads head_dim"]:
    """`ragged_attention` in plain jax and float32: the obvious twin of the kernels.

    Memory stays bounded: blocks of `block_tokens` queries one after the other, each over about
    `block_keys` keys at a time with a running softmax (Milakov and Gimelshein 2018).
    A query's result does not depend on the other queries of the batch.
    """
    tokens, heads, head_dim = q.shape
    kv_heads, page_size = k_pages.shape[1], k_pages.shape[3]
    groups = heads // kv_heads
    pages_per_step = max(1, block_keys // page_size)
    max_pages = block_tables.shape[1]
    layer = jnp.asarray(layer, jnp.int32)
    size = min(block_tokens, tokens)
    blocks = -(-tokens // size)

    token = jnp.arange(blocks * size, dtype=jnp.int32)
    row = jnp.sum(token[:, None] >= query_starts[None, 1:], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, context_lens.shape[0] - 1)
    end = query_starts[row + 1]
    # Keys that the token sees: those up to its own position; none for padding.
    visible = jnp.where(token < query_starts[-1], context_lens[row] - (end - 1 - token), 0)
    queries = jnp.pad(q, ((0, blocks * size - tokens), (0, 0), (0, 0)))
    queries = queries.reshape(blocks, size, kv_heads, groups, head_dim)

    def attend_block(args):
        queries, row, visible = args
        queries = queries.astype(jnp.float32) * scale
        tables = block_tables[row]  # [block, max_pages]

        def attend_pages(step, carry):
            peak, total, out = carry
            index = step * pages_per_step + jnp.arange(pages_per_step, dtype=jnp.int32)
            pages = tables[:, jnp.minimum(index, max_pages - 1)]
            # One gather each, straight from the cache: [block, pages, kv_heads, page_size, h].
            k = k_pages[layer, :, pages].astype(jnp.float32)
            v = v_pages[layer, :, pages].astype(jnp.float32)
            position = index[:, None] * page_size + jnp.arange(page_size, dtype=jnp.int32)
            seen = position[None] < visible[:, None, None]  # [block, pages, page_size]
            # What nobody wrote yet may be anything, NaN included.
            v = jnp.where(seen[:, :, None, :, None], v, 0.0)
            logits = jnp.einsum("bkgd,bpksd->bkgps", queries, k, precision="highest")
            logits = jnp.where(seen[:, None, None], logits, MASKED)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=(-2, -1)))
            weights = jnp.exp(logits - new_peak[..., None, None])
            weights = jnp.where(seen[:, None, None], weights, 0.0)
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + jnp.sum(weights, axis=(-2, -1))
            new = jnp.einsum("bkgps,bpksd->bkgd", weights, v, precision="highest")
            return new_peak, total, out * shrink[..., None] + new

        zero = _varying_zero(queries, k_pages, v_pages, layer, tables, visible)
        state = (size, kv_heads, groups)
        carry = (zero + jnp.full(state, MASKED), zero + jnp.zeros(state))
        carry = (*carry, zero + jnp.zeros((*state, head_dim)))
        steps = -(-jnp.max(visible) // (pages_per_step * page_size))
        _, total, out = lax.fori_loop(0, steps, attend_pages, carry)
        out = out / jnp.where(total == 0.0, 1.0, total)[..., None]
        return out.astype(q.dtype).reshape(size, heads, head_dim)

    block = lambda x: x.reshape(blocks, size)  # noqa: E731
    out = lax.map(attend_block, (queries, block(row), block(visible)))
    return out.reshape(blocks * size, heads, head_dim)[:tokens]


def _varying_zero(*arrays: Array) -> Float[Array, ""]:
    """Zero that varies over every mesh axis of `shard_map` that one of `arrays` varies over.

    The carry of a loop must have its final type from the start; XLA folds the selection away.
    """
    mark = functools.reduce(jnp.logical_or, (x[(0,) * x.ndim] == 0 for x in arrays))
    return jnp.where(mark, 0.0, 0.0).astype(jnp.float32)


def _check_shapes(q, k_pages, v_pages, block_tables, query_starts, context_lens) -> None:
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"{k_pages.shape=} and {v_pages.shape=} must be equal")
    heads, kv_heads = q.shape[1], k_pages.shape[1]
    if heads % kv_heads:
        raise ValueError(f"{heads=} must be a multiple of {kv_heads=}")
    if q.shape[2] != k_pages.shape[4]:
        raise ValueError(f"head_dim of {q.shape=} and {k_pages.shape=} must be equal")
    seqs = context_lens.shape[0]
    if block_tables.shape[0] != seqs or query_starts.shape[0] != seqs + 1:
        raise ValueError(
            f"{block_tables.shape=} must have {seqs=} rows and {query_starts.shape=} seqs + 1"
        )
