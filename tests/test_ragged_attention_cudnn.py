"""Attention by cuDNN: the same code through XLA's dot product here, and on an NVIDIA GPU itself."""

from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small_config
from jax.sharding import Mesh
from test_ragged_attention import LIMIT, make_batch, relative_error

from sidp_jax import build
from sidp_jax.config import ConfigError, load_config
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kernels.ragged_attention_cudnn import ragged_attention_cudnn
from sidp_jax.kernels.self_check import KernelError, require_cudnn, self_check
from sidp_jax.mesh import make_mesh
from sidp_jax.pool import PoolLayout
from sidp_jax.step import StepProgram

B200 = Mock(jax.Device, platform="gpu", compute_capability="10.0", device_kind="NVIDIA B200")


@pytest.fixture
def nvidia():
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        pytest.skip("needs an NVIDIA GPU")
    return device


def check(batch, attend):
    """The result is the reference's, and padding is zeros."""
    out = jax.jit(attend)(*batch)
    wide = [x.astype(jnp.float32) for x in batch[:3]]
    expected = ragged_attention(*wide, *batch[3:], scale=0.125, implementation="reference")
    assert out.dtype == batch[0].dtype
    assert relative_error(out, expected) < LIMIT
    assert not np.asarray(out[batch[5][-1] :], np.float32).any()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block_bytes", [1, 1 << 17])
def test_tiles_of_queries_match_the_reference(seed, block_bytes):
    rng = np.random.default_rng(seed)
    decode = [(1, int(c)) for c in rng.integers(1, 400, size=rng.integers(1, 9))]
    chunks = [(int(n), int(n + p)) for n, p in rng.integers(2, 40, size=(rng.integers(0, 4), 2))]
    rows = [(decode + chunks)[i] for i in rng.permutation(len(decode + chunks))]
    kv_heads = int(rng.choice([1, 2]))
    shape = {"heads": kv_heads * int(rng.choice([1, 3])), "kv_heads": kv_heads, "head_dim": 16}
    batch = make_batch(rows, **shape, page_size=16, dtype=jnp.bfloat16, seed=seed, padding=seed)
    size = int(rng.choice([1, 4, 32]))

    def attend(*batch):
        return ragged_attention_cudnn(
            *batch, scale=0.125, tile_queries=size, block_bytes=block_bytes, dot_product="xla"
        )

    check(batch, attend)


@pytest.mark.parametrize("context", [1, 250, 256, 257, 1024, 1025, 1100])
def test_the_context_gathered_holds_the_longest(context):
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16, "page_size": 64}
    rows = [(1, context), (min(3, context), context)]
    q, k, v, layer, tables, *rest = make_batch(rows, **shape, dtype=jnp.bfloat16)
    tables = jnp.pad(tables, ((0, 0), (0, 18 - tables.shape[1])), constant_values=2**30)
    batch = (q, k, v, layer, tables, *rest)
    check(batch, lambda *batch: ragged_attention_cudnn(*batch, scale=0.125, dot_product="xla"))


def test_a_batch_of_nothing_gives_zeros():
    shape = {"heads": 2, "kv_heads": 1, "head_dim": 16, "page_size": 16}
    q, k, v, layer, tables, starts, context = make_batch([(1, 5)], **shape, dtype=jnp.bfloat16)
    nothing = (tables, jnp.zeros_like(starts), jnp.zeros_like(context))
    out = ragged_attention_cudnn(q, k, v, layer, *nothing, scale=1.0, dot_product="xla")
    assert not np.asarray(out, np.float32).any()


def test_shapes_that_do_not_fit_are_errors():
    shape = {"heads": 4, "kv_heads": 2, "page_size": 16}
    for head_dim, dtype, message in (
        (12, jnp.bfloat16, "head_dim=12 must be a multiple of 8"),
        (256, jnp.bfloat16, "head_dim=256 must be a multiple of 8 up to 128"),
        (64, jnp.float32, "must both be bfloat16"),
    ):
        batch = make_batch([(1, 5)], **shape, head_dim=head_dim, dtype=dtype)
        with pytest.raises(ValueError, match=message):
            ragged_attention(*batch, scale=1.0, implementation="cudnn")


def test_a_gpu_without_our_kernels_gets_a_choice(monkeypatch):
    """The default says so before anything is loaded; nothing falls back by itself."""
    monkeypatch.setattr(build, "make_mesh", lambda *_: Mock(Mesh, local_devices=[B200]))
    monkeypatch.setattr(build, "_hardware", lambda *_: None)
    monkeypatch.setattr(build, "make_policy", lambda *_: SimpleNamespace(modes=("replicated",)))
    for attention in ("auto", "mosaic"):
        config = load_config("tiny.yaml", [f"attention={attention}"])
        with pytest.raises(ConfigError, match=r"this is NVIDIA B200 .*set attention=cudnn .*or"):
            build.build_engine(config)


def test_cudnn_is_refused_where_it_is_not():
    device = jax.local_devices(backend="cpu")[0]
    with pytest.raises(KernelError, match=r"needs an NVIDIA GPU .*set attention=reference"):
        self_check(
            heads=4, kv_heads=2, head_dim=64, page_size=16, implementation="cudnn", device=device
        )
    require_cudnn(B200)


def test_the_other_kernels_are_the_references():
    config = small_config()
    layout = PoolLayout(config.num_layers, 1, config.num_layers)
    implementations = [
        StepProgram(config, layout, make_mesh(1), attention).kernels
        for attention in ("reference", "mosaic", "cudnn")
    ]
    assert implementations == ["reference", "mosaic", "reference"]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_matches_the_reference(nvidia, seed, head_dim):
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 8]))
    heads = kv_heads * int(rng.choice([1, 4, 7, 8]))
    decode = [(1, int(c)) for c in rng.integers(1, 3000, size=rng.integers(1, 20))]
    chunks = [(int(n), int(n + p)) for n, p in rng.integers(2, 500, size=(rng.integers(0, 6), 2))]
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "page_size": 32}
    batch = make_batch(decode + chunks, **shape, dtype=jnp.bfloat16, seed=seed, padding=seed * 37)
    check(batch, lambda *batch: ragged_attention(*batch, scale=0.125, implementation="cudnn"))


@pytest.mark.gpu
def test_cudnn_passes_the_self_check(nvidia):
    errors = self_check(
        heads=16,
        kv_heads=2,
        head_dim=128,
        page_size=64,
        implementation="cudnn",
        device=nvidia,
    )
    assert list(errors) == ["ragged_attention"]
