"""Ragged prefill for Hopper: the rows with several queries, in two forms.

After FlashAttention 3 (Shah et al. 2024): one producer warpgroup moves K and V through a ring in
shared memory, two consumers take turns on the tensor cores and in the softmax. Its second overlap,
of one tile's softmax with the values of the tile before inside a warpgroup, was 1 to 11% slower
than issuing both products at once.

The forms differ in how a consumer multiplies (`TuningConfig.prefill_products`), and with it in the
order of tiles and of barriers. So each is a kernel of its own; which items of work a block computes
is the same for both.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from sidp_jax.kernels.mosaic import gpu_kernel, swizzled
from sidp_jax.kernels.ragged_tiles_mosaic import (
    ROWS,
    TuningConfig,
    add_values,
    cdiv,
    copy_tile,
    drain,
    filled,
    iota,
    over_keys,
    scores,
    softmax_step,
    start_state,
)

UNSEEN = -1e30  # peak of no keys: finite, so that a row of masks alone has weights of zero


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
    tiles = jnp.where(wanted, cdiv(end - start // 8 * 8, block_q), 0)
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

    def place(self, wg, shared: int):
        """First query and head of a consumer's part; `shared` heads are computed in one block."""
        if shared == 2:
            return self.token, self.first_head + wg
        return self.token + ROWS * wg, self.first_head


def _prefill_item(
    plan: PrefillPlan, item, *, config, kv_heads: int, groups: int, shared: int
) -> _Item:
    """Look one item of work up; one without keys has no tiles of them."""
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
    steps = cdiv(jnp.maximum(jnp.where(context > 0, visible, 0), 0), config.prefill_block_kv)
    return _Item(d, head, first_head, token, start, end, context, steps)


def _deal(plan: PrefillPlan, *, config, kv_heads: int, groups: int):
    """Heads of one item, number of items, a block's item in each round, and how to look one up."""
    shared = 2 if groups % 2 == 0 else 1  # heads of one block
    sm = lax.axis_index("block")
    num_items = plan.first_slot[plan.first_slot.shape[0] - 1] * (kv_heads * (groups // shared))

    def item_of(round_):
        # Back and forth, so that a block with a long item gets a short one next.
        odd = lax.rem(round_, jnp.int32(2)) == 1
        return round_ * config.num_sms + jnp.where(odd, config.num_sms - 1 - sm, sm)

    look_up = functools.partial(
        _prefill_item, plan, config=config, kv_heads=kv_heads, groups=groups, shared=shared
    )
    return shared, num_items, item_of, look_up


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
    out_ref, flags_ref, q_smem, o_smem, k_smem, v_smem = refs[8:14]
    q_full, q_free, k_full, v_full, k_free, v_free, turn = refs[14:]
    head_dim = q_ref.shape[2]
    page_size = k_ref.shape[1]
    block, stages = config.prefill_block_kv, config.prefill_stages
    wg = lax.axis_index("wg")
    shared, num_items, item_of, look_up = _deal(
        plan, config=config, kv_heads=kv_heads, groups=groups
    )

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        _lower_flags(flags_ref, config)
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def body(carry):
            round_, step, loads = carry
            item = look_up(item_of(round_))
            steps = item.steps

            @pl.when(steps > 0)
            def _load_queries():
                for i in range(2):
                    pl.when(loads > 0)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))
                    first, q_head = item.place(i, shared)
                    source = q_ref.at[pl.ds(first, ROWS), q_head]
                    plgpu.copy_gmem_to_smem(source, q_smem.at[i], q_full.at[i])

            row = plan.row[item.row]
            last_page = jnp.maximum(cdiv(item.context, page_size) - 1, 0)
            base = layer_base + item.head * num_pages

            def tile(i, _):
                n = step + i
                slot = lax.rem(n, jnp.int32(stages))
                waits = [
                    lambda free=free: pl.when(n >= stages)(
                        lambda: plgpu.barrier_wait(free.at[slot])
                    )
                    for free in (k_free, v_free)
                ]
                copy_tile(
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
        drain(step, stages, (k_free, v_free))
        drain(2 * loads, 2, (q_free,))

    @pl.when(wg < 2)
    def _consumer():
        plgpu.set_max_registers(232, action="increase")

        def take_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        pl.when(wg == 1)(take_turn)

        def body(carry):
            round_, step = carry
            item = look_up(item_of(round_))
            steps = item.steps
            token, q_head = item.place(wg, shared)
            shift = item.context - item.end + token  # position of the first row's query
            pl.when(steps > 0)(lambda: plgpu.barrier_wait(q_full.at[wg]))

            def tile(i, state, masked: bool):
                acc, peak, total = state
                slot = lax.rem(step + i, jnp.int32(stages))
                plgpu.barrier_wait(k_full.at[slot])

                keys = k_smem.at[slot]
                qk = scores(q_smem.at[wg], keys, block, take_turn, interpret=interpret)
                plgpu.barrier_arrive(k_free.at[slot])
                # Not after the loop: the other warpgroup, which this one waits for below, may need
                # the next item's tiles first, and the producer sends the queries before them.
                pl.when(i == steps - 1)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                if masked:
                    query = shift + iota((ROWS, block), 0, interpret=interpret)
                    key = i * block + iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(query >= key, qk, -jnp.inf)
                weights, shrink, peak = softmax_step(qk, peak, factor)
                acc = acc * over_keys(shrink, acc.shape)
                total = total * shrink
                rounded = weights.astype(q_ref.dtype)
                total = total + weights.sum(axis=1)
                if not interpret:
                    acc, total, peak, rounded = lax.optimization_barrier(
                        (acc, total, peak, rounded)
                    )
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_full.at[slot])
                plgpu.barrier_wait(turn)
                acc = add_values(acc, rounded, v_smem.at[slot], interpret=interpret)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, peak, total

            whole = jnp.clip(lax.div(jnp.maximum(shift + 1, 0), jnp.int32(block)), 0, steps)
            state = start_state(head_dim, interpret=interpret)
            state = lax.fori_loop(0, whole, functools.partial(tile, masked=False), state)
            state = lax.fori_loop(whole, steps, functools.partial(tile, masked=True), state)
            acc, _, total = state
            total = jnp.where(total == 0.0, 1.0, total)
            acc = acc * over_keys(1.0 / total, acc.shape)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem[wg] = acc.astype(q_ref.dtype)
            plgpu.commit_smem()
            _store_rows(o_smem.at[wg], out_ref, token, q_head, item.start, item.end)
            return round_ + 1, step + steps

        lax.while_loop(lambda c: item_of(c[0]) < num_items, body, (jnp.int32(0), jnp.int32(0)))
        pl.when(wg == 0)(take_turn)
        plgpu.wait_smem_to_gmem(0)


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
    out_ref, flags_ref, q_smem, o_smem, k_smem, v_smem = refs[8:14]
    q_full, q_free, k_full, v_full, k_free, v_free, turn = refs[14:]
    head_dim = q_ref.shape[2]
    page_size = k_ref.shape[1]
    block, stages = config.prefill_block_kv, config.prefill_stages
    wg = lax.axis_index("wg")
    shared, num_items, item_of, look_up = _deal(
        plan, config=config, kv_heads=kv_heads, groups=groups
    )
    ring = functools.partial(lax.rem, y=jnp.int32(stages))

    def describe(round_) -> _Item:
        # Past the end it is the last item again: nobody asks, but the look-up must be in bounds.
        index = jnp.clip(item_of(round_), 0, jnp.maximum(num_items - 1, 0))
        item = look_up(index)
        # Padding gets a tile too, all of it masked, so that every item has one.
        return item._replace(steps=jnp.maximum(item.steps, 1))

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        _lower_flags(flags_ref, config)
        layer_base = layer_ref[0] * (kv_heads * num_pages)

        def body(carry):
            round_, step = carry
            item = describe(round_)
            last_page = jnp.maximum(cdiv(item.context, page_size) - 1, 0)
            base = layer_base + item.head * num_pages

            def load_queries():
                q_slot = lax.rem(round_, jnp.int32(2))
                for i in range(2):
                    place = q_slot * 2 + i
                    pl.when(round_ > 1)(lambda place=place: plgpu.barrier_wait(q_free.at[place]))
                    first, q_head = item.place(i, shared)
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

                copy_tile(
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
        drain(step, stages, (k_free, v_free))
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
            token, _ = item.place(wg, shared)

            def softmax(qk):
                plgpu.barrier_arrive(k_free.at[slot])
                if masked:
                    shift = item.context - item.end + token  # position of the first query
                    first_key = (item.steps - 1 - i) * block
                    query = shift - first_key + iota((ROWS, block), 0, interpret=interpret)
                    key = iota((ROWS, block), 1, interpret=interpret)
                    qk = jnp.where(query >= key, qk, -jnp.inf)
                new, shrink, new_peak = softmax_step(qk, peak, factor)
                return new, shrink, new_peak, total * shrink + new.sum(axis=1)

            plgpu.barrier_wait(k_full.at[slot])
            wait_turn()
            if interpret:
                pass_turn()
                qk = jnp.dot(q[...], keys[...].T, preferred_element_type=jnp.float32)
                new, shrink, peak, total = softmax(qk)
                acc = add_values(acc, weights, values, interpret=True)
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
            return acc * over_keys(shrink, acc.shape), weights, peak, total

        def store(acc, total, item, round_):
            total = jnp.where(total == 0.0, 1.0, total)
            acc = acc * over_keys(1.0 / total, acc.shape)
            rounded = acc.astype(q_ref.dtype)
            token, q_head = item.place(wg, shared)
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
            acc, _, total = start_state(head_dim, interpret=interpret)
            return acc, filled((ROWS,), UNSEEN, interpret=interpret), total

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
            token, _ = item.place(wg, shared)
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
        weights = filled((ROWS, block), 0.0, interpret=interpret).astype(q_ref.dtype)
        first = describe(jnp.int32(0))
        carry = (jnp.int32(0), jnp.int32(0), first, first, zero, weights, none)
        carry = lax.while_loop(lambda c: item_of(c[0]) < num_items, body, carry)
        rounds, step, _, item, acc, weights, total = carry

        @pl.when(rounds > 0)
        def _last_values():
            slot = ring(step + (stages - 1))
            plgpu.barrier_wait(v_full.at[slot])
            wait_turn()
            out = add_values(acc, weights, v_smem.at[slot], interpret=interpret)
            pass_turn()
            plgpu.barrier_arrive(v_free.at[slot])
            store(out, total, item, rounds - 1)
            release(rounds - 1)

        pl.when(wg == 0)(wait_turn)
        plgpu.wait_smem_to_gmem(0)


def _lower_flags(flags_ref, config: TuningConfig) -> None:
    """Zero the flags of this block's decode workers, whose kernel comes next."""
    for i in range(config.decode_streams):
        flags_ref[lax.axis_index("block") * config.decode_streams + i] = jnp.int32(0)


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


def call_prefill(q, shared, plan, static, interpret):
    """Attend the prefill rows; returns results, zeros for padding, and flags for decode workers."""
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
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((config.decode_workers,), jnp.int32),
        ],
        scratch=[
            swizzled((*queries, ROWS, head_dim), q.dtype),
            plgpu.SMEM((2, ROWS, head_dim), q.dtype),
            swizzled((stages, block, head_dim), q.dtype),
            swizzled((stages, block, head_dim), q.dtype),
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
    return kernel(q, *shared, *plan)
