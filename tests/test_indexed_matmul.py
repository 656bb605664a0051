"""Products with a row that the device picks: reference against numpy, kernel against reference."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sidp_jax.kernels import indexed_matmul_mosaic as mosaic_module
from sidp_jax.kernels.indexed_matmul import IndexedKernel, indexed_matmul
from sidp_jax.kernels.indexed_matmul_mosaic import (
    TuningConfig,
    _Grid,
    _place_of,
    check_fits,
    choose,
    indexed_matmul_mosaic,
    modelled_seconds,
)
from sidp_jax.models.layers import Linear

LIMIT = 1e-2  # relative error in bfloat16


def make(tokens, outputs, inputs, rows, *, dtype=jnp.bfloat16, seed=0, form="stacked"):
    """Activations, and weights whose rows differ."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (tokens, inputs), dtype)
    weights = jax.random.normal(keys[1], (rows, outputs, inputs), dtype)
    return x, weights if form == "stacked" else tuple(weights)


def product(x, weights, row):
    """The same in numpy, float64."""
    kernel = np.asarray(weights[row], np.float64)
    return np.asarray(x, np.float64) @ kernel.T


def relative_error(out, expected):
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    return np.linalg.norm(out - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("form", ["stacked", "tuple"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_reference_takes_the_row(form, row):
    x, weights = make(5, 24, 16, 3, dtype=jnp.float32, form=form)
    run = jax.jit(
        lambda x, weights, row: indexed_matmul(x, weights, row, implementation="reference")
    )
    out = run(x, weights, jnp.int32(row))
    np.testing.assert_allclose(out, product(x, weights, row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["stacked", "tuple"])
def test_a_row_out_of_range_is_clamped(form):
    x, weights = make(3, 8, 8, 2, dtype=jnp.float32, form=form)
    for row, taken in ((-1, 0), (7, 1)):
        out = indexed_matmul(x, weights, jnp.int32(row), implementation="reference")
        np.testing.assert_allclose(out, product(x, weights, taken), rtol=1e-5, atol=1e-5)


def linear(kernel, outputs, inputs):
    """A layer's projection with a bias, over a kernel of any kind."""
    axes = [(None,) * len(shape) for shape in (outputs, inputs)]
    module = Linear(outputs, axes[0], inputs, axes[1], bias=True, dtype=kernel.dtype)
    graphdef, state = nnx.split(module)
    values = {"kernel": kernel, "bias": jnp.ones(outputs, kernel.dtype)}
    flat = [(path, leaf.replace(values[path[0]])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.parametrize("form", ["stacked", "tuple"])
def test_a_projection_multiplies_by_the_picked_kernel(form):
    outputs, inputs = (2, 3, 4), (5, 6)
    x = jax.random.normal(jax.random.key(0), (7, *inputs))
    kernels = jax.random.normal(jax.random.key(1), (3, *outputs, *inputs))
    rows = kernels if form == "stacked" else tuple(kernels)
    run = jax.jit(lambda kernel, x: linear(kernel, outputs, inputs)(x))
    for row in range(3):
        out = run(IndexedKernel(rows, jnp.int32(row), "reference"), x)
        assert out.shape == (7, *outputs)
        np.testing.assert_allclose(out, run(kernels[row], x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must end in the inputs"):
        linear(IndexedKernel(rows, jnp.int32(0), "reference"), outputs, inputs)(x[:, :4])


def test_a_projection_runs_the_kernel(monkeypatch):
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    kernel = partial(
        indexed_matmul_mosaic,
        interpret=params.InterpretGPUParams(),
    )

    def small(x, weights, row, *, config):
        assert config is None
        return kernel(x, weights, row, config=TuningConfig(block_outputs=32, num_sms=1))

    monkeypatch.setattr(mosaic_module, "indexed_matmul_mosaic", small)
    x, kernels = make(8, 64, 128, 2)
    x, kernels = x.reshape(8, 2, 64), kernels.reshape(2, 2, 32, 2, 64)
    picked = IndexedKernel(tuple(kernels), jnp.int32(1), "mosaic")
    out, expected = (linear(k, (2, 32), (2, 64))(x) for k in (picked, kernels[1]))
    assert relative_error(out, expected) < LIMIT


def interpreted(x, weights, row, config):
    """The kernel on the CPU; memory that nobody wrote is NaN."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    run = jax.jit(
        lambda *args: indexed_matmul_mosaic(
            *args, config=config, interpret=params.InterpretGPUParams()
        )
    )
    return run(x, weights, jnp.int32(row))


# Tokens, outputs, inputs and how to cut them.
SMALL = {
    "one token": (1, 64, 128, TuningConfig(num_sms=2)),
    "ragged": (21, 96, 192, TuningConfig(block_outputs=48, num_sms=3)),
    "two tiles of tokens": (150, 64, 128, TuningConfig(128, 32, num_sms=2)),
    "two products in a row": (264, 32, 64, TuningConfig(256, 16, num_sms=2)),
    "outputs not in whole tiles": (8, 80, 128, TuningConfig(block_outputs=48, num_sms=2)),
    "splits": (9, 64, 320, TuningConfig(splits=3, stages=2, num_sms=2)),
    "groups": (200, 96, 64, TuningConfig(64, 32, group_tokens=3, num_sms=3)),
    "long steps": (16, 64, 256, TuningConfig(block_inputs=128, num_sms=1)),
}


@pytest.mark.parametrize("case", SMALL)
def test_kernel_interpreted_matches_numpy(case):
    tokens, outputs, inputs, config = SMALL[case]
    form = "tuple" if tokens % 2 else "stacked"
    x, weights = make(tokens, outputs, inputs, 2, form=form)
    out = interpreted(x, weights, 1, config)
    assert out.shape == (tokens, outputs)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, product(x, weights, 1)) < LIMIT


@pytest.mark.parametrize("form", ["stacked", "tuple"])
def test_kernel_interpreted_takes_every_row(form):
    x, weights = make(5, 32, 64, 3, form=form)
    config = TuningConfig(block_outputs=32, num_sms=1)
    for row, taken in ((0, 0), (1, 1), (2, 2), (-2, 0), (9, 2)):
        out = interpreted(x, weights, row, config)
        assert relative_error(out, product(x, weights, taken)) < LIMIT


TILINGS = {
    "one tile": (8, 32, 64, TuningConfig(block_outputs=32)),
    "ragged": (136, 208, 640, TuningConfig(64, 48, splits=3, num_sms=5)),
    "groups": (704, 512, 128, TuningConfig(128, 96, group_tokens=4, num_sms=7)),
    "pairs in outputs": (64, 592, 256, TuningConfig(64, 80, splits=2, cluster=2, num_sms=6)),
    "pairs in tokens": (
        640,
        304,
        128,
        TuningConfig(128, 64, cluster=2, share="weights", group_tokens=2, num_sms=8),
    ),
}


@pytest.mark.parametrize("case", TILINGS)
def test_tiles_cover_every_output_in_every_part(case):
    *shape, config = TILINGS[case]
    tokens, outputs, inputs = shape
    grid = _Grid.of(config, *shape)
    assert grid.workers == config.num_sms // config.cluster
    item, rank = jnp.divmod(jnp.arange(grid.items * config.cluster), config.cluster)
    place = jax.vmap(lambda i, r: _place_of(i, r, grid, config, tuple(shape)))(item, rank)
    times = np.zeros((config.splits, tokens, outputs), int)
    steps = np.zeros((config.splits, inputs // config.block_inputs), int)
    for token, output, part, first, count in np.stack(place, axis=1):
        assert 0 <= token <= max(tokens - config.block_tokens, 0)
        assert 0 <= output <= outputs - config.block_outputs
        assert token % 8 == 0
        assert output % 16 == 0
        assert count > 0
        block = (part, slice(token, token + config.block_tokens))
        times[(*block, slice(output, output + config.block_outputs))] += 1
        steps[part, first : first + count] = 1
    assert times.min() == 1
    assert (steps.sum(axis=0) == 1).all()
    # What a cluster shares is at the same place for all of its blocks.
    same = place.token if config.share == "inputs" else place.output
    same = np.asarray(same).reshape(grid.items, config.cluster)
    assert (same == same[:, :1]).all()


@pytest.mark.parametrize("tokens", [1, 16, 40, 64, 100, 128, 256, 300, 512, 2048, 8192])
@pytest.mark.parametrize(("outputs", "inputs"), [(10240, 8192), (8192, 29568), (5120, 5120)])
def test_the_choice_fits_and_leaves_few_multiprocessors_idle(tokens, outputs, inputs):
    config = choose(tokens, outputs, inputs)
    check_fits(outputs, inputs, config)
    grid = _Grid.of(config, tokens, outputs, inputs)
    rounds = -(-grid.items // grid.workers)
    assert grid.items / (rounds * grid.workers) > 0.85
    shape = {"tokens": tokens, "outputs": outputs, "inputs": inputs}
    plain = TuningConfig(64, 128) if tokens <= 64 else TuningConfig(128, 256)
    assert modelled_seconds(config, **shape) <= modelled_seconds(plain, **shape)


def test_shapes_that_do_not_fit_are_errors():
    run = partial(indexed_matmul, implementation="mosaic")
    good = make(4, 32, 64, 2)
    row = jnp.int32(0)
    cases = [
        (make(4, 32, 64, 2, dtype=jnp.float32), row, "must both be bfloat16"),
        (make(4, 32, 96, 2), row, "inputs=96 must be a multiple of 64"),
        (make(4, 24, 64, 2), row, "outputs=24 of 16"),
        ((good[0][:0], good[1]), row, "at least one token"),
        ((good[0], ()), row, "tuple is empty"),
        ((good[0], good[1][:0]), row, "at least one row"),
        ((good[0], (good[1][0], good[1][1].astype(jnp.float32))), row, "must be alike"),
    ]
    for (x, weights), index, message in cases:
        with pytest.raises(ValueError, match=message):
            run(x, weights, index)
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        indexed_matmul(*good, row, implementation="cuda")
    with pytest.raises(ValueError, match="leave it out"):
        indexed_matmul(*good, row, implementation="reference", tuning=TuningConfig())
    with pytest.raises(ValueError, match="outputs=32 must be a multiple of 16 and at least"):
        run(*good, row, tuning=TuningConfig(block_outputs=64))
    with pytest.raises(ValueError, match="inputs=64 are too few"):
        run(*good, row, tuning=TuningConfig(block_outputs=32, splits=2))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block_tokens": 96}, "must be one of"),
        ({"block_tokens": 256, "block_outputs": 256}, "from 16 to 128"),
        ({"block_outputs": 40}, "multiple of 16"),
        ({"block_outputs": 48, "cluster": 4, "share": "weights"}, "multiple of 8"),
        ({"splits": 0}, "at least 1"),
        ({"stages": 40}, "must be from 2 to"),
        ({"block_outputs": 256, "block_inputs": 256}, "do not fit"),
        ({"cluster": 2, "num_sms": 1}, "must be at least"),
    ],
)
def test_configs_that_do_not_fit_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        TuningConfig(**wrong)


ON_THE_GPU = {
    "chosen, few tokens": (16, 10240, 4096, None),
    "chosen, one token": (1, 5120, 5120, None),
    "chosen, ragged": (333, 3072, 1024, None),
    "chosen, many tokens": (2048, 5120, 2560, None),
    "not in whole tiles": (24, 8208, 1024, TuningConfig(block_outputs=112)),
    "splits": (70, 4096, 4160, TuningConfig(128, 160, splits=3)),
    "pairs share inputs": (64, 8192, 2048, TuningConfig(64, 64, 128, cluster=2)),
    "fours share inputs": (128, 8192, 2048, TuningConfig(128, 64, cluster=4, num_sms=128)),
    "pairs share weights": (600, 4096, 2048, TuningConfig(128, 256, cluster=2, share="weights")),
    "two products in a row": (520, 4096, 2048, TuningConfig(256, 128, cluster=2)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", ON_THE_GPU)
@pytest.mark.parametrize("form", ["stacked", "tuple"])
def test_kernel_matches_reference(hopper, case, form):
    tokens, outputs, inputs, config = ON_THE_GPU[case]
    x, weights = make(tokens, outputs, inputs, 3, form=form, seed=tokens)
    poison = jnp.full(2**26, jnp.nan, jnp.float32).block_until_ready()
    poison.delete()  # outputs land where NaN was
    run = jax.jit(partial(indexed_matmul, implementation="mosaic", tuning=config))
    for row in range(3):
        out = run(x, weights, jnp.int32(row))
        wide = (x.astype(jnp.float32), weights[row].astype(jnp.float32))
        expected = jnp.dot(wide[0], wide[1].T, precision="highest")
        assert relative_error(out, expected) < LIMIT
        again = run(x, weights, jnp.int32(row))
        np.testing.assert_array_equal(out, again)


LOWERING = """
import jax, jax.numpy as jnp
from sidp_jax.aot import compile_only_devices
from sidp_jax.kernels.indexed_matmul import indexed_matmul
from sidp_jax.kernels.indexed_matmul_mosaic import TuningConfig
device = jax.sharding.SingleDeviceSharding(compile_only_devices("h200", 1)[0])
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
stacked, pair = array(10, 10240, 8192), (array(10240, 8192),) * 2
paired = TuningConfig(128, 256, cluster=2, share="weights")
split = TuningConfig(128, 160, splits=2, cluster=2)
for tokens, weights, config in [
    (16, stacked, None), (16, pair, None), (128, pair, split), (2048, stacked, paired),
    (2048, pair, TuningConfig(256, 128)),
]:
    run = lambda x, w, r: indexed_matmul(x, w, r, implementation="mosaic", tuning=config)
    args = (array(tokens, 8192), weights, array(dtype=jnp.int32))
    print(jax.jit(run).lower(*args).compile().memory_analysis().temp_size_in_bytes)
"""


def test_kernel_lowers_at_true_size_and_copies_no_weights():
    pytest.importorskip("jax_cuda12_plugin", reason="pip install 'sidp-jax[aot]'")
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOWERING],
        env=env,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    temporaries = [int(line) for line in done.stdout.split()]
    parts = 2 * 128 * 10240 * 4
    assert all(size < 1 << 20 for i, size in enumerate(temporaries) if i != 2), temporaries
    assert parts <= temporaries[2] < parts + (1 << 20)
