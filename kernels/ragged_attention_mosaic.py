"""Ragged paged attention for Hopper, in Pallas' Mosaic GPU dialect.

Two kernels share one entry, `ragged_attention_mosaic`:

- decode: rows with one query. All tiles of all (row, K/V head) pairs lie in one line, which is cut
  into equal pieces, one per worker; so lengths do not matter for balance, and long sequences are
  split. A pair cut by a boundary leaves partial results, which a third, small kernel merges.
  (Stream-K: Osama et al. 2023; merging by log-sum-exp: Dao et al., Flash-Decoding, 2023.)
- prefill: rows with more queries, FlashAttention 3 (Shah et al. 2024): one producer warpgroup moves
  K and V through a ring in shared memory, two consumers take turns on the tensor cores and in the
  softmax. Its second overlap, of one tile's softmax with the values of the tile before inside a
  warpgroup, was 1 to 11% slower than issuing both products at once.

Which row goes where is decided on the device, by a plan of a few small integer arrays. The plan
depends on the batch alone: XLA computes it once for all layers of a step.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.mosaic import gpu_kernel, in_place, load

ROWS = 64  # rows of one wgmma
MIN_TILES = 8  # of a decode worker that has work, if there is enough of it
PREFILL_PRODUCTS = ("apart", "chained")
PREFILL_ORDERS = ("rows", "longest")
UNSEEN = -1e30  # peak of no keys: finite, so that a row of masks alone has weights of zero
LOG2E = math.log2(math.e)
_ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        num_sms: streaming multiprocessors to fill (132 on H100 and H200).
        decode_streams: decode workers in one thread block; each is a producer and a consumer.
        decode_block_kv: keys of one decode tile.
        decode_stages: K tiles in a worker's ring; V, which is needed later, gets one less.
        prefill_block_kv: keys of one prefill tile.
        prefill_stages: tiles in the ring of a prefill block.
        prefill_products: how a prefill consumer multiplies. "apart": scores, softmax, values, one
            after the other; 1 to 2% faster where contexts are long. "chained": the values of a tile
            and the scores of the next at once, across items too; 15% faster for short prompts.
        prefill_order: "rows": row by row, the longest context first, and in a row head by head.
            "longest": the query tiles with the longest contexts first, of whatever row, with all
            their heads; so every block gets the same amount of work, within one tile.
    """

    num_sms: int = 132
    decode_streams: int = 2
    decode_block_kv: int = 64
    decode_stages: int = 3
    prefill_block_kv: int = 128
    prefill_stages: int = 2
    prefill_products: str = "chained"
    prefill_order: str = "longest"

    def __post_init__(self):
        if self.prefill_products not in PREFILL_PRODUCTS:
            raise ValueError(f"{self.prefill_products=} must be one of {PREFILL_PRODUCTS}")
        if self.prefill_order not in PREFILL_ORDERS:
            raise ValueError(f"{self.prefill_order=} must be one of {PREFILL_ORDERS}")
        for name in ("decode_block_kv", "prefill_block_kv"):
            if getattr(self, name) not in (64, 128, 256):
                raise ValueError(f"{name}={getattr(self, name)} must be 64, 128 or 256")
        if min(self.decode_stages, self.prefill_stages) < 2:
            raise ValueError(f"{self.decode_stages=} and {self.prefill_stages=} must be at least 2")
        if not 1 <= self.decode_streams <= 4:
            raise ValueError(f"{self.decode_streams=} must be between 1 and 4")

    @property
    def decode_workers(self) -> int:
        """Pieces that the decode work is cut into."""
        return self.num_sms * self.decode_streams


class DecodePlan(NamedTuple):
    """Where decode workers begin; rows are those with one query, packed to the front."""

    token: Int[Array, " seqs"]  # query of the d-th decode row
    row: Int[Array, " seqs"]  # its row in the batch
    context: Int[Array, " seqs"]
    tiles: Int[Array, " seqs"]  # tiles of one K/V head
    starts: Int[Array, " seqs_plus_1"]  # first tile of the row in the line of all tiles
    worker_starts: Int[Array, " workers_plus_1"]  # first tile of each worker
    worker_rows: Int[Array, " workers_plus_1"]  # the decode row it lies in


class PrefillPlan(NamedTuple):
    """Query tiles of all rows with several queries, longest rows first."""

    slots: Int[Array, " slots"]  # tiles, those with the longest contexts first
    slot_row: Int[Array, " slots"]  # which of the rows below a tile belongs to
    row: Int[Array, " rows"]
    start: Int[Array, " rows"]  # first query
    end: Int[Array, " rows"]  # one past the last
    context: Int[Array, " rows"]
    tiles: Int[Array, " rows"]
    first_slot: Int[Array, " rows_plus_1"]


def _cdiv(a, b: int):
    return lax.div(a + (b - 1), jnp.int32(b))


def decode_plan(
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    kv_heads: int,
    block_kv: int,
    workers: int,
) -> DecodePlan:
    """Cut the tiles of all decode rows into at most `workers` equal pieces."""
    seqs = context_lens.shape[0]
    is_decode = (query_starts[1:] - query_starts[:-1] == 1) & (context_lens > 0)
    row = jnp.argsort(~is_decode, stable=True).astype(jnp.int32)
    context = context_lens[row]
    tiles = jnp.where(is_decode[row], _cdiv(context, block_kv), 0)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles * kv_heads)])
    starts = starts.astype(jnp.int32)
    # Little work is cut into fewer pieces: merging many costs more than it saves.
    used = jnp.clip(starts[-1] // MIN_TILES, 1, workers)
    share, rest = starts[-1] // used, starts[-1] % used
    worker = jnp.arange(workers + 1, dtype=jnp.int32)
    worker_starts = jnp.minimum(worker, used) * share + jnp.minimum(worker, rest)
    worker_rows = jnp.sum(worker_starts[:, None] >= starts[None, 1:], axis=1, dtype=jnp.int32)
    worker_rows = jnp.minimum(worker_rows, seqs - 1)
    return DecodePlan(query_starts[row], row, context, tiles, starts, worker_starts, worker_rows)


def prefill_plan(
    query_starts: Int[Array, " seqs_plus_1"],
    context_lens: Int[Array, " seqs"],
    *,
    tokens: int,
    block_q: int,
) -> PrefillPlan:
    """List the query tiles; the padding after the last row is a row without context.

    Tiles begin at multiples of eight tokens, where TMA can address tiled shared memory.
    """
    seqs = context_lens.shape[0]
    start = query_starts
    end = jnp.concatenate([query_starts[1:], jnp.full(1, tokens, jnp.int32)])
    context = jnp.concatenate([context_lens, jnp.zeros(1, jnp.int32)])
    length = end - start
    wanted = (length > 1) | ((context == 0) & (length > 0))
    tiles = jnp.where(wanted, _cdiv(end - start // 8 * 8, block_q), 0)
    order = jnp.argsort(jnp.where(wanted, -context, 1), stable=True).astype(jnp.int32)
    tiles = tiles[order]
    first = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(tiles)]).astype(jnp.int32)
    slots = tokens // block_q + 2 * (seqs + 1)
    slot = jnp.arange(slots, dtype=jnp.int32)
    slot_row = jnp.sum(slot[:, None] >= first[None, 1:], axis=1, dtype=jnp.int32)
    slot_row = jnp.minimum(slot_row, seqs)
    row = jnp.minimum(order, seqs - 1)
    start, end, context = start[order], end[order], context[order]
    # The last tile of a row comes first.
    last = start[slot_row] // 8 * 8 + (tiles + first[:-1])[slot_row] * block_q - slot * block_q
    visible = context[slot_row] - end[slot_row] + jnp.minimum(last, end[slot_row])
    visible = jnp.where(context[slot_row] > 0, visible, 0)
    slots = jnp.argsort(jnp.where(slot < first[-1], -visible, 1), stable=True).astype(jnp.int32)
    return PrefillPlan(slots, slot_row, row, start, end, context, tiles, first)


def _copy_tile(
    k_ref, v_ref, tables_ref, k_smem, v_smem, k_barrier, v_barrier, wait, *, at, empty=None
):
    """Start the loads of one tile of K and V, page by page.

    Pages past the context are not looked up: the last page is read again, and masked. A row
    without any context, where `empty` holds, gets the first page of all.
    """
    row, head_base, tile, last_page, block_kv, page_size = at
    chunk = min(page_size, block_kv)
    places = []
    for i in range(block_kv // chunk):
        position = tile * block_kv + i * chunk
        index = jnp.minimum(lax.div(position, jnp.int32(page_size)), last_page)
        offset = lax.rem(position, jnp.int32(page_size)) if page_size > block_kv else 0
        page = tables_ref[row, index]
        page = page if empty is None else jnp.where(empty, 0, page)
        places.append((head_base + page, offset))
    wait[0]()
    for i, (page, offset) in enumerate(places):
        source = k_ref.at[page, pl.ds(offset, chunk)]
        plgpu.copy_gmem_to_smem(source, k_smem.at[pl.ds(i * chunk, chunk)], k_barrier)
    wait[1]()
    for i, (page, offset) in enumerate(places):
        source = v_ref.at[page, pl.ds(offset, chunk)]
        plgpu.copy_gmem_to_smem(source, v_smem.at[pl.ds(i * chunk, chunk)], v_barrier)


def _drain(step, stages: int, barriers, first=0):
    """Wait until the consumers have let go of every slot of a ring that was filled `step` times."""
    for i in range(stages):
        for barrier in barriers:
            pl.when(i < step)(
                lambda i=i, barrier=barrier: plgpu.barrier_wait(barrier.at[first + i])
            )


def _scores(q, keys, block: int, started=lambda: None, *, interpret: bool):
    """Multiply q @ keys.T; calls `started` once the product is on its way."""
    if interpret:  # the interpreter's wgmma takes no operand in registers
        started()
        q = q if isinstance(q, jax.Array) else q[...]
        return jnp.dot(q, keys[...].T, preferred_element_type=jnp.float32)

    def scope(acc_ref):
        plgpu.wgmma(acc_ref, q, keys.transpose((1, 0)))
        started()
        return acc_ref[...]

    return pl.run_scoped(scope, plgpu.ACC((ROWS, block), jnp.float32))


def _add_values(acc, weights, values, *, interpret: bool):
    """Return acc + weights @ values."""
    if interpret:
        return acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))


def _full(shape, value: float, *, interpret: bool):
    """A constant laid out as an accumulator, or as one number for each of its rows."""
    x = jnp.full(shape, value, jnp.float32)
    if interpret:  # the interpreter knows no layouts
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if len(shape) == 2 else _ROW_LAYOUT)


def _start_state(head_dim: int, *, interpret: bool):
    """No keys seen: (sum of weighted values, running maximum times log2(e), sum of weights)."""
    shapes = ((ROWS, head_dim), 0.0), ((ROWS,), -jnp.inf), ((ROWS,), 0.0)
    return tuple(_full(shape, value, interpret=interpret) for shape, value in shapes)


def _over_keys(x, shape):
    return lax.broadcast_in_dim(x, shape, [0])


def _softmax_step(qk, acc, peak, total, factor: float):
    """One block of the running softmax, in base 2; returns the weights too."""
    new_peak = jnp.maximum(peak, qk.max(axis=1) * factor)
    shrink = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(qk * factor - _over_keys(new_peak, qk.shape))
    acc = acc * _over_keys(shrink, acc.shape)
    return weights, acc, new_peak, total * shrink


def _iota(shape, axis: int, *, interpret: bool):
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


# ---------------------------------------------------------------------------------------- decode


class _DecodeRow(NamedTuple):
    """What the plan says of one decode row, loaded ahead of its use."""

    token: Any
    row: Any
    context: Any
    tiles: Any
    start: Any
    end: Any


def _decode_row(plan: DecodePlan, d) -> _DecodeRow:
    d = jnp.minimum(d, plan.row.shape[0] - 1)
    row = (plan.token[d], plan.row[d], plan.context[d], plan.tiles[d])
    return _DecodeRow(*row, plan.starts[d], plan.starts[d + 1])


def _segment(row: _DecodeRow, position, end):
    """The part of one (row, K/V head) pair that begins at `position` and ends before `end`."""
    offset = position - row.start
    head = lax.div(offset, row.tiles)
    first = offset - head * row.tiles
    count = jnp.minimum(row.tiles - first, end - position)
    return head, first, count


def _decode_kernel(
    q_ref,  # [tokens * heads, head_dim]
    k_ref,  # [layers * kv_heads * pages, page_size, head_dim]
    v_ref,
    layer_ref,  # [1]
    tables_ref,  # [seqs, max_pages]
    *refs,
    config: TuningConfig,
    kv_heads: int,
    groups: int,
    num_pages: int,
    factor: float,
    interpret: bool,
):
    plan = DecodePlan(*refs[:7])
    out_ref, part_ref, stat_ref, q_smem, o_smem, k_smem, v_smem, stat_smem = refs[7:15]
    q_full, q_free, k_full, v_full, k_free, v_free = refs[15:]
    head_dim = q_ref.shape[1]
    page_size = k_ref.shape[1]
    block, streams = config.decode_block_kv, config.decode_streams
    k_stages, v_stages = config.decode_stages, config.decode_stages - 1
    thread = lax.axis_index("wg")
    stream = lax.rem(thread, jnp.int32(streams))
    worker = lax.axis_index("block") * streams + stream
    begin = plan.worker_starts[worker]
    end = plan.worker_starts[worker + 1]
    first_row = plan.worker_rows[worker]

    def in_ring(step, stages: int):
        slot = lax.rem(step, jnp.int32(stages))
        return slot, stream * stages + slot  # index of the buffer, and of its barrier

    @pl.when(thread >= streams)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def segment(carry):
            position, d, step, segments = carry
            row = _decode_row(plan, d)
            head, first, count = _segment(row, position, end)
            query = row.token * (kv_heads * groups) + head * groups
            pl.when(segments > 0)(lambda: plgpu.barrier_wait(q_free.at[stream]))
            source = q_ref.at[pl.ds(query, groups)]
            destination = q_smem.at[stream, pl.ds(0, groups)]
            plgpu.copy_gmem_to_smem(source, destination, q_full.at[stream])
            last_page = _cdiv(row.context, page_size) - 1
            base = layer_base + head * num_pages

            def tile(i, _):
                n = step + i
                k_slot, k_barrier = in_ring(n, k_stages)
                v_slot, v_barrier = in_ring(n, v_stages)
                waits = (
                    lambda: pl.when(n >= k_stages)(
                        lambda: plgpu.barrier_wait(k_free.at[k_barrier])
                    ),
                    lambda: pl.when(n >= v_stages)(
                        lambda: plgpu.barrier_wait(v_free.at[v_barrier])
                    ),
                )
                _copy_tile(
                    k_ref,
                    v_ref,
                    tables_ref,
                    k_smem.at[stream, k_slot],
                    v_smem.at[stream, v_slot],
                    k_full.at[k_barrier],
                    v_full.at[v_barrier],
                    waits,
                    at=(row.row, base, first + i, last_page, block, page_size),
                )

            lax.fori_loop(0, count, tile, None)
            position = position + count
            d = jnp.where(position == row.end, d + 1, d)
            return position, d, step + count, segments + 1

        carry = (begin, first_row, jnp.int32(0), jnp.int32(0))
        _, _, step, segments = lax.while_loop(lambda c: c[0] < end, segment, carry)
        _drain(step, k_stages, (k_free,), stream * k_stages)
        _drain(step, v_stages, (v_free,), stream * v_stages)
        _drain(segments, 1, (q_free,), stream)

    @pl.when(thread < streams)
    def _consumer():
        plgpu.set_max_registers(208 if streams <= 2 else 152, action="increase")
        o = o_smem.at[stream]
        rows = pl.ds(0, groups)

        def segment(carry):
            position, d, step, row = carry
            head, first, count = _segment(row, position, end)
            after = position + count
            next_d = jnp.where(after == row.end, d + 1, d)
            next_row = _decode_row(plan, next_d)  # arrives while this segment is computed
            context = row.context
            plgpu.barrier_wait(q_full.at[stream])
            # Rows past `groups` hold what was there before: they stay apart.
            q = _load(q_smem.at[stream], plgpu.Layout.WGMMA, interpret=interpret)

            def tile(i, state, masked: bool):
                acc, peak, total = state
                slot, barrier = in_ring(step + i, k_stages)
                plgpu.barrier_wait(k_full.at[barrier])
                qk = _scores(q, k_smem.at[stream, slot], block, interpret=interpret)
                plgpu.barrier_arrive(k_free.at[barrier])
                # Not before: ptxas lets an arrival pass loads that it follows, and only a product
                # shows that the queries are in registers.
                pl.when(i == 0)(lambda: plgpu.barrier_arrive(q_free.at[stream]))
                if masked:
                    position = (first + i) * block + _iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(position < context, qk, -jnp.inf)
                weights, acc, peak, total = _softmax_step(qk, acc, peak, total, factor)
                total = total + weights.sum(axis=1)
                weights = weights.astype(q_ref.dtype)
                slot, barrier = in_ring(step + i, v_stages)
                plgpu.barrier_wait(v_full.at[barrier])
                values = v_smem.at[stream, slot]
                acc = _add_values(acc, weights, values, interpret=interpret)
                plgpu.barrier_arrive(v_free.at[barrier])
                return acc, peak, total

            whole = jnp.clip(lax.div(context, jnp.int32(block)) - first, 0, count)
            state = _start_state(head_dim, interpret=interpret)
            state = lax.fori_loop(0, whole, functools.partial(tile, masked=False), state)
            state = lax.fori_loop(whole, count, functools.partial(tile, masked=True), state)
            acc, peak, total = state
            acc = acc * _over_keys(1.0 / total, acc.shape)
            rounded = acc.astype(q_ref.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o[...] = rounded
            complete = count == row.tiles

            @pl.when(complete)
            def _write():
                query = row.token * (kv_heads * groups) + head * groups
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o.at[rows], out_ref.at[pl.ds(query, groups)])

            @pl.when(jnp.logical_not(complete))
            def _write_part():
                part = 2 * worker + (position != begin).astype(jnp.int32)
                stat_smem[stream] = peak + jnp.log(total) * LOG2E
                plgpu.commit_smem()
                # High and low halves: as good as float32, through the same buffer.
                plgpu.copy_smem_to_gmem(o.at[rows], part_ref.at[part, 0, rows])
                plgpu.copy_smem_to_gmem(stat_smem.at[stream], stat_ref.at[part])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o[...] = (acc - rounded.astype(jnp.float32)).astype(q_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o.at[rows], part_ref.at[part, 1, rows])

            return after, next_d, step + count, next_row

        carry = (begin, first_row, jnp.int32(0), _decode_row(plan, first_row))
        lax.while_loop(lambda c: c[0] < end, segment, carry)
        plgpu.wait_smem_to_gmem(0)


def _load(ref, layout, *, interpret: bool):
    if interpret:
        return ref[...]
    return load(ref, layout)


def _merge_kernel(
    part_ref,  # [2 * workers, 2, groups, head_dim]
    stat_ref,  # [2 * workers, 64]
    *refs,
    kv_heads: int,
    groups: int,
    interpret: bool,
):
    """Merge the parts of the pair that a worker's start cuts, if no earlier start cuts it too."""
    plan = DecodePlan(*refs[:7])
    out_ref, part_smem, stat_smem, barrier = refs[7:]
    worker = lax.axis_index("block") + 1
    place = plan.worker_starts[worker]
    before = plan.worker_starts[worker - 1]
    d = plan.worker_rows[worker]
    tiles = plan.tiles[d]
    last = plan.starts[plan.starts.shape[0] - 1]
    offset = place - plan.starts[d]
    head = lax.div(offset, jnp.maximum(tiles, 1))
    begin = plan.starts[d] + head * tiles
    end = begin + tiles

    @pl.when((place < last) & (begin < place) & (before <= begin))
    def _merge():
        rows = pl.ds(0, groups)

        def load(part):
            plgpu.commit_smem()
            for i in range(2):
                source = part_ref.at[part, i, rows]
                plgpu.copy_gmem_to_smem(source, part_smem.at[i, rows], barrier)
            plgpu.copy_gmem_to_smem(stat_ref.at[part], stat_smem, barrier)
            plgpu.barrier_wait(barrier)
            read = functools.partial(_load, interpret=interpret)
            high, low = (
                read(part_smem.at[i], plgpu.Layout.WGMMA).astype(jnp.float32) for i in range(2)
            )
            return high + low, read(stat_smem, _ROW_LAYOUT)

        value, peak = load(2 * (worker - 1) + (before < begin).astype(jnp.int32))
        total = _full((ROWS,), 1.0, interpret=interpret)

        def more(carry):
            u, value, peak, total = carry
            other, stat = load(2 * u)
            new_peak = jnp.maximum(peak, stat)
            shrink, weight = jnp.exp2(peak - new_peak), jnp.exp2(stat - new_peak)
            shape = value.shape
            value = value * _over_keys(shrink, shape) + other * _over_keys(weight, shape)
            return u + 1, value, new_peak, total * shrink + weight

        state = (worker, value, peak, total)
        in_pair = lambda c: plan.worker_starts[c[0]] < end  # noqa: E731
        _, value, _, total = lax.while_loop(in_pair, more, state)
        value = value * _over_keys(1.0 / total, value.shape)
        part_smem[0] = value.astype(out_ref.dtype)
        plgpu.commit_smem()
        query = plan.token[d] * (kv_heads * groups) + head * groups
        plgpu.copy_smem_to_gmem(part_smem.at[0, rows], out_ref.at[pl.ds(query, groups)])
        plgpu.wait_smem_to_gmem(0)


# --------------------------------------------------------------------------------------- prefill


def _prefill_item(plan: PrefillPlan, item, *, config, kv_heads: int, groups: int, shared: int):
    """Row, first token, heads and number of K/V tiles of one item of work."""
    block_q = ROWS * 2 // shared
    pairs = groups // shared
    slot = lax.div(item, jnp.int32(kv_heads * pairs))
    if config.prefill_order == "longest":
        rest = item - slot * (kv_heads * pairs)
        head = lax.div(rest, jnp.int32(pairs))
        pair = rest - head * pairs
        slot = plan.slots[slot]
        d = plan.slot_row[slot]
        tiles = plan.tiles[d]
        rank = slot - plan.first_slot[d]
    else:
        d = plan.slot_row[slot]
        tiles = plan.tiles[d]
        rest = item - plan.first_slot[d] * (kv_heads * pairs)
        head = lax.div(rest, tiles * pairs)
        rest = rest - head * (tiles * pairs)
        rank = lax.div(rest, jnp.int32(pairs))
        pair = rest - rank * pairs
    first_head = head * groups + pair * shared
    start, end, context = plan.start[d], plan.end[d], plan.context[d]
    # The last tile, with the longest context, first.
    token = lax.div(start, jnp.int32(8)) * 8 + (tiles - 1 - rank) * block_q
    visible = context - end + jnp.minimum(token + block_q, end)
    steps = _cdiv(jnp.maximum(jnp.where(context > 0, visible, 0), 0), config.prefill_block_kv)
    return d, head, first_head, token, start, end, context, steps


def _prefill_kernel(
    q_ref,  # [tokens, heads, head_dim]
    k_ref,  # [layers * kv_heads * pages, page_size, head_dim]
    v_ref,
    layer_ref,  # [1]
    tables_ref,  # [seqs, max_pages]
    *refs,
    config: TuningConfig,
    kv_heads: int,
    groups: int,
    num_pages: int,
    factor: float,
    interpret: bool,
):
    plan = PrefillPlan(*refs[:8])
    out_ref, q_smem, o_smem, k_smem, v_smem = refs[8:13]
    q_full, q_free, k_full, v_full, k_free, v_free, turn = refs[13:]
    head_dim = q_ref.shape[2]
    page_size = k_ref.shape[1]
    block, stages = config.prefill_block_kv, config.prefill_stages
    shared = 2 if groups % 2 == 0 else 1  # heads of one block
    wg = lax.axis_index("wg")
    sm = lax.axis_index("block")
    num_items = plan.first_slot[plan.first_slot.shape[0] - 1] * (kv_heads * (groups // shared))
    describe = functools.partial(
        _prefill_item, plan, config=config, kv_heads=kv_heads, groups=groups, shared=shared
    )

    def item_of(round_):
        # Back and forth, so that a block with a long item gets a short one next.
        odd = lax.rem(round_, jnp.int32(2)) == 1
        return round_ * config.num_sms + jnp.where(odd, config.num_sms - 1 - sm, sm)

    def place_of(first_head, token, wg):
        return (token, first_head + wg) if shared == 2 else (token + ROWS * wg, first_head)

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def body(carry):
            round_, step, loads = carry
            d, head, first_head, token, _, _, context, steps = describe(item_of(round_))

            @pl.when(steps > 0)
            def _load_queries():
                for i in range(2):
                    pl.when(loads > 0)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))
                    first, q_head = place_of(first_head, token, i)
                    source = q_ref.at[pl.ds(first, ROWS), q_head]
                    plgpu.copy_gmem_to_smem(source, q_smem.at[i], q_full.at[i])

            row = plan.row[d]
            last_page = jnp.maximum(_cdiv(context, page_size) - 1, 0)
            base = layer_base + head * num_pages

            def tile(i, _):
                n = step + i
                slot = lax.rem(n, jnp.int32(stages))
                waits = [
                    lambda free=free: pl.when(n >= stages)(
                        lambda: plgpu.barrier_wait(free.at[slot])
                    )
                    for free in (k_free, v_free)
                ]
                _copy_tile(
                    k_ref,
                    v_ref,
                    tables_ref,
                    k_smem.at[slot],
                    v_smem.at[slot],
                    k_full.at[slot],
                    v_full.at[slot],
                    waits,
                    at=(row, base, i, last_page, block, page_size),
                )

            lax.fori_loop(0, steps, tile, None)
            return round_ + 1, step + steps, loads + (steps > 0).astype(jnp.int32)

        carry = (jnp.int32(0),) * 3
        _, step, loads = lax.while_loop(lambda c: item_of(c[0]) < num_items, body, carry)
        _drain(step, stages, (k_free, v_free))
        _drain(2 * loads, 2, (q_free,))

    @pl.when(wg < 2)
    def _consumer():
        plgpu.set_max_registers(232, action="increase")

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        pl.when(wg == 1)(take_turn)

        def body(carry):
            round_, step = carry
            _, _, first_head, token, start, end, context, steps = describe(item_of(round_))
            token, q_head = place_of(first_head, token, wg)
            shift = context - end + token  # position of the first row's query
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(q_full.at[wg]))

            def tile(i, state, masked: bool):
                acc, peak, total = state
                slot = lax.rem(step + i, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                keys = k_smem.at[slot]
                qk = _scores(q_smem.at[wg], keys, block, take_turn, interpret=interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                # Not after the loop: the other warpgroup, which this one waits for below, may need
                # the next item's tiles first, and the producer sends the queries before them.
                pl.when(i == steps - 1)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                if masked:
                    query = shift + _iota((ROWS, block), 0, interpret=interpret)
                    key = i * block + _iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(query >= key, qk, -jnp.inf)
                weights, acc, peak, total = _softmax_step(qk, acc, peak, total, factor)
                rounded = weights.astype(q_ref.dtype)
                total = total + weights.sum(axis=1)
                if not interpret:
                    acc, total, peak, rounded = lax.optimization_barrier(
                        (acc, total, peak, rounded)
                    )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = _add_values(acc, rounded, v_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, peak, total

            whole = jnp.clip(lax.div(jnp.maximum(shift + 1, 0), jnp.int32(block)), 0, steps)
            state = _start_state(head_dim, interpret=interpret)
            state = lax.fori_loop(0, whole, functools.partial(tile, masked=False), state)
            state = lax.fori_loop(whole, steps, functools.partial(tile, masked=True), state)
            acc, _, total = state
            total = jnp.where(total == 0.0, 1.0, total)
            acc = acc * _over_keys(1.0 / total, acc.shape)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem[wg] = acc.astype(q_ref.dtype)
            plgpu.commit_smem()
            _store_rows(o_smem.at[wg], out_ref, token, q_head, start, end)
            return round_ + 1, step + steps

        lax.while_loop(lambda c: item_of(c[0]) < num_items, body, (jnp.int32(0), jnp.int32(0)))
        pl.when(wg == 0)(take_turn)
        plgpu.wait_smem_to_gmem(0)


class _Item(NamedTuple):
    """One item of prefill work: what the two consumers of a block compute in one go."""

    row: Any  # of the plan
    head: Any  # of K and V
    first_head: Any  # of the queries
    token: Any  # first query of the tile
    start: Any  # first query of the row
    end: Any  # one past its last
    context: Any
    steps: Any  # tiles of K and V


def _chained_prefill_kernel(
    q_ref,  # [tokens, heads, head_dim]
    k_ref,  # [layers * kv_heads * pages, page_size, head_dim]
    v_ref,
    layer_ref,  # [1]
    tables_ref,  # [seqs, max_pages]
    *refs,
    config: TuningConfig,
    kv_heads: int,
    groups: int,
    num_pages: int,
    factor: float,
    interpret: bool,
):
    """Prefill whose consumers hand the tensor cores two products at a time.

    The values of a tile go together with the scores of the next, across items too: the first
    scores of an item are under way with the last values of the item before, whose results are
    stored while the other consumer multiplies. The tiles of an item run backwards, so that the
    first is the one that causality cuts.
    """
    plan = PrefillPlan(*refs[:8])
    out_ref, q_smem, o_smem, k_smem, v_smem = refs[8:13]
    q_full, q_free, k_full, v_full, k_free, v_free, turn = refs[13:]
    head_dim = q_ref.shape[2]
    page_size = k_ref.shape[1]
    block, stages = config.prefill_block_kv, config.prefill_stages
    shared = 2 if groups % 2 == 0 else 1  # heads of one block
    wg = lax.axis_index("wg")
    sm = lax.axis_index("block")
    num_items = plan.first_slot[plan.first_slot.shape[0] - 1] * (kv_heads * (groups // shared))
    ring = functools.partial(lax.rem, y=jnp.int32(stages))

    def item_of(round_):
        # Back and forth, so that a block with a long item gets a short one next.
        odd = lax.rem(round_, jnp.int32(2)) == 1
        return round_ * config.num_sms + jnp.where(odd, config.num_sms - 1 - sm, sm)

    def describe(round_) -> _Item:
        # Past the end it is the last item again: nobody asks, but the look-up must be in bounds.
        index = jnp.clip(item_of(round_), 0, jnp.maximum(num_items - 1, 0))
        sizes = {"kv_heads": kv_heads, "groups": groups, "shared": shared}
        item = _Item(*_prefill_item(plan, index, config=config, **sizes))
        # Padding gets a tile too, all of it masked, so that every item has one.
        return item._replace(steps=jnp.maximum(item.steps, 1))

    def place_of(item: _Item, wg):
        if shared == 2:
            return item.token, item.first_head + wg
        return item.token + ROWS * wg, item.first_head

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def body(carry):
            round_, step = carry
            item = describe(round_)
            last_page = jnp.maximum(_cdiv(item.context, page_size) - 1, 0)
            base = layer_base + item.head * num_pages

            def load_queries():
                q_slot = lax.rem(round_, jnp.int32(2))
                for i in range(2):
                    place = q_slot * 2 + i
                    pl.when(round_ > 1)(lambda place=place: plgpu.barrier_wait(q_free.at[place]))
                    first, q_head = place_of(item, i)
                    source = q_ref.at[pl.ds(first, ROWS), q_head]
                    plgpu.copy_gmem_to_smem(source, q_smem.at[q_slot, i], q_full.at[place])

            def tile(i, _):
                n = step + i
                slot = ring(n)

                def wait(free):
                    pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))

                def between():
                    # The first keys do not wait for room for the queries.
                    pl.when(i == 0)(load_queries)
                    wait(v_free)

                _copy_tile(
                    k_ref,
                    v_ref,
                    tables_ref,
                    k_smem.at[slot],
                    v_smem.at[slot],
                    k_full.at[slot],
                    v_full.at[slot],
                    (lambda: wait(k_free), between),
                    at=(
                        *(plan.row[item.row], base, item.steps - 1 - i),
                        *(last_page, block, page_size),
                    ),
                    empty=item.context <= 0,
                )

            lax.fori_loop(0, item.steps, tile, None)
            return round_ + 1, step + item.steps

        carry = (jnp.int32(0), jnp.int32(0))
        rounds, step = lax.while_loop(lambda c: item_of(c[0]) < num_items, body, carry)
        _drain(step, stages, (k_free, v_free))
        for i in range(4):
            pl.when(rounds > i // 2)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))

    @pl.when(wg < 2)
    def _consumer():
        plgpu.set_max_registers(232, action="increase")

        # A consumer multiplies when the other has handed the tensor cores over.
        def pass_turn():
            plgpu.barrier_arrive(turn.at[1 - wg])

        def wait_turn():
            plgpu.barrier_wait(turn.at[wg])

        pl.when(wg == 1)(pass_turn)

        def tile(i, state, *, item, round_, step, masked: bool):
            """Scores and softmax of the item's tile `i`, beside the values of the tile before."""
            acc, weights, peak, total = state
            slot, slot_before = ring(step + i), ring(step + i + (stages - 1))
            q = q_smem.at[lax.rem(round_, jnp.int32(2)), wg]
            keys, values = k_smem.at[slot], v_smem.at[slot_before]
            token, _ = place_of(item, wg)

            def softmax(qk):
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    shift = item.context - item.end + token  # position of the first query
                    first_key = (item.steps - 1 - i) * block
                    query = shift - first_key + _iota((ROWS, block), 0, interpret=interpret)
                    key = _iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(query >= key, qk, -jnp.inf)
                new_peak = jnp.maximum(peak, qk.max(axis=1) * factor)
                shrink = jnp.exp2(peak - new_peak)
                new = jnp.exp2(qk * factor - _over_keys(new_peak, qk.shape))
                sums = total * shrink + new.sum(axis=1)
                return new, shrink, new_peak, sums

            plgpu.barrier_wait(k_full.at[slot])
            wait_turn()
            if interpret:
                pass_turn()
                qk = jnp.dot(q[...], keys[...].T, preferred_element_type=jnp.float32)
                new, shrink, peak, total = softmax(qk)
                acc = _add_values(acc, weights, values, interpret=True)
            else:

                def scope(scores_ref, acc_ref):
                    acc_ref[...] = acc
                    plgpu.wgmma(acc_ref, weights, values)
                    plgpu.wgmma(scores_ref, q, keys.transpose((1, 0)))
                    pass_turn()
                    after = acc_ref[...]
                    return *softmax(scores_ref[...]), after

                new, shrink, peak, total, acc = pl.run_scoped(
                    scope,
                    plgpu.ACC((ROWS, block), jnp.float32),
                    plgpu.ACC((ROWS, head_dim), jnp.float32),
                )
            return (acc, new.astype(q_ref.dtype), peak, total), shrink

        def next_tile(i, state, *, step, release, masked: bool, **where):
            slot_before = ring(step + i + (stages - 1))
            plgpu.barrier_wait(v_full.at[slot_before])
            (acc, weights, peak, total), shrink = tile(i, state, step=step, masked=masked, **where)
            plgpu.barrier_arrive(v_free.at[slot_before])
            pl.when(i == 1)(release)
            return acc * _over_keys(shrink, acc.shape), weights, peak, total

        def store(acc, total, item, round_):
            total = jnp.where(total == 0.0, 1.0, total)
            acc = acc * _over_keys(1.0 / total, acc.shape)
            rounded = acc.astype(q_ref.dtype)
            token, q_head = place_of(item, wg)
            # What a whole tile needs is swizzled, so that its rows do not share banks; the item's
            # queries have made room for it. Pieces of a tile lie row by row.
            whole = (token >= item.start) & (token + ROWS <= item.end)

            @pl.when(whole)
            def _store_tile():
                o = q_smem.at[lax.rem(round_, jnp.int32(2)), wg]
                o[...] = rounded
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(o, out_ref.at[pl.ds(token, ROWS), q_head])

            @pl.when(jnp.logical_not(whole))
            def _store_pieces():
                o_smem[wg] = rounded
                plgpu.commit_smem()
                _store_rows(o_smem.at[wg], out_ref, token, q_head, item.start, item.end)

        def release(round_):
            """Give the room of an item's queries back, once its results have left."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_free.at[lax.rem(round_, jnp.int32(2)) * 2 + wg])

        def nothing():
            acc, _, total = _start_state(head_dim, interpret=interpret)
            return acc, _full((ROWS,), UNSEEN, interpret=interpret), total

        def body(carry):
            round_, step, item, before, acc, weights, total = carry
            started, slot_before = round_ > 0, ring(step + (stages - 1))
            pl.when(started)(lambda: plgpu.barrier_wait(v_full.at[slot_before]))
            plgpu.barrier_wait(q_full.at[lax.rem(round_, jnp.int32(2)) * 2 + wg])
            zero, peak, none = nothing()
            where = {"item": item, "round_": round_, "step": step}
            state, _ = tile(0, (acc, weights, peak, none), masked=True, **where)
            acc_before, *state = state
            pl.when(started)(lambda: plgpu.barrier_arrive(v_free.at[slot_before]))
            pl.when(started)(lambda: store(acc_before, total, before, round_ - 1))
            free = lambda: pl.when(started)(lambda: release(round_ - 1))  # noqa: E731
            pl.when(item.steps == 1)(free)
            after = describe(round_ + 1)
            token, _ = place_of(item, wg)
            seen = item.context - item.end + token + 1  # keys that the first query sees
            whole = jnp.clip(lax.div(jnp.maximum(seen, 0), jnp.int32(block)), 0, item.steps)
            edge = jnp.maximum(item.steps - whole, 1)
            loop = functools.partial(next_tile, release=free, **where)
            state = lax.fori_loop(1, edge, functools.partial(loop, masked=True), (zero, *state))
            state = lax.fori_loop(
                edge, item.steps, functools.partial(loop, masked=False), tuple(state)
            )
            acc, weights, _, total = state
            return round_ + 1, step + item.steps, after, item, acc, weights, total

        zero, _, none = nothing()
        weights = _full((ROWS, block), 0.0, interpret=interpret).astype(q_ref.dtype)
        first = describe(jnp.int32(0))
        carry = (jnp.int32(0), jnp.int32(0), first, first, zero, weights, none)
        carry = lax.while_loop(lambda c: item_of(c[0]) < num_items, body, carry)
        rounds, step, _, item, acc, weights, total = carry

        @pl.when(rounds > 0)
        def _last_values():
            slot = ring(step + (stages - 1))
            plgpu.barrier_wait(v_full.at[slot])
            wait_turn()
            out = _add_values(acc, weights, v_smem.at[slot], interpret=interpret)
            pass_turn()
            plgpu.barrier_arrive(v_free.at[slot])
            store(out, total, item, rounds - 1)
            release(rounds - 1)

        pl.when(wg == 0)(wait_turn)
        plgpu.wait_smem_to_gmem(0)


def _store_rows(o_smem, out_ref, token, head, start, end):
    """Store the rows of a tile that belong to [start, end), in pieces of a power of two."""
    low = jnp.maximum(start - token, 0)
    count = jnp.maximum(jnp.minimum(end - token, ROWS) - low, 0)
    size = ROWS
    while size:
        piece = pl.ds(low, size)

        @pl.when(count & size != 0)
        def _store(piece=piece, low=low, size=size):
            plgpu.copy_smem_to_gmem(o_smem.at[piece], out_ref.at[pl.ds(token + low, size), head])

        low = low + (count & size)
        size //= 2


# ----------------------------------------------------------------------------------------- entry


def check_fits(q, k_pages, block_tables, config: TuningConfig) -> None:
    """Raise ValueError if the kernels cannot take these shapes and types."""
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = k_pages.shape[1], k_pages.shape[3]
    if head_dim not in (64, 128):
        raise ValueError(f"{head_dim=} must be 64 or 128 for the mosaic kernels; use 'reference'")
    if page_size not in (16, 32, 64, 128):
        raise ValueError(f"{page_size=} must be 16, 32, 64 or 128 for the mosaic kernels")
    if heads // kv_heads not in (*range(1, 9), 16):
        # 9, 11 and 13 failed on an H200, where short decode rows got foreign queries: see the
        # release of the queries in `_decode_kernel`. They have not been tried since it was moved.
        raise ValueError(
            f"{heads=} / {kv_heads=} must be 1 to 8 or 16 for the mosaic kernels; use 'reference' "
            "or 'cudnn'"
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
    out, parts, stats = _call_decode(q, shared, rows, static, interpret)
    out_ref = in_place(out, interpret=bool(interpret))
    _call_merge(out_ref, parts, stats, rows, static, interpret)
    tiles = prefill_plan(
        query_starts,
        context_lens,
        tokens=tokens,
        block_q=2 * ROWS // (2 if groups % 2 == 0 else 1),
    )
    out = out_ref[...].reshape(padded, heads, head_dim)
    out_ref = in_place(out, interpret=bool(interpret))
    _call_prefill(out_ref, q, shared, tiles, static, interpret)
    return out_ref[...][:tokens]


def _ring(shape: tuple[int, ...], dtype):
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _call_decode(q, shared, plan, static, interpret):
    config, groups, head_dim = static["config"], static["groups"], q.shape[2]
    block, streams = config.decode_block_kv, config.decode_streams
    k_stages, v_stages = config.decode_stages, config.decode_stages - 1
    copies = max(1, block // shared[0].shape[1])
    parts = 2 * config.decode_workers
    tile = (ROWS, head_dim)
    kernel = gpu_kernel(
        functools.partial(_decode_kernel, **static),
        out_type=[
            jax.ShapeDtypeStruct((q.shape[0] * q.shape[1], head_dim), q.dtype),
            jax.ShapeDtypeStruct((parts, 2, groups, head_dim), q.dtype),
            jax.ShapeDtypeStruct((parts, ROWS), jnp.float32),
        ],
        scratch=[
            plgpu.SMEM((streams, *tile), q.dtype),
            plgpu.SMEM((streams, *tile), q.dtype),
            _ring((streams, k_stages, block, head_dim), q.dtype),
            _ring((streams, v_stages, block, head_dim), q.dtype),
            plgpu.SMEM((streams, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=streams),
            plgpu.Barrier(num_barriers=streams),
            plgpu.Barrier(num_arrivals=copies, num_barriers=streams * k_stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=streams * v_stages),
            plgpu.Barrier(num_barriers=streams * k_stages),
            plgpu.Barrier(num_barriers=streams * v_stages),
        ],
        grid=config.num_sms,
        warpgroups=2 * streams,
        name="ragged_decode",
        interpret=interpret,
    )
    return kernel(q.reshape(-1, head_dim), *shared, *plan)


def _call_merge(out_ref, parts, stats, plan, static, interpret):
    groups, head_dim = static["groups"], parts.shape[-1]
    workers = static["config"].decode_workers
    if workers == 1:
        return
    kernel = gpu_kernel(
        functools.partial(
            _merge_kernel,
            kv_heads=static["kv_heads"],
            groups=groups,
            interpret=static["interpret"],
        ),
        scratch=[
            plgpu.SMEM((2, ROWS, head_dim), parts.dtype),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=workers - 1,
        name="ragged_decode_merge",
        interpret=interpret,
    )
    kernel(parts, stats, *plan, out_ref)


def _call_prefill(out_ref, q, shared, plan, static, interpret):
    config, head_dim = static["config"], q.shape[2]
    block, stages = config.prefill_block_kv, config.prefill_stages
    copies = max(1, block // shared[0].shape[1])
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    apart = config.prefill_products == "apart"
    # Queries of one item, or of two: then the next ones arrive early.
    queries = (2,) if apart else (2, 2)
    query = plgpu.Barrier(num_barriers=math.prod(queries))
    turn = plgpu.Barrier(num_arrivals=2) if apart else plgpu.Barrier(num_barriers=2)
    kernel = gpu_kernel(
        functools.partial(_prefill_kernel if apart else _chained_prefill_kernel, **static),
        scratch=[
            _ring((*queries, ROWS, head_dim), q.dtype),
            plgpu.SMEM((2, ROWS, head_dim), q.dtype),
            _ring((stages, block, head_dim), q.dtype),
            _ring((stages, block, head_dim), q.dtype),
            query,
            query,
            full,
            full,
            free,
            free,
            turn,
        ],
        grid=config.num_sms,
        warpgroups=3,
        name="ragged_prefill",
        interpret=interpret,
    )
    kernel(q, *shared, *plan, out_ref)
