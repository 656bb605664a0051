"""Ragged decode for Hopper: the rows with one query, and the merge of those that were cut.

All tiles of all (row, K/V head) pairs lie in one line, which is cut into equal pieces, one per
worker; so lengths do not matter for balance, and long sequences are split. A pair cut by a boundary
leaves partial results, which a second, small kernel merges.
(Stream-K: Osama et al. 2023; merging by log-sum-exp: Dao et al., Flash-Decoding, 2023.)

A worker is a producer warpgroup, which moves K and V through a ring in shared memory, and a
consumer. The query heads that share a K/V head are rows of one `wgmma`; its other rows are never
stored.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sidp_jax.kernels.mosaic import gpu_kernel, load, swizzled
from sidp_jax.kernels.ragged_tiles_mosaic import (
    LOG2E,
    ROW_LAYOUT,
    ROWS,
    TuningConfig,
    add_values,
    cdiv,
    copy_tile,
    drain,
    filled,
    iota,
    over_keys,
    row_buffer,
    scores,
    softmax_step,
    start_state,
)

MIN_TILES = 8  # of a decode worker that has work, if there is enough of it


class DecodePlan(NamedTuple):
    """Where decode workers begin; rows are those with one query, packed to the front."""

    token: Int[Array, " seqs"]  # query of the d-th decode row
    row: Int[Array, " seqs"]  # its row in the batch
    context: Int[Array, " seqs"]
    tiles: Int[Array, " seqs"]  # tiles of one K/V head
    starts: Int[Array, " seqs_plus_1"]  # first tile of the row in the line of all tiles
    worker_starts: Int[Array, " workers_plus_1"]  # first tile of each worker
    worker_rows: Int[Array, " workers_plus_1"]  # the decode row it lies in


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
    tiles = jnp.where(is_decode[row], cdiv(context, block_kv), 0)
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
            last_page = cdiv(row.context, page_size) - 1
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
                copy_tile(
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
        drain(step, k_stages, (k_free,), stream * k_stages)
        drain(step, v_stages, (v_free,), stream * v_stages)
        drain(segments, 1, (q_free,), stream)

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
                qk = scores(q, k_smem.at[stream, slot], block, interpret=interpret)
                plgpu.barrier_arrive(k_free.at[barrier])
                # Not before: ptxas lets an arrival pass loads that it follows, and only a product
                # shows that the queries are in registers.
                pl.when(i == 0)(lambda: plgpu.barrier_arrive(q_free.at[stream]))
                if masked:
                    position = (first + i) * block + iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(position < context, qk, -jnp.inf)
                weights, shrink, peak = softmax_step(qk, peak, factor)
                acc = acc * over_keys(shrink, acc.shape)
                total = total * shrink + weights.sum(axis=1)
                weights = weights.astype(q_ref.dtype)
                slot, barrier = in_ring(step + i, v_stages)
                plgpu.barrier_wait(v_full.at[barrier])
                values = v_smem.at[stream, slot]
                acc = add_values(acc, weights, values, interpret=interpret)
                plgpu.barrier_arrive(v_free.at[barrier])
                return acc, peak, total

            whole = jnp.clip(lax.div(context, jnp.int32(block)) - first, 0, count)
            state = start_state(head_dim, interpret=interpret)
            state = lax.fori_loop(0, whole, functools.partial(tile, masked=False), state)
            state = lax.fori_loop(whole, count, functools.partial(tile, masked=True), state)
            acc, peak, total = state
            acc = acc * over_keys(1.0 / total, acc.shape)
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
    out_ref, part_smem, stat_smem, barriers = refs[7:]
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

        def send_for(part, slot):
            for i in range(2):
                source = part_ref.at[part, i, rows]
                plgpu.copy_gmem_to_smem(source, part_smem.at[slot, i, rows], barriers.at[slot])
            plgpu.copy_gmem_to_smem(stat_ref.at[part], stat_smem.at[slot], barriers.at[slot])

        def receive(slot):
            plgpu.barrier_wait(barriers.at[slot])
            read = functools.partial(_load, interpret=interpret)
            high, low = (
                read(part_smem.at[slot, i], plgpu.Layout.WGMMA).astype(jnp.float32)
                for i in range(2)
            )
            return high + low, read(stat_smem.at[slot], ROW_LAYOUT)

        # Nearly always there are two parts: the end of one worker, and the beginning of the next.
        send_for(2 * (worker - 1) + (before < begin).astype(jnp.int32), 0)
        send_for(2 * worker, 1)
        value, peak = receive(0)
        total = filled((ROWS,), 1.0, interpret=interpret)

        def more(carry):
            u, value, peak, total = carry
            other, stat = receive(1)
            new_peak = jnp.maximum(peak, stat)
            shrink, weight = jnp.exp2(peak - new_peak), jnp.exp2(stat - new_peak)
            shape = value.shape
            value = value * over_keys(shrink, shape) + other * over_keys(weight, shape)
            plgpu.commit_smem()  # everybody has read the slot
            pl.when(plan.worker_starts[u + 1] < end)(lambda: send_for(2 * (u + 1), 1))
            return u + 1, value, new_peak, total * shrink + weight

        state = (worker, value, peak, total)
        in_pair = lambda c: plan.worker_starts[c[0]] < end  # noqa: E731
        _, value, _, total = lax.while_loop(in_pair, more, state)
        value = value * over_keys(1.0 / total, value.shape)
        part_smem[0, 0] = value.astype(out_ref.dtype)
        plgpu.commit_smem()
        query = plan.token[d] * (kv_heads * groups) + head * groups
        plgpu.copy_smem_to_gmem(part_smem.at[0, 0, rows], out_ref.at[pl.ds(query, groups)])
        plgpu.wait_smem_to_gmem(0)


def call_decode(q, shared, plan, static, interpret):
    """Attend the decode rows; returns results, parts of cut pairs, their log2-sum-exp."""
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
            row_buffer((streams, *tile), q.dtype, groups),
            row_buffer((streams, *tile), q.dtype, groups),
            swizzled((streams, k_stages, block, head_dim), q.dtype),
            swizzled((streams, v_stages, block, head_dim), q.dtype),
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


def call_merge(out_ref, parts, stats, plan, static, interpret):
    """Write the results of cut pairs into `out_ref`."""
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
            row_buffer((2, 2, ROWS, head_dim), parts.dtype, groups),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=2),
        ],
        grid=workers - 1,
        name="ragged_decode_merge",
        interpret=interpret,
    )
    kernel(parts, stats, *plan, out_ref)
