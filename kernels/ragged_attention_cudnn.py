"""Ragged paged attention through cuDNN's fused attention, by jax's public function for it.

For GPUs that have no kernel of ours. cuDNN wants the keys of a sequence in one piece, so the pages
of every query tile are gathered first: several times the memory traffic of a kernel that reads
pages, but at a tensor core's pace, and bounded in memory. jax's paged variant is not public.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

TILE_QUERIES = 32  # of one row: they share its keys
BLOCK_BYTES = 256 << 20  # of gathered K and V
SMALLEST_CONTEXT = 256  # tokens; longer ones by powers of four, up to the longest


def check_fits(q: Array, k_pages: Array) -> None:
    """Raise ValueError if cuDNN cannot take these shapes and types."""
    head_dim = q.shape[2]
    if head_dim > 128 or head_dim % 8:
        raise ValueError(
            f"{head_dim=} must be a multiple of 8 up to 128 for cuDNN's attention; use 'reference'"
        )
    if q.dtype != k_pages.dtype or q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"{q.dtype=} and {k_pages.dtype=} must both be bfloat16 (or float16) for cuDNN's "
            "attention; use 'reference'"
        )


def ragged_attention_cudnn(
    q: Float[Array, "tokens heads head_dim"],
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    layer: Int[Array, ""] | int,
    block_tables: Int[Array, "seqs max_pages"],
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    scale: float,
    tile_queries: int = TILE_QUERIES,
    block_bytes: int = BLOCK_BYTES,
    dot_product: str = "cudnn",
) -> Float[Array, "tokens heads head_dim"]:
    """`ragged_attention` by `jax.nn.dot_product_attention` on tiles of queries.

    The tiles' K and V are gathered up to a context that is static: the smallest of a few that holds
    the batch's longest, chosen on the device.

    Args:
        q: as in `ragged_attention`, like those that follow.
        k_pages: as there; what lies past a context is multiplied by zero, and must be finite.
        v_pages: likewise.
        layer: as there.
        block_tables: as there.
        query_starts: as there.
        context_lens: as there.
        scale: as there.
        tile_queries: most queries of one row that attend together.
        block_bytes: about how much K and V is gathered at a time.
        dot_product: "cudnn", or "xla" where there is no cuDNN (tests).

    Raises:
        ValueError: if cuDNN cannot take the shapes or types.
    """
    check_fits(q, k_pages)
    page_size, max_pages = k_pages.shape[3], block_tables.shape[1]
    sizes = [min(max_pages, -(-SMALLEST_CONTEXT // page_size))]
    while sizes[-1] < max_pages:
        sizes.append(min(max_pages, 4 * sizes[-1]))
    tiles = _tiles(query_starts, context_lens, tokens=q.shape[0], size=tile_queries)
    attend = functools.partial(
        _attend, scale=scale, size=tile_queries, block_bytes=block_bytes, dot_product=dot_product
    )
    branches = [functools.partial(attend, num_pages=size) for size in sizes]
    longest = jnp.max(context_lens)
    branch = sum((longest > size * page_size).astype(jnp.int32) for size in sizes[:-1])
    layer = jnp.asarray(layer, jnp.int32)
    args = (q, k_pages, v_pages, layer, block_tables, *tiles)
    return branches[0](*args) if len(branches) == 1 else lax.switch(branch, branches, *args)


def _tiles(query_starts, context_lens, *, tokens: int, size: int):
    """(row, first query, number of queries, position of the first) of every tile, and how many.

    There is room for as many tiles as such a batch can have; those that are not used are empty.
    """
    seqs = context_lens.shape[0]
    lengths = jnp.where(context_lens > 0, query_starts[1:] - query_starts[:-1], 0)
    ends = jnp.cumsum(-(-lengths // size))
    slot = jnp.arange(min(tokens, tokens // size + seqs), dtype=jnp.int32)
    row = jnp.sum(slot[:, None] >= ends[None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, seqs - 1)
    offset = (slot - ends[row]) * size + -(-lengths[row] // size) * size
    count = jnp.clip(lengths[row] - offset, 0, size)
    position = context_lens[row] - lengths[row] + offset
    # An empty tile sees one key, whatever it is: a softmax over none would be NaN.
    position = jnp.where(count > 0, position, 0)
    return row, query_starts[row] + offset, count, position, ends[-1]


def _attend(
    q,
    k_pages,
    v_pages,
    layer,
    block_tables,
    row,
    first,
    count,
    position,
    used,
    *,
    num_pages: int,
    scale: float,
    size: int,
    block_bytes: int,
    dot_product: str,
):
    """All tiles, some at a time, over the first `num_pages` pages of their rows."""
    tokens, head_dim = q.shape[0], q.shape[2]
    kv_heads, page_size = k_pages.shape[1], k_pages.shape[3]
    keys = num_pages * page_size
    tile_bytes = 2 * keys * kv_heads * head_dim * k_pages.dtype.itemsize
    block = min(row.shape[0], max(1, block_bytes // tile_bytes))
    more = -row.shape[0] % block
    row, first, count, position = (jnp.pad(x, (0, more)) for x in (row, first, count, position))
    key = jnp.arange(keys, dtype=jnp.int32)

    def gather(pages, tables):
        taken = pages[layer, :, tables]  # [block, pages, kv_heads, page_size, head_dim]
        return jnp.swapaxes(taken, 2, 3).reshape(block, keys, kv_heads, head_dim)

    def attend_block(i, out):
        part = lambda x: lax.dynamic_slice_in_dim(x, i * block, block)  # noqa: E731
        start, queries, seen = part(first), part(count), part(position)
        query = jnp.arange(size, dtype=jnp.int32)
        token = jnp.where(query < queries[:, None], start[:, None] + query, tokens)
        last = seen[:, None] + jnp.minimum(query, jnp.maximum(queries[:, None] - 1, 0))
        lengths = last[:, -1] + 1
        tables = block_tables[part(row), :num_pages]
        page = jnp.arange(num_pages, dtype=jnp.int32) * page_size
        tables = jnp.where(page < lengths[:, None], tables, 0)
        attended = jax.nn.dot_product_attention(
            q[jnp.minimum(token, tokens - 1)],
            gather(k_pages, tables),
            gather(v_pages, tables),
            mask=(key <= last[:, :, None])[:, None],
            scale=scale,
            key_value_seq_lengths=lengths,
            implementation=dot_product,
        )
        return out.at[token].set(attended, mode="drop")

    return lax.fori_loop(0, -(-used // block), attend_block, jnp.zeros_like(q))
