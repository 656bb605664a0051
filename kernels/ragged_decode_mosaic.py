"""Ragged decode for Hopper: the rows with one query.

All tiles of all (row, K/V head) pairs lie in one line, which is cut into equal pieces, one per
worker; so lengths do not matter for balance, and long sequences are split. Each worker takes its
piece from the end: what it has of a pair that the next worker ends is computed first, written as a
part, and long there when that worker has come to its own first tiles, and merges.
(Stream-K: Osama et al. 2023; merging by log-sum-exp: Dao et al., Flash-Decoding, 2023.)
A worker waits for workers before it alone, in the order in which the GPU starts thread blocks: so
none waits for one that has no room to run.

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

from sidp_jax.kernels.mosaic import await_flag, gpu_kernel, load, raise_flag, swizzled
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
    worker_rows: Int[Array, " workers"]  # the decode row of its last tile


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
    worker_rows = jnp.sum(worker_starts[1:, None] > starts[None, 1:], axis=1, dtype=jnp.int32)
    worker_rows = jnp.minimum(worker_rows, seqs - 1)
    return DecodePlan(query_starts[row], row, context, tiles, starts, worker_starts, worker_rows)


class _Segment(NamedTuple):
    """The part of one (row, K/V head) pair that a worker computes in one go."""

    query: Any  # the first of its query heads, among those of all tokens
    context: Any  # of the row
    first: Any  # tile
    count: Any  # of tiles
    ends: Any  # 1 if the pair's last tile is among them


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
    out_ref, flags_ref, part_ref, stat_ref, *refs = refs[7:]
    q_smem, o_smem, k_smem, v_smem, stat_smem, told, *refs = refs
    q_full, q_free, k_full, v_full, k_free, v_free, parts_there, part_full = refs
    head_dim = q_ref.shape[1]
    page_size = k_ref.shape[1]
    block, streams = config.decode_block_kv, config.decode_streams
    k_stages, v_stages = config.decode_stages, config.decode_stages - 1
    thread = lax.axis_index("wg")
    stream = lax.rem(thread, jnp.int32(streams))
    worker = lax.axis_index("block") * streams + stream
    begin = plan.worker_starts[worker]
    end = plan.worker_starts[worker + 1]

    def in_ring(step, stages: int):
        slot = lax.rem(step, jnp.int32(stages))
        return slot, stream * stages + slot  # index of the buffer, and of its barrier

    @pl.when(thread >= streams)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def segment(carry):
            position, d, step, segments, _ = carry
            row, row_begin = plan.row[d], plan.starts[d]
            context, tiles = plan.context[d], plan.tiles[d]
            head = lax.div(position - 1 - row_begin, tiles)
            pair = row_begin + head * tiles
            start = jnp.maximum(pair, begin)
            first, count = start - pair, position - start
            query = plan.token[d] * (kv_heads * groups) + head * groups
            ends = (position == pair + tiles).astype(jnp.int32)
            pl.when(segments > 0)(lambda: plgpu.barrier_wait(q_free.at[stream]))
            # Told with the queries, so that the consumer need not wait for memory here.
            for place, value in enumerate(_Segment(query, context, first, count, ends)):
                told[stream, lax.rem(segments, jnp.int32(2)), place] = value
            plgpu.commit_smem()  # by all of this warpgroup: nobody writes these once more, later
            source = q_ref.at[pl.ds(query, groups)]
            destination = q_smem.at[stream, pl.ds(0, groups)]
            plgpu.copy_gmem_to_smem(source, destination, q_full.at[stream])
            last_page = cdiv(context, page_size) - 1
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
                    at=(row, base, first + i, last_page, block, page_size),
                )

            lax.fori_loop(0, count, tile, None)
            d = jnp.where(start == row_begin, d - 1, d)
            return start, d, step + count, segments + 1, jnp.where(ends == 1, pair, begin)

        carry = (end, plan.worker_rows[worker], jnp.int32(0), jnp.int32(0), begin)
        _, _, step, segments, pair = lax.while_loop(lambda c: c[0] > begin, segment, carry)

        @pl.when(pair < begin)
        def _wait_for_parts():
            def part(u):
                await_flag(flags_ref.at[u], interpret=interpret)
                return u - 1

            lax.while_loop(lambda u: plan.worker_starts[u + 1] > pair, part, worker - 1)
            plgpu.barrier_arrive(parts_there.at[stream])

        drain(step, k_stages, (k_free,), stream * k_stages)
        drain(step, v_stages, (v_free,), stream * v_stages)
        drain(segments, 1, (q_free,), stream)

    @pl.when(thread < streams)
    def _consumer():
        plgpu.set_max_registers(208 if streams <= 2 else 152, action="increase")
        o = o_smem.at[stream]
        part_rows = pl.ds(0, part_ref.shape[2])

        def listen(segment) -> _Segment:
            # Two slots: ptxas may read as late as where a number is used, when the producer has
            # been told that the queries are free and goes on to the next segment.
            slot = lax.rem(segment, jnp.int32(2))
            return _Segment(*(told[stream, slot, place] for place in range(len(_Segment._fields))))

        def write(query):
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o.at[pl.ds(0, groups)], out_ref.at[pl.ds(query, groups)])

        def segment(carry):
            position, step, segments, _ = carry
            plgpu.barrier_wait(q_full.at[stream])
            query, context, first, count, ends = listen(segments)
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
            complete = (first == 0) & (ends == 1)
            pl.when(complete)(lambda: write(query))

            @pl.when(jnp.logical_not(complete))
            def _keep_part():
                # High and low halves: as good as float32.
                low = (acc - rounded.astype(jnp.float32)).astype(q_ref.dtype)
                stat_smem[stream, 0] = peak + jnp.log(total) * LOG2E

                @pl.when(ends == 1)
                def _here():
                    q_smem[stream] = low  # after this segment there are no queries

                @pl.when(ends == 0)
                def _for_the_next_worker():
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o.at[part_rows], part_ref.at[worker, 0])
                    plgpu.copy_smem_to_gmem(stat_smem.at[stream, 0], stat_ref.at[worker])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    o[...] = low
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(o.at[part_rows], part_ref.at[worker, 1])
                    plgpu.wait_smem_to_gmem(0)
                    raise_flag(flags_ref.at[worker], interpret=interpret)

            pair = jnp.where(ends == 1, position - count - first, begin)
            return position - count, step + count, segments + 1, pair

        carry = (end, jnp.int32(0), jnp.int32(0), begin)
        _, _, segments, pair = lax.while_loop(lambda c: c[0] > begin, segment, carry)

        @pl.when(pair < begin)
        def _merge():
            plgpu.barrier_wait(parts_there.at[stream])
            read = functools.partial(_load, interpret=interpret)

            def send_for(u):
                slot = lax.rem(worker - 1 - u, jnp.int32(v_stages))
                barrier = part_full.at[stream * v_stages + slot]
                for i, ring in enumerate((k_smem, v_smem)):
                    target = ring.at[stream, slot, part_rows]
                    plgpu.copy_gmem_to_smem(part_ref.at[u, i], target, barrier)
                plgpu.copy_gmem_to_smem(stat_ref.at[u], stat_smem.at[stream, slot], barrier)

            def part(carry):
                u, acc, peak, total = carry
                slot = lax.rem(worker - 1 - u, jnp.int32(v_stages))
                plgpu.barrier_wait(part_full.at[stream * v_stages + slot])
                high, low = (
                    read(ring.at[stream, slot, pl.ds(0, ROWS)], plgpu.Layout.WGMMA)
                    for ring in (k_smem, v_smem)
                )
                stat = read(stat_smem.at[stream, slot], ROW_LAYOUT)
                plgpu.commit_smem()  # everybody has read the slot
                pl.when(in_pair(u - v_stages))(lambda: send_for(u - v_stages))
                other = high.astype(jnp.float32) + low.astype(jnp.float32)
                new_peak = jnp.maximum(peak, stat)
                shrink, weight = jnp.exp2(peak - new_peak), jnp.exp2(stat - new_peak)
                shape = acc.shape
                acc = acc * over_keys(shrink, shape) + other * over_keys(weight, shape)
                return u - 1, acc, new_peak, total * shrink + weight

            def in_pair(u):
                return plan.worker_starts[jnp.maximum(u + 1, 0)] > pair

            high, low = (read(x, plgpu.Layout.WGMMA) for x in (o, q_smem.at[stream]))
            acc = high.astype(jnp.float32) + low.astype(jnp.float32)
            peak = read(stat_smem.at[stream, 0], ROW_LAYOUT)
            plgpu.commit_smem()  # everybody has read it
            for ahead in range(v_stages):
                u = worker - 1 - ahead
                pl.when(in_pair(u))(lambda u=u: send_for(u))
            state = (worker - 1, acc, peak, filled((ROWS,), 1.0, interpret=interpret))
            _, acc, _, total = lax.while_loop(lambda c: in_pair(c[0]), part, state)
            o[...] = (acc * over_keys(1.0 / total, acc.shape)).astype(q_ref.dtype)
            write(listen(segments - 1).query)

        plgpu.wait_smem_to_gmem(0)


def _load(ref, layout, *, interpret: bool):
    if interpret:
        return ref[...]
    return load(ref, layout)


def call_decode(out_ref, flags_ref, q, shared, plan, static, interpret):
    """Write the results of the decode rows into `out_ref`; the flags of all workers must be 0."""
    config, groups, head_dim = static["config"], static["groups"], q.shape[2]
    block, streams = config.decode_block_kv, config.decode_streams
    k_stages, v_stages = config.decode_stages, config.decode_stages - 1
    copies = max(1, block // shared[0].shape[1])
    parts = config.decode_workers
    tile = (ROWS, head_dim)
    kernel = gpu_kernel(
        functools.partial(_decode_kernel, **static),
        out_type=[
            jax.ShapeDtypeStruct((parts, 2, -(-groups // 8) * 8, head_dim), q.dtype),
            jax.ShapeDtypeStruct((parts, ROWS), jnp.float32),
        ],
        scratch=[
            row_buffer((streams, *tile), q.dtype, groups),
            row_buffer((streams, *tile), q.dtype, groups),
            swizzled((streams, k_stages, block, head_dim), q.dtype),
            swizzled((streams, v_stages, block, head_dim), q.dtype),
            plgpu.SMEM((streams, v_stages, ROWS), jnp.float32),
            plgpu.SMEM((streams, 2, 8), jnp.int32),
            plgpu.Barrier(num_barriers=streams),
            plgpu.Barrier(num_barriers=streams),
            plgpu.Barrier(num_arrivals=copies, num_barriers=streams * k_stages),
            plgpu.Barrier(num_arrivals=copies, num_barriers=streams * v_stages),
            plgpu.Barrier(num_barriers=streams * k_stages),
            plgpu.Barrier(num_barriers=streams * v_stages),
            plgpu.Barrier(num_barriers=streams),
            plgpu.Barrier(num_arrivals=3, num_barriers=streams * v_stages),
        ],
        grid=config.num_sms,
        warpgroups=2 * streams,
        name="ragged_decode",
        interpret=interpret,
    )
    kernel(q.reshape(-1, head_dim), *shared, *plan, out_ref, flags_ref)
