"""Ragged paged attention: the reference against numpy, the kernels against the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kernels.ragged_attention_mosaic import (
    MIN_TILES,
    PREFILL_PRODUCTS,
    TuningConfig,
    decode_plan,
    prefill_plan,
    ragged_attention_mosaic,
)
from sidp_jax.kernels.self_check import KernelError, self_check

LIMIT = 1e-2  # relative error in bfloat16
RATIOS = tuple(range(1, 17))  # query heads to a key head


def make_batch(rows, *, heads, kv_heads, head_dim, page_size, dtype, seed=0, padding=5):
    """Arrays of a ragged batch of (queries, context); one empty row and padding tokens last."""
    rng = np.random.default_rng(seed)
    pages = [-(-c // page_size) for _, c in rows]
    total = sum(pages) + 2
    tables = np.full((len(rows) + 1, max(pages)), 2**30, np.int32)  # poison past the context
    order = rng.permutation(total)
    for r, n in enumerate(pages):
        tables[r, :n], order = order[:n], order[n:]
    starts = np.cumsum([0, *(n for n, _ in rows), 0]).astype(np.int32)
    context = np.array([c for _, c in rows] + [0], np.int32)
    shape = (2, kv_heads, total, page_size, head_dim)
    k_pages, v_pages = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((starts[-1] + padding, heads, head_dim)), dtype)
    ints = (jnp.asarray(x) for x in (tables, starts, context))
    return q, k_pages, v_pages, jnp.int32(1), *ints


def numpy_attention(q, k_pages, v_pages, layer, tables, starts, context, *, scale):
    """One query and one head at a time, in float64."""
    q, k_pages, v_pages = (np.asarray(x, np.float64) for x in (q, k_pages, v_pages))
    tables, starts, context = (np.asarray(x) for x in (tables, starts, context))
    page_size, head_dim = k_pages.shape[3:]
    out = np.zeros_like(q)
    for r, length in enumerate(context):
        pages = tables[r, : -(-length // page_size)]
        k, v = (
            x[int(layer)][:, pages].reshape(x.shape[1], -1, head_dim) for x in (k_pages, v_pages)
        )
        for token in range(starts[r], starts[r + 1]):
            seen = length - (starts[r + 1] - 1 - token)
            for head in range(q.shape[1]):
                kv = head // (q.shape[1] // k.shape[0])
                logits = k[kv, :seen] @ q[token, head] * scale
                weights = np.exp(logits - logits.max())
                out[token, head] = weights @ v[kv, :seen] / weights.sum()
    return out


def relative_error(out, expected):
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(("heads", "page_size", "seed"), [(2, 16, 0), (6, 4, 1), (16, 8, 2)])
def test_reference_matches_numpy(heads, page_size, seed):
    rows = [(1, 5), (1, 40), (9, 9), (4, 33), (1, 1)]
    shape = {"heads": heads, "kv_heads": 2, "head_dim": 8, "page_size": page_size}
    batch = make_batch(rows, **shape, dtype=jnp.float32, seed=seed)
    attend = jax.jit(ragged_attention, static_argnames=("scale", "implementation"))
    out = attend(*batch, scale=0.3, implementation="reference")
    np.testing.assert_allclose(out, numpy_attention(*batch, scale=0.3), atol=2e-6)


def test_reference_ignores_slots_that_nobody_wrote():
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 8, "page_size": 16}
    q, k, v, layer, *rest = make_batch([(1, 20)], **shape, dtype=jnp.float32)
    expected = ragged_attention(q, k, v, layer, *rest, scale=1.0, implementation="reference")
    page = rest[0][0, 1]
    k, v = (x.at[:, :, page, 4:].set(jnp.nan) for x in (k, v))
    out = ragged_attention(q, k, v, layer, *rest, scale=1.0, implementation="reference")
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("seed", range(8))
def test_decode_plan_cuts_all_tiles_into_equal_pieces(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 1, 1, 5], size=9)
    context = np.where(lengths > 0, rng.integers(5, 700, size=9), 0).astype(np.int32)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    workers, kv_heads, block = int(rng.integers(1, 40)), int(rng.integers(1, 5)), 64
    plan = decode_plan(
        *(jnp.asarray(x) for x in (starts, context)),
        kv_heads=kv_heads,
        block_kv=block,
        workers=workers,
    )
    decode = [r for r in range(9) if lengths[r] == 1]
    np.testing.assert_array_equal(plan.row[: len(decode)], decode)
    np.testing.assert_array_equal(plan.token[: len(decode)], starts[decode])
    line = [d for d, r in enumerate(decode) for _ in range(kv_heads * -(-context[r] // block))]
    edges = np.asarray(plan.worker_starts)
    assert edges[0] == 0
    assert edges[-1] == len(line) == plan.starts[-1]
    pieces = np.diff(edges)[np.diff(edges) > 0]
    assert np.ptp(pieces) <= 1
    assert len(pieces) == min(workers, max(1, len(line) // MIN_TILES))
    for worker in range(workers):
        if edges[worker] < edges[worker + 1]:
            assert plan.worker_rows[worker] == line[edges[worker + 1] - 1]


@pytest.mark.parametrize("seed", range(8))
def test_prefill_plan_covers_every_other_query_once(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 1, 2, 40, 130, 200], size=7)
    context = np.where(lengths > 0, lengths + rng.integers(0, 90, size=7), 0).astype(np.int32)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    tokens, block = int(starts[-1]) + int(rng.integers(0, 200)), 64
    plan = prefill_plan(*(jnp.asarray(x) for x in (starts, context)), tokens=tokens, block_q=block)
    times = np.zeros(tokens, int)
    for slot in range(int(plan.first_slot[-1])):
        d = int(plan.slot_row[slot])
        tile = slot - int(plan.first_slot[d])
        assert 0 <= tile < int(plan.tiles[d])
        first = int(plan.start[d]) // 8 * 8 + tile * block
        times[max(first, int(plan.start[d])) : min(first + block, int(plan.end[d]))] += 1
    expected = np.ones(tokens, int)
    for r in range(7):
        if lengths[r] == 1:
            expected[starts[r]] = 0  # the decode kernel's
    np.testing.assert_array_equal(times, expected)
    assert (np.diff(np.asarray(plan.context)[np.asarray(plan.tiles) > 0]) <= 0).all()
    used = int(plan.first_slot[-1])
    assert sorted(np.asarray(plan.slots)[:used]) == list(range(used))
    visible = []
    for slot in np.asarray(plan.slots)[:used]:
        d = int(plan.slot_row[slot])
        rank = slot - int(plan.first_slot[d])
        start, end, length = (int(x[d]) for x in (plan.start, plan.end, plan.context))
        last = min(start // 8 * 8 + (int(plan.tiles[d]) - rank) * block, end)
        visible.append(length - end + last if length else 0)
    assert (np.diff(visible) <= 0).all()


def test_shapes_that_do_not_fit_are_errors():
    shape = {"kv_heads": 2, "dtype": jnp.bfloat16}
    cases = [
        ({"heads": 3, "head_dim": 64, "page_size": 16}, "multiple of"),
        ({"heads": 4, "head_dim": 32, "page_size": 16}, "head_dim=32 must be 64 or 128"),
        ({"heads": 4, "head_dim": 64, "page_size": 8}, "page_size=8 must be 16"),
        ({"heads": 34, "head_dim": 64, "page_size": 16}, "must be 1 to 16"),
        ({"heads": 4, "head_dim": 64, "page_size": 16, "dtype": jnp.float32}, "bfloat16"),
    ]
    for case, message in cases:
        batch = make_batch([(1, 5)], **(shape | case))
        with pytest.raises(ValueError, match=message):
            ragged_attention(*batch, scale=1.0, implementation="mosaic")
    batch = make_batch([(1, 5)], **shape, heads=4, head_dim=64, page_size=16)
    with pytest.raises(ValueError, match="'triton' is unknown"):
        ragged_attention(*batch, scale=1.0, implementation="triton")
    with pytest.raises(ValueError, match="must be at least 2"):
        TuningConfig(decode_stages=1)
    with pytest.raises(ValueError, match="'both' must be one of"):
        TuningConfig(prefill_products="both")
    with pytest.raises(ValueError, match="'random' must be one of"):
        TuningConfig(prefill_order="random")


def check_interpreted(rows, tokens, *, heads, kv_heads=1, padding=3, **config):
    """Run the kernels in the interpreter on two small thread blocks."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": 64, "page_size": 16}
    batch = make_batch(rows, **shape, dtype=jnp.bfloat16, padding=padding)
    config = TuningConfig(
        **{"num_sms": 2, "decode_streams": 1, "decode_stages": 2, "prefill_block_kv": 64, **config}
    )

    @jax.jit
    def attend(*batch):
        interpret = params.InterpretGPUParams()
        return ragged_attention_mosaic(*batch, scale=0.125, config=config, interpret=interpret)

    out = attend(*batch)
    expected = ragged_attention(*batch, scale=0.125, implementation="reference")
    assert relative_error(out, expected) < LIMIT
    assert not np.asarray(out[tokens:], np.float32).any()


def test_kernels_interpreted_match_reference():
    """A decode row cut between two workers and a chunk of a prompt, through both kernels."""
    check_interpreted([(1, 1100), (20, 90)], 21, heads=2, prefill_products="apart")


@pytest.mark.parametrize(("blocks", "streams"), [(5, 1), (2, 2)])
def test_decode_rows_cut_between_many_workers_are_merged(blocks, streams):
    """Whole rows, rows of two and of three parts, and parts of the same thread block."""
    rows = [(1, 1800), (1, 70), (1, 1900)]
    check_interpreted(rows, 3, heads=2, num_sms=blocks, decode_streams=streams)


@pytest.mark.parametrize(
    ("heads", "products", "order"), [(2, "chained", "longest"), (3, "chained", "rows")]
)
def test_prefill_variants_interpreted_match_reference(heads, products, order):
    """Whole tiles and pieces of tiles, several items for each block, and padding of two tiles."""
    rows = [(20, 90), (135, 150), (1, 70)]
    variant = {"prefill_products": products, "prefill_order": order}
    check_interpreted(rows, 156, heads=heads, padding=70, **variant)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_kernels_match_reference_on_random_batches(hopper, seed, head_dim):
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 8]))
    heads = kv_heads * int(rng.choice(RATIOS))
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    shape["page_size"] = int(rng.choice([16, 32, 64, 128]))
    decode = [(1, int(c)) for c in rng.integers(1, 3000, size=rng.integers(0, 20))]
    chunks = [(int(n), int(n + p)) for n, p in rng.integers(2, 500, size=(rng.integers(0, 6), 2))]
    rows = decode + chunks + [(3, 3)]
    batch = make_batch(rows, **shape, dtype=jnp.bfloat16, seed=seed, padding=int(seed * 37))
    poison = jnp.full(2**26, jnp.nan, jnp.float32).block_until_ready()
    poison.delete()  # outputs land where NaN was
    attend = jax.jit(ragged_attention, static_argnames=("scale", "implementation"))
    out = attend(*batch, scale=head_dim**-0.5, implementation="mosaic")
    wide = [x.astype(jnp.float32) for x in batch[:3]]
    expected = attend(*wide, *batch[3:], scale=head_dim**-0.5, implementation="reference")
    assert relative_error(out, expected) < LIMIT
    assert not np.asarray(out[batch[5][-1] :], np.float32).any()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("ratio", RATIOS)
def test_every_head_ratio_matches_numpy(hopper, ratio, head_dim):
    """The kernels and, on the same GPU, the reference: of a failure one knows whose it is."""
    shape = {"heads": 2 * ratio, "kv_heads": 2, "head_dim": head_dim}
    shape["page_size"] = (16, 32, 64, 128)[ratio % 4]
    # Among the decodes short ones behind each other, of which a worker does several.
    decode = [(1, n) for n in (1, 105, 83, 40, 700, 2900)]
    rows = [*decode, (9, 200), (70, 70), (131, 300)]
    batch = make_batch(rows, **shape, dtype=jnp.bfloat16, seed=ratio, padding=21)
    scale = head_dim**-0.5
    expected = numpy_attention(*batch, scale=scale)
    attend = jax.jit(ragged_attention, static_argnames=("scale", "implementation"))
    wide = [x.astype(jnp.float32) for x in batch[:3]]
    outs = {
        "mosaic": attend(*batch, scale=scale, implementation="mosaic"),
        "reference": attend(*wide, *batch[3:], scale=scale, implementation="reference"),
    }
    parts = {"decode": slice(0, len(decode)), "prefill": slice(len(decode), len(decode) + 210)}
    errors = {
        f"{kernel}, {part}": float(relative_error(np.asarray(out, np.float32)[at], expected[at]))
        for kernel, out in outs.items()
        for part, at in parts.items()
    }
    assert all(error < LIMIT for error in errors.values()), errors


@pytest.mark.gpu
@pytest.mark.parametrize("products", PREFILL_PRODUCTS)
@pytest.mark.parametrize("seed", range(4))
def test_prefill_variants_match_reference_on_random_batches(hopper, seed, products):
    rng = np.random.default_rng(100 + seed)
    kv_heads, head_dim = int(rng.choice([1, 2, 8])), (64, 128)[seed % 2]
    shape = {"heads": kv_heads * (1, 8, 3, 6)[seed], "kv_heads": kv_heads, "head_dim": head_dim}
    shape["page_size"] = (16, 32, 64, 128)[seed]
    chunks = [(int(n), int(n + p)) for n, p in rng.integers(2, 700, size=(seed * 3 + 1, 2))]
    rows = [(1, 900), *chunks, (3, 3), (1000, 1000)]
    batch = make_batch(rows, **shape, dtype=jnp.bfloat16, seed=seed, padding=seed * 111)
    config = TuningConfig(
        prefill_products=products,
        prefill_block_kv=(128, 64)[seed // 2],
        prefill_order=("longest", "rows")[seed // 3],
    )
    attend = jax.jit(ragged_attention, static_argnames=("scale", "implementation"))
    scale = head_dim**-0.5
    out = jax.jit(ragged_attention_mosaic, static_argnames=("scale", "config"))(
        *batch, scale=scale, config=config
    )
    wide = [x.astype(jnp.float32) for x in batch[:3]]
    expected = attend(*wide, *batch[3:], scale=scale, implementation="reference")
    assert relative_error(out, expected) < LIMIT
    assert not np.asarray(out[batch[5][-1] :], np.float32).any()


@pytest.mark.gpu
def test_self_check_passes(hopper):
    errors = self_check(
        heads=16,
        kv_heads=2,
        head_dim=128,
        page_size=64,
        products=[(10240, 8192), (8192, 29568)],
        device=hopper,
    )
    kernels = {"ragged_attention", "update_kv", "top_threshold", "turn_heads", "indexed_matmul"}
    assert set(errors) == kernels
    assert max(errors.values()) < LIMIT


def test_self_check_names_what_is_missing():
    device = jax.local_devices(backend="cpu")[0]
    with pytest.raises(KernelError, match="need a Hopper GPU"):
        self_check(heads=4, kv_heads=2, head_dim=64, page_size=16, device=device)
