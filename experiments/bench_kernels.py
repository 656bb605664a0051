"""Check and time the kernels of attention, cache and sampling on a Hopper GPU, beside its ceilings.

    python experiments/bench_kernels.py --out results.json [--only decode,prefill]
    python experiments/bench_kernels.py --out sweep.json --sweep prefill

Inputs are random, several layers of the cache take turns (so that the L2 cache does not flatter),
memory is filled with NaN before each check, and every shape is compared with the float32
reference on a sample of its queries before it is timed. Prints figure, ceiling and ratio.
A sweep does the same for variants of the prefill kernel, compiled side by side: a line for each.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import Report

from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.ragged_attention import ragged_attention, ragged_attention_reference
from sidp_jax.kernels.ragged_attention_mosaic import (
    PREFILL_ORDERS,
    PREFILL_PRODUCTS,
    TuningConfig,
    ragged_attention_mosaic,
)
from sidp_jax.kernels.top_threshold import top_threshold

LAYERS = 2
CALLS = 8  # of one timed program, each with its own queries: equal calls would be merged


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch as (queries, context) of every row, decode rows first."""

    name: str
    rows: tuple[tuple[int, int], ...]
    unit: str  # "TB/s", "TFLOP/s" or "ms"
    page_size: int = 64
    heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def tokens(self) -> int:
        """Queries of all rows."""
        return sum(n for n, _ in self.rows)

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V that attention must read once."""
        return sum(c for _, c in self.rows) * self.kv_heads * self.head_dim * 4

    @property
    def flops(self) -> int:
        """Operations of the two products over all visible (query, key) pairs."""
        pairs = sum(n * c - n * (n - 1) // 2 for n, c in self.rows)
        return pairs * 4 * self.heads * self.head_dim

    def figure(self, seconds: float) -> float:
        """The time as the case's unit."""
        amount = {"TB/s": self.kv_bytes, "TFLOP/s": self.flops}.get(self.unit)
        return seconds * 1e3 if amount is None else amount / seconds / 1e12


def cases() -> list[Case]:
    """The shapes of the issue's table, and the corners of what the kernels take."""
    rng = np.random.default_rng(7)
    ragged = tuple((1, int(c)) for c in rng.integers(128, 8193, size=256))
    return [
        Case("decode 256 x 2048", ((1, 2048),) * 256, "TB/s"),
        Case("decode 64 x 8192", ((1, 8192),) * 64, "TB/s"),
        Case("decode 16 x 32768", ((1, 32768),) * 16, "TB/s"),
        Case("decode 256 ragged", ragged, "TB/s"),
        Case("decode 1 x 4096", ((1, 4096),), "ms"),
        Case("decode 256 x 64", ((1, 64),) * 256, "TB/s"),
        Case("decode 256 x 640", ((1, 640),) * 256, "TB/s"),
        Case("prefill 4 x 4096", ((4096, 4096),) * 4, "TFLOP/s"),
        Case("prefill 16 x 1024", ((1024, 1024),) * 16, "TFLOP/s"),
        Case("chunk 2048 on 16384", ((2048, 16384 + 2048),), "TFLOP/s"),
        Case("mixed 256 ragged + 2048 on 2048", (*ragged, (2048, 4096)), "ms"),
    ]


def corner_cases() -> list[Case]:
    """Small ragged batches over all page sizes, head sizes and head ratios; checked, not timed."""
    rng = np.random.default_rng(11)
    found = []
    shapes = [(8, 8), (14, 2), (40, 8), (32, 8), (64, 4), (12, 2)]
    for i, (heads, kv_heads) in enumerate(shapes):
        for head_dim in (64, 128):
            page_size = (16, 32, 64, 128)[(i + head_dim // 64) % 4]
            decode = [(1, int(c)) for c in rng.integers(1, 900, size=5)]
            lengths = [(int(n), int(n + p)) for n, p in rng.integers(2, 300, size=(4, 2))]
            whole = [(int(n), int(n)) for n in rng.integers(2, 200, size=3)]
            rows = tuple(decode + lengths + whole)
            name = f"ragged {heads}/{kv_heads} x {head_dim}, page {page_size}"
            found.append(Case(name, rows, "ms", page_size, heads, kv_heads, head_dim))
    return found


class Batch:
    """Device arrays of a case; pages in random order, the table poisoned past the context."""

    def __init__(self, case: Case, cache, seed: int, padding: int = 0):
        rng = np.random.default_rng(seed)
        self.case, (self.k_pages, self.v_pages) = case, cache
        pages = [-(-c // case.page_size) for _, c in case.rows]
        order = rng.permutation(self.k_pages.shape[2])
        tables = np.full((len(pages) + bool(padding), max(pages)), 2**30, np.int32)
        for r, n in enumerate(pages):
            tables[r, :n], order = order[:n], order[n:]
        lengths = [n for n, _ in case.rows] + [0] * bool(padding)
        self.tables = jnp.asarray(tables)
        self.starts = jnp.asarray(np.cumsum([0, *lengths]), jnp.int32)
        self.context = jnp.asarray([c for _, c in case.rows] + [0] * bool(padding), jnp.int32)
        self.tokens = case.tokens + padding
        self.scale = case.head_dim**-0.5
        shape = (self.tokens, case.heads, case.head_dim)
        keys = jax.random.split(jax.random.key(seed), CALLS)
        self.q = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys]
        self._samples = {}

    def args(self, layer: int):
        """Arguments of `ragged_attention`."""
        layer = jnp.int32(layer)
        return (self.k_pages, self.v_pages, layer, self.tables, self.starts, self.context)

    def sample_error(self, out, layer: int, count: int = 384) -> float:
        """Relative error of a sample of queries against the float32 reference.

        Each sampled query is a row of its own, whose context ends at its position.
        """
        if (layer, count) not in self._samples:
            self._samples[layer, count] = self._sample(layer, count)
        token, expected = self._samples[layer, count]
        return relative_error(out[token], expected)

    def _sample(self, layer: int, count: int):
        rng = np.random.default_rng(layer)
        rows = np.repeat(np.arange(len(self.case.rows)), [n for n, _ in self.case.rows])
        token = np.sort(rng.permutation(self.case.tokens)[:count])
        ends = np.asarray(self.starts)[rows[token] + 1]
        visible = np.asarray(self.context)[rows[token]] - (ends - 1 - token)
        tables = np.where(np.asarray(self.tables) == 2**30, 0, np.asarray(self.tables))
        expected = jax.jit(ragged_attention_reference, static_argnames="scale")(
            self.q[layer][token].astype(jnp.float32),
            self.k_pages,
            self.v_pages,
            jnp.int32(layer),
            jnp.asarray(tables[rows[token]]),
            jnp.arange(len(token) + 1, dtype=jnp.int32),
            jnp.asarray(visible, jnp.int32),
            scale=self.scale,
        )
        return token, expected


def relative_error(out, expected) -> float:
    """Norm of the difference over the norm of what was expected; NaN counts as infinite."""
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    error = np.linalg.norm(out - expected) / np.linalg.norm(expected)
    return float(error) if np.isfinite(error) else float("inf")


def poison(gigabytes: float = 3.0) -> None:
    """Leave NaN in the memory that the next outputs will get."""
    block = jnp.full(int(gigabytes * 2**28), jnp.nan, jnp.float32)
    jax.block_until_ready(block)
    block.delete()


def seconds_of(function, *args, repeats: int = 5, inner: int = 1) -> float:
    """Median time of one call, after a warm-up; `inner` calls are queued before each wait."""
    jax.block_until_ready(function(*args))
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        results = [function(*args) for _ in range(inner)]
        jax.block_until_ready(results)
        times.append((time.perf_counter() - start) / inner)
        del results
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Copy bandwidth (read and written) and bf16 GEMM rate of this machine, now."""
    x = jax.random.normal(jax.random.key(0), (2**30,), jnp.bfloat16)
    copy = seconds_of(jax.jit(jnp.copy), x, inner=10)
    a, b = jax.random.normal(jax.random.key(1), (2, 8192, 8192), jnp.bfloat16)
    gemm = seconds_of(jax.jit(jnp.dot), a, b, inner=20)
    return {"TB/s": 2 * x.nbytes / copy / 1e12, "TFLOP/s": 2 * 8192**3 / gemm / 1e12}


def attention_program(batch: Batch, attend):
    """A program of `CALLS` calls over alternating layers, and its arguments."""

    @jax.jit
    def program(q, k_pages, v_pages, tables, starts, context):
        return [
            attend(q[i], k_pages, v_pages, i % LAYERS, tables, starts, context)
            for i in range(CALLS)
        ]

    args = (batch.q, batch.k_pages, batch.v_pages, batch.tables, batch.starts, batch.context)
    return program, args


def compile_side_by_side(work: Sequence[tuple[Batch, TuningConfig | None]]) -> list[tuple]:
    """The programs of batches and configs, with their arguments.

    All before the first timing, which other threads would disturb.
    """

    def compiled(each):
        program, args = attention_program(each[0], mosaic(*each))
        return program.lower(*args).compile(), args

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(compiled, work))
    print(f"{len(work)} programs compiled in {time.perf_counter() - start:.0f} s", flush=True)
    return programs


def mosaic(batch: Batch, config: TuningConfig | None = None):
    """`ragged_attention` by the kernels."""

    def attend(q, *rest):
        if config is None:
            return ragged_attention(q, *rest, scale=batch.scale, implementation="mosaic")
        return ragged_attention_mosaic(q, *rest, scale=batch.scale, config=config)

    return attend


def cudnn_prefill(batch: Batch):
    """The same whole prompts, unpaged, through cuDNN: seconds and relative error."""
    case, (n, length) = batch.case, (len(batch.case.rows), batch.case.rows[0][1])
    pages = jnp.asarray(batch.tables)
    k, v = (
        [
            jnp.moveaxis(x[layer][:, pages], 0, 3).reshape(n, length, case.kv_heads, case.head_dim)
            for layer in range(LAYERS)
        ]
        for x in (batch.k_pages, batch.v_pages)
    )
    q = [x.reshape(n, length, case.heads, case.head_dim) for x in batch.q]

    def attend(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=batch.scale, implementation="cudnn"
        )

    program = jax.jit(
        lambda q, k, v: [attend(q[i], k[i % LAYERS], v[i % LAYERS]) for i in range(CALLS)]
    )
    out = jax.jit(attend)(q[1], k[1], v[1]).reshape(batch.q[1].shape)
    return seconds_of(program, q, k, v, inner=4) / CALLS, batch.sample_error(out, 1)


def make_cache(case: Case, seed: int, tokens: int | None = None):
    """Random K and V pages, a little more than the case needs."""
    needed = sum(-(-c // case.page_size) for _, c in case.rows)
    pages = max(needed + 8, -(-(tokens or 0) // case.page_size))
    shape = (LAYERS, case.kv_heads, pages, case.page_size, case.head_dim)
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    return tuple(make(key) for key in jax.random.split(jax.random.key(seed)))


def check_corners(report: dict) -> None:
    """Check small ragged batches, with padding tokens and a padding row."""
    for i, case in enumerate(corner_cases()):
        batch = Batch(case, make_cache(case, i), seed=i, padding=24)
        poison(0.05)
        out = jax.jit(mosaic(batch))(batch.q[1], *batch.args(1))
        error = batch.sample_error(out, 1, count=case.tokens)
        rest = float(jnp.max(jnp.abs(out[case.tokens :].astype(jnp.float32))))
        good = error < 1e-2 and rest == 0.0
        report["checks"].append({"case": case.name, "error": error, "padding": rest, "ok": good})
        print(f"{'ok ' if good else 'BAD'} {case.name:34s} error {error:.2e} padding {rest}")


def bench_attention(report: dict, only: tuple[str, ...]) -> None:
    """Check and time the table's shapes."""
    wanted = [
        case for case in cases() if not only or any(case.name.startswith(word) for word in only)
    ]
    if not wanted:
        return
    cache = make_cache(cases()[3], 3, tokens=1_200_000)
    batches = [Batch(case, cache, seed=5) for case in wanted]
    programs = compile_side_by_side([(batch, None) for batch in batches])
    for case, batch, (program, args) in zip(wanted, batches, programs, strict=True):
        poison()
        error = batch.sample_error(program(*args)[1], 1)
        add_row(report, case, "mosaic", seconds_of(program, *args, inner=4) / CALLS, error)
        if case.name.startswith("prefill"):
            seconds, error = cudnn_prefill(batch)
            add_row(report, case, "cuDNN, not paged", seconds, error)


def prefill_variants() -> dict[str, TuningConfig]:
    """The ways to cut prefill work that are compared, the default first."""
    variants = {"default": TuningConfig()}
    for products, order in itertools.product(PREFILL_PRODUCTS, PREFILL_ORDERS):
        config = TuningConfig(prefill_products=products, prefill_order=order)
        if config != variants["default"]:
            variants[f"{products}, {order}"] = config
    return variants


def sweep_prefill(written: Report) -> None:
    """Check and time every variant on the prefill shapes and the mixed one."""
    ceiling = written.content["ceilings"]["TFLOP/s"]
    shapes = [case for case in cases() if not case.name.startswith("decode")]
    cache = make_cache(shapes[-1], 3)
    batches = [Batch(case, cache, seed=5) for case in shapes]
    variants = prefill_variants()

    work = [(batch, config) for config in variants.values() for batch in batches]
    programs = iter(compile_side_by_side(work))
    for variant in variants:
        row = {"variant": variant}
        for case, batch in zip(shapes, batches, strict=True):
            program, args = next(programs)
            poison()
            error = batch.sample_error(program(*args)[1], 1)
            seconds = seconds_of(program, *args, inner=4, repeats=3) / CALLS
            row[case.name] = {"figure": case.figure(seconds), "unit": case.unit, "error": error}
            if case.unit == "TFLOP/s":
                row[case.name]["ratio"] = case.figure(seconds) / ceiling
        written.content.setdefault("sweep", []).append(row)
        written.write()
        print(sweep_line(row), flush=True)


def sweep_line(row: dict) -> str:
    """A variant's figures beside the GEMM rate of the same run; BAD where its results are."""
    parts = [f"{row['variant']:24s}"]
    for name, at in row.items():
        if name == "variant":
            continue
        ratio = f" ({at['ratio']:.2f})" if "ratio" in at else ""
        bad = "" if at["error"] < 1e-2 else f" BAD {at['error']:.1e}"
        parts.append(f"{name}: {at['figure']:.4g} {at['unit']}{ratio}{bad}")
    return " | ".join(parts)


def add_row(report: dict, case: Case, kernel: str, seconds: float, error: float) -> None:
    """Put one measurement into the report and print it."""
    figure, ceiling = case.figure(seconds), report["ceilings"].get(case.unit)
    row = {"case": case.name, "kernel": kernel, "error": error, "ms": seconds * 1e3}
    row |= {"unit": case.unit, "figure": figure, "ratio": figure / ceiling if ceiling else None}
    report["attention"].append(row)
    ratio = f"{row['ratio']:.2f} of ceiling" if ceiling else ""
    line = f"{case.name:32s} {kernel:18s} {figure:8.3f} {case.unit:8s}"
    print(f"{line} {row['ms']:8.3f} ms  error {error:.1e}  {ratio}", flush=True)


def bench_update(report: dict) -> None:
    """Check and time the KV update: rows of a decode batch and of a prefill batch."""
    case = Case("cache", ((1, 300_000),), "ms")
    for tokens in (16, 256, 2048, 8192):
        for implementation in ("mosaic", "reference"):
            k_pages, v_pages = make_cache(case, 1)
            k, v = jax.random.normal(jax.random.key(2), (2, tokens, 8, 128), jnp.bfloat16)
            slots = np.random.default_rng(3).permutation(300_000)[:tokens].astype(np.int32)
            slots[::7] = -1
            calls = 16

            def program(k_pages, v_pages, k, v, slots, implementation=implementation, calls=calls):
                for i in range(calls):
                    k_pages, v_pages = update_kv(
                        *(k_pages, v_pages, k, v, i % LAYERS, slots), implementation=implementation
                    )
                return k_pages, v_pages

            program = jax.jit(program, donate_argnums=(0, 1))
            before = np.asarray(k_pages[:, 0, :50])
            k_pages, v_pages = jax.block_until_ready(program(k_pages, v_pages, k, v, slots))
            kept = slots >= 0
            flat = v_pages.reshape(LAYERS, 8, -1, 128)[1][:, slots[kept]]
            good = bool(jnp.array_equal(jnp.swapaxes(flat, 0, 1), v[kept]))
            untouched = ~np.isin(np.arange(50 * 64), slots)
            after = np.asarray(k_pages[:, 0, :50]).reshape(LAYERS, -1, 128)[:, untouched]
            good &= bool((after == before.reshape(LAYERS, -1, 128)[:, untouched]).all())
            times = []
            for _ in range(7):
                start = time.perf_counter()
                for _ in range(4):
                    k_pages, v_pages = program(k_pages, v_pages, k, v, slots)
                jax.block_until_ready((k_pages, v_pages))
                times.append((time.perf_counter() - start) / (4 * calls))
            row = {"tokens": tokens, "implementation": implementation, "ok": good}
            row["us"] = statistics.median(times) * 1e6
            report["kv_update"].append(row)
            print("kv_update", row, flush=True)


def bench_thresholds(report: dict) -> None:
    """Check and time the thresholds of top-k and top-p, beside one read of all weights."""
    groups = 1187  # of 128: a vocabulary of 151,936
    for rows in (64, 256):
        weights = jax.random.uniform(jax.random.key(6), (rows, groups, 128))
        read = weights.nbytes / (report["ceilings"]["TB/s"] * 1e12)
        for name, k, p in (("top-k", 1000, 1.0), ("top-p", 0, 0.9), ("both", 1000, 0.9)):
            options = [jnp.full(rows, x) for x in (jnp.float32(0), jnp.int32(k), jnp.float32(p))]
            found = []
            for implementation in ("reference", "mosaic"):
                search = jax.jit(partial(top_threshold, implementation=implementation))
                found.append(search(weights, *options))
                seconds = seconds_of(search, weights, *options, inner=10)
                row = {"rows": rows, "options": name, "implementation": implementation}
                row |= {"us": seconds * 1e6, "reads": seconds / read}
                row["ok"] = bool((found[0] == found[-1]).all())
                report["thresholds"].append(row)
                print("thresholds", row, flush=True)


def main() -> None:
    """Run what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="beginnings of case names, or corners, kv, top")
    parser.add_argument("--sweep", choices=["prefill"], help="compare variants of this kernel")
    args = parser.parse_args()
    only = tuple(word for word in args.only.split(",") if word)
    empty = {"checks": [], "attention": [], "kv_update": [], "thresholds": []}
    what = f"measured on one {jax.devices()[0].device_kind}"
    written = Report(what, args.out, ceilings=ceilings(), **empty)
    report = written.content
    if args.sweep:
        sweep_prefill(written)
        return
    parts = [lambda: bench_attention(report, only)]
    if not only or "kv" in only:
        parts.append(lambda: bench_update(report))
    if not only or "top" in only:
        parts.append(lambda: bench_thresholds(report))
    if not only or "corners" in only:
        parts.append(lambda: check_corners(report))
    for part in parts:
        part()
        written.write()


if __name__ == "__main__":
    main()
