"""What the compiled step says of itself: bytes per device, layer buffers, aliasing."""

import jax
import jax.numpy as jnp
import pytest
from helpers import small_config

from sidp_jax.batch import BatchLayout
from sidp_jax.kv_cache import kv_cache_spec
from sidp_jax.mesh import make_mesh
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout, kv_bytes_per_page, weight_bytes_per_device
from sidp_jax.step import StepProgram
from sidp_jax.weights import weights_spec

POOL, PAGES, PAGE_SIZE, SEQS = 4, 32, 8, 4
BATCH = BatchLayout(tokens=16, seqs=SEQS, pages=8, stop_ids=17)


def wide_config(num_layers=8):
    """Layers of 3 MB, so that they stand out from everything else in a step."""
    return small_config(
        num_layers,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
    )


def compile_forward(config, mode, layer_loop, resident_layers=0):
    mesh = make_mesh(POOL)
    layout = PoolLayout(config.num_layers, POOL, resident_layers)
    program = StepProgram(config, layout, mesh, "reference")
    float32 = jnp.dtype("float32")
    weights = weights_spec(config, layout, mesh, layer_loop=layer_loop, dtype=float32)
    kv = kv_cache_spec(config, mesh, num_pages=PAGES, page_size=PAGE_SIZE, dtype=float32)
    per_replica = lambda *shape: jax.ShapeDtypeStruct(  # noqa: E731
        (POOL, *shape), jnp.int32, sharding=program.per_replica()
    )
    forward = program.forward(mode, BATCH, BATCH, weights)
    compiled = forward.lower(weights, kv, per_replica(SEQS), per_replica(BATCH.size)).compile()
    return compiled.memory_analysis()


def layer_bytes(config):
    return 4 * sum(int(jnp.prod(jnp.array(s.shape))) for s in layer_spec(config).values())


def kv_bytes(config):
    return PAGES * kv_bytes_per_page(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE_SIZE,
        dtype_bytes=4,
    )


CASES = [
    ("was", "scan", 0),
    ("was", "unrolled", 0),
    ("was", "unrolled", 2),
    ("cas", "scan", 0),
    ("replicated", "scan", 8),
]


@pytest.fixture(scope="module")
def memory():
    config = wide_config()
    return {case: compile_forward(config, *case) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_replicated_by_accident(memory, case):
    config = wide_config()
    weights = weight_bytes_per_device(
        PoolLayout(config.num_layers, POOL, case[2]),
        layer_bytes=layer_bytes(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        dtype_bytes=4,
    )
    expected = weights + kv_bytes(config)
    assert memory[case].argument_size_in_bytes == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_the_cache_is_updated_in_place(memory, case):
    assert memory[case].alias_size_in_bytes == kv_bytes(wide_config())


def test_was_holds_two_layers_however_many_there_are(memory):
    """The layer in use and the one that arrives; on the CPU also what is being summed into it.

    ``replicated`` in the scan form holds one layer too: the CPU copies a layer for its GEMMs.
    """
    layer = layer_bytes(wide_config())
    base = memory["replicated", "scan", 8].temp_size_in_bytes
    for layer_loop in ("scan", "unrolled"):
        few = memory["was", layer_loop, 0].temp_size_in_bytes
        assert few - base <= 3 * layer
    deep = compile_forward(wide_config(16), "was", "unrolled").temp_size_in_bytes
    assert deep == pytest.approx(few, rel=0.02)


def test_cas_holds_no_layer_of_another_replica(memory):
    layer = layer_bytes(wide_config())
    base = memory["replicated", "scan", 8].temp_size_in_bytes
    assert memory["cas", "scan", 0].temp_size_in_bytes - base < layer
