"""Thresholds of top-k and top-p: the reference against a sort, the kernel against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sidp_jax.kernels.top_threshold import top_threshold
from sidp_jax.kernels.top_threshold_mosaic import top_threshold_mosaic

MIXED = {
    "floor": [0, 1e-3, 0, 0, 0.01, 0, 0.2, 0],
    "top_k": [0, 5, 900, 0, 0, 1, 40, 10**6],
    "top_p": [0.9, 1, 0.5, 0.99, 0.3, 1, 0.7, 0.999],
}
"""Rows with nothing, one, two or all of the options, in this order of their names."""

EXTREME = {"top_p": [1e-6, 0.25, 0.95, 0.999, 0.99999, 0.9999999], "rows": 6}
"""Shares from next to nothing to next to all."""


def make_rows(*, groups=45, spread=3.0, ties=False, rows=8, **options):
    """Arguments of ``top_threshold``; an option is one value or one per row, which take turns."""
    rng = np.random.default_rng(groups)
    logits = rng.standard_normal((rows, groups, 128)) * spread
    if ties:
        logits = np.round(logits)
    weights = np.exp(logits - logits.max((1, 2), keepdims=True)).astype(np.float32)
    weights[weights < 2.0**-31] = 0
    options = {"floor": 0.0, "top_k": 0, "top_p": 1.0} | options
    types = {"floor": np.float32, "top_k": np.int32, "top_p": np.float32}
    fields = [np.resize(np.asarray(options[name], types[name]), rows) for name in types]
    return jnp.asarray(weights), *map(jnp.asarray, fields)


def sorted_thresholds(weights, floor, top_k, top_p):
    """Bounds of each row's threshold, from a sort in float64."""
    bounds = []
    for row, low, k, p in zip(*map(np.asarray, (weights, floor, top_k, top_p)), strict=True):
        kept = np.sort(row.ravel().astype(np.float64))[::-1]
        kept = kept[kept >= low]
        if k > 0:
            kept = kept[kept >= kept[min(k, len(kept)) - 1]]
        if p < 1:
            # Sums of rounded weights: within 1e-6 of the share it may go either way.
            mass = np.cumsum(kept) / kept.sum()
            bounds.append([kept[np.searchsorted(mass, p + sign * 1e-6)] for sign in (1, -1)])
        else:
            bounds.append([kept[-1] if 0 < k <= len(kept) else low, kept[-1]])
    return np.asarray(bounds, np.float32).T


@pytest.mark.parametrize("rows", [{}, {"ties": True}, {"spread": 0.1}, {"spread": 12.0}])
def test_reference_matches_a_sort(rows):
    rows = make_rows(**MIXED, **rows)
    found = np.asarray(top_threshold(*rows, implementation="reference"))
    least, most = sorted_thresholds(*rows)
    assert np.all((least <= found) & (found <= most)), (found, least, most)


def test_what_keeps_everything_is_the_floor():
    rows = make_rows(floor=[0, 0.25])
    found = top_threshold(*rows, implementation="reference")
    np.testing.assert_array_equal(found, np.resize(np.float32([0, 0.25]), 8))


def check_kernel(kernel, rows):
    expected = np.asarray(top_threshold(*rows, implementation="reference"))
    np.testing.assert_array_equal(jax.jit(kernel)(*rows), expected)


@pytest.mark.parametrize(
    "rows",
    [
        MIXED | {"groups": 1},
        MIXED | {"groups": 64, "ties": True},
        MIXED | {"spread": 0.1},
        *(EXTREME | {"spread": spread} for spread in (0.0, 0.1, 3.0, 12.0)),
    ],
)
def test_kernel_interpreted_matches_the_reference(rows):
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpret = params.InterpretGPUParams()
    rows = make_rows(**rows)
    check_kernel(functools.partial(top_threshold_mosaic, interpret=interpret), rows)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_936])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_kernel_on_a_gpu_matches_the_reference(hopper, vocab, spread):
    check_kernel(
        top_threshold_mosaic, make_rows(groups=-(-vocab // 128), rows=300, spread=spread, **MIXED)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "cudnn"}, "implementation='cudnn' is unknown"),
        ({"weights": jnp.zeros((2, 3, 128), jnp.bfloat16)}, "must be float32"),
        ({"weights": jnp.zeros((2, 3, 64)), "implementation": "mosaic"}, "must end in 128"),
    ],
)
def test_errors(change, message):
    names = ("weights", "floor", "top_k", "top_p")
    arguments = dict(zip(names, make_rows(rows=2, groups=3), strict=True))
    with pytest.raises(ValueError, match=message):
        top_threshold(**(arguments | {"implementation": "reference"} | change))
