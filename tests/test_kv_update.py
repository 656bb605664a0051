"""The KV update: the reference against numpy, the kernel against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.kv_update_mosaic import update_kv_mosaic


def make_update(*, layers=2, kv_heads=2, pages=4, page_size=16, head_dim=64, tokens=9, seed=0):
    """Caches, new K and V, layer and slots (some of them -1) of an update in bfloat16."""
    rng = np.random.default_rng(seed)
    shape = (layers, kv_heads, pages, page_size, head_dim)
    cache = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for _ in range(2)]
    new = [
        jnp.asarray(rng.standard_normal((tokens, kv_heads, head_dim)), jnp.bfloat16)
        for _ in range(2)
    ]
    slots = rng.permutation(pages * page_size)[:tokens].astype(np.int32)
    slots[1::4] = -1
    return *cache, *new, jnp.int32(layers - 1), jnp.asarray(slots)


def numpy_update(k_pages, v_pages, k, v, layer, slots):
    results = []
    for pages, rows in ((k_pages, k), (v_pages, v)):
        pages = np.array(pages.astype(jnp.float32))
        for token, slot in enumerate(np.asarray(slots)):
            if slot >= 0:
                page, offset = divmod(int(slot), pages.shape[3])
                pages[int(layer), :, page, offset] = np.asarray(rows[token], np.float32)
        results.append(pages)
    return results


def check(update, batch):
    expected = numpy_update(*batch)
    for out, pages in zip(update(*batch), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(out, np.float32), pages)


@pytest.mark.parametrize("seed", range(3))
def test_reference_matches_numpy(seed):
    batch = make_update(tokens=5 + 7 * seed, page_size=4 << seed, seed=seed)
    check(jax.jit(functools.partial(update_kv, implementation="reference")), batch)


def test_donated_cache_is_updated_in_place():
    update = functools.partial(update_kv, implementation="reference")
    batch = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in make_update()]
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(*batch).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * batch[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < batch[0].nbytes


def test_kernel_interpreted_matches_numpy():
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    interpret = params.InterpretGPUParams()
    check(jax.jit(functools.partial(update_kv_mosaic, interpret=interpret)), make_update(tokens=5))


def test_shapes_that_do_not_fit_are_errors():
    k_pages, v_pages, k, v, layer, slots = make_update(head_dim=32)
    with pytest.raises(ValueError, match="head_dim=32 must be 64 or 128"):
        update_kv(k_pages, v_pages, k, v, layer, slots, implementation="mosaic")
    with pytest.raises(ValueError, match="'scatter' is unknown"):
        update_kv(k_pages, v_pages, k, v, layer, slots, implementation="scatter")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 300, 2500])
def test_kernel_matches_numpy(hopper, tokens):
    batch = make_update(
        kv_heads=8, pages=90, page_size=32, head_dim=128, tokens=tokens, seed=tokens
    )
    check(jax.jit(functools.partial(update_kv, implementation="mosaic")), batch)
