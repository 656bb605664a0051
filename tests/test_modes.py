"""Every mode returns what ``replicated`` returns, for any pool, slab form and resident layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_weights, small_config
from jax.sharding import PartitionSpec

from sidp_jax.kernels import indexed_matmul_mosaic
from sidp_jax.kernels.indexed_matmul import indexed_matmul_reference
from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kv_cache import KV_PARTITION, KVCache, allocate, kv_cache_spec
from sidp_jax.mesh import POOL, make_mesh
from sidp_jax.modes.loop import LayerContext
from sidp_jax.pool import PoolLayout
from sidp_jax.step import RUN_LAYERS
from sidp_jax.weights import partitions

TOKENS, PAGE_SIZE, PAGES = 12, 4, 5


def run_mode(mode, config, layout, layer_loop, kernels="reference"):
    """Runs the layers on one prompt of TOKENS tokens per replica; returns x, K and V."""
    mesh = make_mesh(layout.pool_size)
    weights = random_weights(config, layout, mesh, layer_loop)
    kv_spec = kv_cache_spec(
        config, mesh, num_pages=PAGES, page_size=PAGE_SIZE, dtype=jnp.dtype("float32")
    )
    rng = np.random.default_rng(3)
    x = rng.standard_normal((layout.pool_size * TOKENS, config.hidden_size)).astype(np.float32)

    def local(weights, kv, x):
        def attend(q, k, v, kv, layer, active=None):
            slots = jnp.arange(TOKENS, dtype=jnp.int32) + PAGE_SIZE  # page 0 stays empty
            slots = slots if active is None else jnp.where(active, slots, -1)
            kv = KVCache(*update_kv(kv.k, kv.v, k, v, layer, slots, implementation="reference"))
            attended = ragged_attention(
                q,
                kv.k,
                kv.v,
                layer,
                jnp.array([[1, 2, 3, 4]], jnp.int32),
                jnp.array([0, TOKENS], jnp.int32),
                jnp.array([TOKENS], jnp.int32),
                scale=0.25,
                implementation="reference",
            )
            return attended, kv

        positions = jnp.arange(TOKENS, dtype=jnp.int32)
        context = LayerContext(config, layout, positions, attend, "cpu", kernels)
        x, kv = RUN_LAYERS[mode](context, weights, x, KVCache(kv.k[0], kv.v[0]))
        return x, kv.k[None], kv.v[None]

    shards = PartitionSpec(POOL)
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(partitions(weights), KVCache(KV_PARTITION, KV_PARTITION), shards),
        out_specs=(shards, KV_PARTITION, KV_PARTITION),
        check_vma=False,
    )
    return [np.asarray(out) for out in jax.jit(mapped)(weights, allocate(kv_spec), x)]


@pytest.fixture(scope="module")
def oracle():
    """What ``replicated`` returns, per model and pool size, computed once."""
    known = {}

    def get(config, pool_size):
        key = config, pool_size
        if key not in known:
            layout = PoolLayout(config.num_layers, pool_size, config.num_layers)
            known[key] = run_mode("replicated", config, layout, "unrolled")
        return known[key]

    return get


# Layers, pool size, resident layers: partly absent last rows, a pool of one, all layers resident.
CASES = [(5, 4, 0), (5, 2, 2), (7, 3, 0), (3, 1, 0), (7, 2, 1), (3, 3, 3)]


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize(("layers", "pool_size", "resident"), CASES)
def test_was_is_bit_identical_to_replicated(oracle, layers, pool_size, resident, layer_loop):
    config = small_config(layers)
    got = run_mode("was", config, PoolLayout(layers, pool_size, resident), layer_loop)
    for ours, theirs in zip(got, oracle(config, pool_size), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize(("layers", "pool_size", "resident"), CASES)
def test_cas_is_close_to_replicated(oracle, layers, pool_size, resident, layer_loop):
    config = small_config(layers)
    got = run_mode("cas", config, PoolLayout(layers, pool_size, resident), layer_loop)
    for ours, theirs in zip(got, oracle(config, pool_size), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize(("layers", "pool_size"), [(7, 3), (9, 2), (3, 3), (2, 1)])
def test_staggered_cas_is_bit_identical_to_replicated(oracle, layers, pool_size, layer_loop):
    config = small_config(layers)
    got = run_mode("cas_staggered", config, PoolLayout(layers, pool_size), layer_loop)
    for ours, theirs in zip(got, oracle(config, pool_size), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_staggered_cas_with_rows_picked_by_the_products(oracle, monkeypatch, layer_loop):
    """As with the kernel of a GPU, for which the reference stands in: no kernel is copied.

    Its products have flat operands, over which some processors sum in another order.
    """
    seen = []

    def multiply(x, weights, row, *, config):
        seen.append(type(weights))
        return indexed_matmul_reference(x, weights, row)

    monkeypatch.setattr(indexed_matmul_mosaic, "indexed_matmul_mosaic", multiply)
    config = small_config(7)
    got = run_mode("cas_staggered", config, PoolLayout(7, 3), layer_loop, "mosaic")
    for ours, theirs in zip(got, oracle(config, 3), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
    # Each of the four is traced once, not at every stage.
    assert len(seen) == 4 or layer_loop == "scan"
    assert all(issubclass(kind, tuple) == (layer_loop == "unrolled") for kind in seen)


def test_staggered_cas_has_no_place_for_resident_layers():
    with pytest.raises(ValueError, match="resident_layers=1 must be 0 for the staggered"):
        run_mode("cas_staggered", small_config(5), PoolLayout(5, 2, 1), "scan")


def test_replicated_scan_is_bit_identical_to_unrolled(oracle):
    config = small_config(5)
    got = run_mode("replicated", config, PoolLayout(5, 2, 5), "scan")
    for ours, theirs in zip(got, oracle(config, 2), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("mode", ["was", "cas"])
def test_other_families_in_pooled_modes(oracle, architecture, mode):
    config = small_config(5, architecture=architecture)
    got = run_mode(mode, config, PoolLayout(5, 2), "scan")
    for ours, theirs in zip(got, oracle(config, 2), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)
