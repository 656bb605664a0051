"""Which tokens top-k and top-p keep: for each row of weights the smallest one that they keep.

No sort of the vocabulary: floats in [0, 1] are ordered as their bits are, so the threshold is found
digit by digit, by passes that add up what lies above several pivots at once. Every sum is one of
integers, so that the order of summation cannot change the result.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

IMPLEMENTATIONS = ("reference", "mosaic")
WEIGHT_BITS = 30  # the bits of a float32 in [0, 1], read as an integer, are below 2**30
DIGIT_BITS = 3
PIVOTS = range(1, 2**DIGIT_BITS)
SUM_BITS = 30  # sums of fixed-point weights stay below about 2**SUM_BITS


def top_threshold(
    weights: Float[Array, "rows groups lanes"],
    floor: Float[Array, "rows"],
    top_k: Int[Array, "rows"],
    top_p: Float[Array, "rows"],
    *,
    implementation: str,
) -> Float[Array, "rows"]:
    """The smallest weight of each row that is kept: by `floor`, then top-k, then top-p.

    Weights that are equal in float32 are kept or dropped together: ties at the threshold are kept.

    Args:
        weights: float32 in [0, 1], in no order; for top-p the largest of a row must not be tiny.
        floor: weights below it are dropped first.
        top_k: how many to keep at least, the largest ones; 0 keeps all.
        top_p: of what those two keep, the share of the mass to keep at least, by the largest
            weights; 1 keeps all.
        implementation: "reference" (any backend) or "mosaic" (Hopper), to the same bits.

    Returns:
        The threshold; `floor` where nothing else drops any.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation is unknown.
    """
    if weights.dtype != jnp.float32:
        raise ValueError(f"{weights.dtype=} must be float32: its bits are searched")
    args = (weights, floor, top_k, top_p)
    if implementation == "reference":
        return top_threshold_reference(*args)
    if implementation == "mosaic":
        from sidp_jax.kernels.top_threshold_mosaic import top_threshold_mosaic

        return top_threshold_mosaic(*args)
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")


def top_threshold_reference(
    weights: Float[Array, "rows groups lanes"],
    floor: Float[Array, "rows"],
    top_k: Int[Array, "rows"],
    top_p: Float[Array, "rows"],
) -> Float[Array, "rows"]:
    """`top_threshold` in plain jax: the obvious twin of the kernel."""
    # Without the barrier every pass would make the weights again.
    weights = lax.optimization_barrier(weights.reshape(weights.shape[0], -1))
    floor = jnp.where(top_k > 0, jnp.maximum(floor, _by_top_k(weights, top_k)), floor)
    return jnp.where(top_p < 1, _by_top_p(weights, floor, top_p), floor)


def _by_top_k(weights: Float[Array, "rows tokens"], k: Int[Array, "rows"]) -> Float[Array, "rows"]:
    """The k-th largest weight."""
    return _largest_threshold(weights, lambda w: jnp.ones_like(w, jnp.int32), lambda n: n >= k)


def _by_top_p(
    weights: Float[Array, "rows tokens"], floor: Float[Array, "rows"], p: Float[Array, "rows"]
) -> Float[Array, "rows"]:
    """The largest threshold that keeps the share `p` of the mass of weights from `floor` on."""

    def kept(w: Float[Array, "rows tokens"]) -> Float[Array, "rows tokens"]:
        return jnp.where(w >= floor[:, None], w, 0)

    rough = rough_exponent(weights.shape[1])
    exponent = fine_exponent(rough, rounded_up(kept(weights), rough).sum(-1))[:, None]

    def fixed(w: Float[Array, "rows tokens"]) -> Int[Array, "rows tokens"]:
        return fixed_point(kept(w), exponent)

    target = p * fixed(weights).sum(-1).astype(jnp.float32)
    found = _largest_threshold(weights, fixed, lambda mass: mass.astype(jnp.float32) >= target)
    return jnp.clip(found, floor, 1)


def _largest_threshold(
    weights: Float[Array, "rows tokens"],
    measure: Callable[[Float[Array, "rows tokens"]], Int[Array, "rows tokens"]],
    enough: Callable[[Int[Array, "rows"]], Bool[Array, "rows"]],
) -> Float[Array, "rows"]:
    """The largest t for which the summed measure of the weights that are at least t is enough."""

    def find_digit(i: Int[Array, ""], bits: Int[Array, "rows"]) -> Int[Array, "rows"]:
        shift = WEIGHT_BITS - DIGIT_BITS * (i + 1)
        pivots = [
            lax.bitcast_convert_type(bits | (digit << shift), jnp.float32)[:, None]
            for digit in PIVOTS
        ]
        measured = measure(weights)
        # One reduction with seven results reads the weights once, whatever the compiler fuses.
        sums = lax.reduce(
            [jnp.where(weights >= pivot, measured, 0) for pivot in pivots],
            [jnp.int32(0)] * len(pivots),
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            dimensions=(1,),
        )
        return bits | (sum(enough(s).astype(jnp.int32) for s in sums) << shift)

    bits = jnp.zeros_like(weights[:, 0], jnp.int32)
    bits = lax.fori_loop(0, WEIGHT_BITS // DIGIT_BITS, find_digit, bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def rough_exponent(tokens: int) -> int:
    """The power of two by which so many weights may be scaled, rounded up, and added up."""
    return SUM_BITS - (tokens - 1).bit_length()


def rounded_up(weights: Float[Array, "..."], exponent: int) -> Int[Array, "..."]:
    """`weights * 2**exponent`, rounded up where it is not 0."""
    return (weights * 2.0**exponent).astype(jnp.int32) + (weights > 0).astype(jnp.int32)


def fine_exponent(rough: int, total: Int[Array, "..."]) -> Int[Array, "..."]:
    """The power of two that uses all bits of a sum, from the total with a rough one."""
    return rough + SUM_BITS - (32 - lax.clz(total))


def fixed_point(weights: Float[Array, "..."], exponent: Int[Array, "..."]) -> Int[Array, "..."]:
    """`weights * 2**exponent`, rounded."""
    return (weights * power_of_two(exponent) + 0.5).astype(jnp.int32)


def power_of_two(exponent: Int[Array, "..."]) -> Float[Array, "..."]:
    """`2**exponent` in float32, exactly; from -126 to 127."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
