"""Norm and rotary embedding: the reference against numpy, the kernel against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config

from sidp_jax.kernels.turn_heads import Turner, turn_heads
from sidp_jax.kernels.turn_heads_mosaic import turn_heads_mosaic
from sidp_jax.mesh import make_mesh
from sidp_jax.models.decoder import bind_layer, layer_spec
from sidp_jax.pool import PoolLayout
from sidp_jax.step import StepProgram

EPS = 1e-6
LIMIT = 1e-2  # relative error in bfloat16


def make_heads(tokens, *, kv_heads=1, queries=2, head_dim=128, norm=True, dtype=jnp.bfloat16):
    """Arguments of ``turn_heads``."""
    rng = np.random.default_rng(tokens)
    qkv = jnp.asarray(rng.standard_normal((tokens, kv_heads, queries + 2, head_dim)), dtype)
    scales = [jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) if norm else None for _ in "qk"]
    positions = jnp.asarray(rng.integers(0, 4000, tokens), jnp.int32)
    frequencies = jnp.asarray(1e4 ** -(np.arange(0, head_dim, 2) / head_dim), jnp.float32)
    return qkv, *scales, positions, frequencies


def numpy_heads(qkv, q_scale, k_scale, positions, frequencies):
    qkv, positions, frequencies = (np.asarray(x, np.float64) for x in (qkv, positions, frequencies))
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2:-1], qkv[:, :, -1]
    turns = np.exp(1j * positions[:, None] * frequencies)[:, None, None]
    results = []
    for x, scale in ((q, q_scale), (k, k_scale)):
        if scale is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * np.asarray(scale, np.float64)
        half = x.shape[-1] // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * turns
        results.append(np.concatenate([turned.real, turned.imag], -1))
    return results[0].reshape(len(qkv), -1, qkv.shape[-1]), results[1][:, :, 0], v


def check(turn, heads, limit=LIMIT):
    reference = functools.partial(turn_heads, eps=EPS, implementation="reference")
    for out, expected in zip(jax.jit(turn)(*heads), reference(*heads), strict=True):
        assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
        out, expected = (np.asarray(x, np.float64) for x in (out, expected))
        assert np.linalg.norm(out - expected) <= limit * np.linalg.norm(expected)


@pytest.mark.parametrize("norm", [True, False])
def test_reference_matches_numpy(norm):
    heads = make_heads(7, kv_heads=3, head_dim=16, norm=norm, dtype=jnp.float32)
    out = turn_heads(*heads, eps=EPS, implementation="reference")
    for ours, theirs in zip(out, numpy_heads(*heads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-3)  # float32 angles up to 4000


@pytest.mark.parametrize("norm", [True, False])
def test_kernel_interpreted_matches_reference(norm):
    """A whole tile of tokens, and one that is moved back to be whole."""
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpret = params.InterpretGPUParams()
    check(
        functools.partial(turn_heads_mosaic, eps=EPS, interpret=interpret),
        make_heads(80, norm=norm),
    )


def test_a_layer_takes_what_turns_heads_in_the_place_of_positions():
    config = small_config()
    rng = np.random.default_rng(0)
    params = {
        name: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32)
        for name, spec in layer_spec(config).items()
    }
    layer = bind_layer(config, params)
    x = jnp.asarray(rng.standard_normal((5, config.hidden_size)), jnp.float32)
    positions = jnp.arange(5, dtype=jnp.int32)
    by_array = layer.pre_attention(x, positions)
    by_turner = layer.pre_attention(x, Turner(positions, "reference"))
    for ours, theirs in zip(by_turner, by_array, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_kernel_is_for_whole_tiles():
    config = small_config(head_dim=128)
    layout = PoolLayout(config.num_layers, 1, config.num_layers)
    found = {
        (attention, tokens)
        for attention in ("reference", "mosaic", "cudnn")
        for tokens in (16, 64, 100)
        if isinstance(
            StepProgram(config, layout, make_mesh(1), attention).positions(
                jnp.zeros(tokens, jnp.int32), jnp.dtype(jnp.bfloat16)
            ),
            Turner,
        )
    }
    assert found == {("mosaic", 64)}


def test_what_does_not_fit_is_an_error():
    turn = functools.partial(turn_heads, eps=EPS, implementation="mosaic")
    wrong = ({"tokens": 56}, {"tokens": 65}, {"head_dim": 64}, {"dtype": jnp.float32})
    for heads in (make_heads(**{"tokens": 64} | each) for each in wrong):
        with pytest.raises(ValueError, match=r"must be bfloat16, .*use 'reference'"):
            turn(*heads)
    qkv, q_scale, _, *rest = make_heads(64)
    with pytest.raises(ValueError, match="must both be given, or neither"):
        turn(qkv, q_scale, None, *rest)
    with pytest.raises(ValueError, match="'triton' is unknown"):
        turn_heads(*make_heads(64), eps=EPS, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(
    ("tokens", "kv_heads", "queries"), [(64, 8, 8), (104, 4, 7), (2048, 8, 4), (8192, 8, 8)]
)
def test_kernel_matches_reference(hopper, tokens, kv_heads, queries, norm):
    heads = make_heads(tokens, kv_heads=kv_heads, queries=queries, norm=norm)
    check(functools.partial(turn_heads, eps=EPS, implementation="mosaic"), heads)
