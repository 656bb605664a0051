"""What an engine is built of, where it needs no engine to be seen."""

import pytest
from helpers import small_config

from sidp_jax import build
from sidp_jax.config import load_config


@pytest.mark.parametrize(
    ("attention", "pool_size", "most", "first"),
    [
        ("mosaic", 1, 128, [64, 128]),
        ("mosaic", 1, 48, [16, 48]),
        ("mosaic", 2, 128, [16, 64, 128]),
        ("reference", 1, 128, [16, 64, 128]),
    ],
)
def test_one_replica_pads_steps_to_a_tile_of_the_kernels(attention, pool_size, most, first):
    overrides = [f"pool_size={pool_size}", f"max_num_batched_tokens={most}", "max_num_seqs=16"]
    config = load_config("tiny.yaml", overrides)
    layouts = build._batch_layouts(config, small_config(), 96, attention)
    assert [layout.tokens for layout in layouts] == first
    assert {layout.pages for layout in layouts} == {96 // config.page_size}
