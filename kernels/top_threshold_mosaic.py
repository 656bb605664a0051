"""The thresholds of top-k and top-p for Hopper, in Pallas' Mosaic GPU dialect.

One thread block for each row: it streams the row through a ring in shared memory, and each pass
finds two bits of a threshold. A row without top-k and top-p is not read at all. Two blocks share a
multiprocessor.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.mosaic import gpu_kernel
from sidp_jax.kernels.top_threshold import (
    fine_exponent,
    fixed_point,
    power_of_two,
    rough_exponent,
    rounded_up,
)

LANES = 128
CHUNK = 32  # groups of one slot of the ring
TILE = 8  # groups in registers at a time
STAGES = 6
SPLIT_BITS = 2  # of the threshold, found in one pass: so reading takes as long as comparing
ONE = 0x3F800000  # the bits of 1.0
_STRIDED = plgpu.Layout.WG_STRIDED((TILE, LANES), vec_size=2)


def top_threshold_mosaic(
    weights: Float[Array, "rows groups lanes"],
    floor: Float[Array, "rows"],
    top_k: Int[Array, "rows"],
    top_p: Float[Array, "rows"],
    *,
    interpret: Any = None,
) -> Float[Array, "rows"]:
    """`top_threshold` with the Hopper kernel; `interpret` runs it on the CPU (tests)."""
    rows, groups, lanes = weights.shape
    if lanes != LANES:
        raise ValueError(f"{weights.shape=} must end in {LANES} for the mosaic kernel")
    chunks = pl.cdiv(groups, CHUNK)
    stages = min(STAGES, chunks)  # at most a pass is loaded ahead
    rough = rough_exponent(groups * lanes)
    padded = jnp.pad(weights, ((0, 0), (0, chunks * CHUNK - groups), (0, 0)))

    def kernel(bits_ref, floor_ref, k_ref, p_ref, out_ref, ring, out_smem, loaded):
        row = lax.axis_index("block")
        k, p, floor = k_ref[row], p_ref[row], floor_ref[row]

        def load(n):
            """The n-th load: the passes are one stream of them."""
            slot = lax.rem(n, jnp.int32(stages))
            first = lax.rem(n, jnp.int32(chunks)) * CHUNK
            source = bits_ref.at[row, pl.ds(first, CHUNK)]
            plgpu.copy_gmem_to_smem(source, ring.at[slot], loaded.at[slot])

        def sweep(number, passes, sums_of, count):
            """What `sums_of` makes of a tile, added up over the row.

            Args:
                number: this pass, counted from the row's first.
                passes: how many are sure to come in all: the ring is filled for them.
                sums_of: makes of a tile as many tiles as there are sums.
                count: how many those are.
            """

            def chunk(i, totals):
                n = number * chunks + i
                slot = lax.rem(n, jnp.int32(stages))
                plgpu.barrier_wait(loaded.at[slot])
                for j in range(CHUNK // TILE):
                    parts = sums_of(ring[slot, pl.ds(j * TILE, TILE)])
                    totals = [total + part for total, part in zip(totals, parts, strict=True)]
                plgpu.commit_smem()  # everybody has read the slot
                pl.when(n + stages < passes * chunks)(lambda: load(n + stages))
                return totals

            zero = jnp.zeros((TILE, LANES), jnp.int32)
            if not interpret:
                zero = plgpu.layout_cast(zero, _STRIDED)
            return [total.sum() for total in lax.fori_loop(0, chunks, chunk, [zero] * count)]

        def search(low, done, passes, more, sums_of, enough):
            """The largest threshold from `low` on, as bits, for which `enough(sum, total)` holds.

            Args:
                low: bits for which it holds.
                done: passes before these.
                passes: how many these are; without any the result is `low`.
                more: passes that are sure to come after them.
                sums_of: `sums_of(x, pivots)`, what is added up: in total, and from each pivot on.
                enough: falls from true to false as thresholds rise.
            """

            def split(i, low):
                shift = SPLIT_BITS * (passes - 1 - i)
                pivots = [low + (part << shift) for part in range(1, 2**SPLIT_BITS)]
                total, *sums = sweep(
                    done + i, done + passes + more, lambda x: sums_of(x, pivots), 1 + len(pivots)
                )
                part = sum(jnp.where(enough(s, total), 1, 0) for s in sums)
                return low + (part << shift)

            return lax.fori_loop(0, passes, split, low)

        def counts(x, pivots):
            return [(x >= pivot).astype(jnp.int32) for pivot in (0, *pivots)]

        k_passes = jnp.where(k > 0, _passes(jnp.int32(0)), 0)
        sure_p_passes = jnp.where(p < 1, 2, 0)
        first = (k_passes + sure_p_passes) * chunks
        for n in range(stages):
            pl.when(n < first)(lambda n=n: load(jnp.int32(n)))
        by_k = search(jnp.int32(0), 0, k_passes, sure_p_passes, counts, lambda count, _: count >= k)
        floor_bits = jnp.maximum(lax.bitcast_convert_type(floor, jnp.int32), by_k)

        def kept(x):
            return lax.bitcast_convert_type(jnp.where(x >= floor_bits, x, 0), jnp.float32)

        def search_p(*_):
            (total,) = sweep(k_passes, k_passes + 2, lambda x: [rounded_up(kept(x), rough)], 1)
            exponent = fine_exponent(rough, total)

            def masses(x, pivots):
                mass = fixed_point(kept(x), exponent)
                return [mass, *(jnp.where(x >= pivot, mass, 0) for pivot in pivots)]

            def enough(mass, total):
                return mass.astype(jnp.float32) >= p * total.astype(jnp.float32)

            low = _least(p, total, rough, exponent, groups * lanes)
            return search(low, k_passes + 1, _passes(low), 0, masses, enough)

        # A loop of one round, or of none, is the branch that the compiler takes values from.
        by_p = lax.fori_loop(0, jnp.where(p < 1, 1, 0), search_p, jnp.int32(0))
        out_smem[...] = jnp.full((LANES,), jnp.minimum(jnp.maximum(by_p, floor_bits), ONE))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row])
        plgpu.wait_smem_to_gmem(0)

    (found,) = gpu_kernel(
        kernel,
        name="top_threshold",
        grid=rows,
        out_type=[jax.ShapeDtypeStruct((rows, LANES), jnp.int32)],
        scratch=[
            plgpu.SMEM((stages, CHUNK, LANES), jnp.int32),
            plgpu.SMEM((LANES,), jnp.int32),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        ],
        reduction_bytes=512,
        interpret=interpret,
    )(lax.bitcast_convert_type(padded, jnp.int32), floor, top_k, top_p)
    return lax.bitcast_convert_type(found[:, 0], jnp.float32)


def _passes(low):
    """Passes, one at least, that find a threshold among the bits from `low` to `ONE`."""
    bits = jnp.maximum(32 - lax.clz(ONE - low), 1)
    return lax.div(bits + (SPLIT_BITS - 1), jnp.int32(SPLIT_BITS))


def _least(p, total, rough: int, exponent, tokens: int):
    """Bits that the threshold of top-p is not below, whatever the weights are.

    If all of them lay just below it, they would still be less than the share 1 - p that may go.
    Each is rounded by up to 1 after scaling, the target by less than 2**7.

    Args:
        p: the share to keep.
        total: sum of the weights scaled by `2**rough`, each rounded up.
        rough: see `rough_exponent`.
        exponent: what they are scaled by for the sums that decide.
        tokens: how many weights there are.
    """
    mass = jnp.maximum((total - tokens).astype(jnp.float32) * 2.0**-rough, 1.0)
    spare = (1 - p) * (mass * power_of_two(exponent)) * 0.999 - 128
    least = jnp.maximum(spare * (1 / tokens) - 1, 0) * power_of_two(-exponent)
    return jnp.minimum(lax.bitcast_convert_type(least, jnp.int32), ONE)
