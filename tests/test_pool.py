from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_jax.pool import PoolLayout, kv_bytes_per_page, padded_vocab, weight_bytes_per_device


@st.composite
def layouts(draw):
    layers = draw(st.integers(1, 100))
    return PoolLayout(layers, draw(st.integers(1, layers)), draw(st.integers(0, layers)))


@given(layouts())
def test_every_layer_has_one_place(layout):
    assert sorted((*layout.resident, *layout.pooled)) == list(range(layout.num_layers))
    assert len(layout.resident) == layout.resident_layers
    for layer in layout.pooled:
        assert layout.layer_at(layout.row(layer), layout.owner(layer)) == layer
    places = [(row, owner) for row in range(layout.rows) for owner in range(layout.pool_size)]
    held = [layer for place in places if (layer := layout.layer_at(*place)) is not None]
    assert held == list(layout.pooled)


@given(layouts())
def test_owners_share_the_work_evenly(layout):
    counts = [
        sum(layout.owner(layer) == o for layer in layout.pooled) for o in range(layout.pool_size)
    ]
    assert max(counts) - min(counts) <= 1
    assert layout.rows == max(counts)


@given(layouts())
def test_resident_layers_are_spread_evenly_from_layer_0(layout):
    if layout.resident:
        assert layout.resident[0] == 0
        edges = [*layout.resident, layout.num_layers]
        gaps = [end - start for start, end in pairwise(edges)]
        assert max(gaps) - min(gaps) <= 1


def test_striping_without_resident_layers():
    layout = PoolLayout(80, 6)
    assert all((layout.owner(i), layout.row(i)) == (i % 6, i // 6) for i in range(80))
    assert layout.rows == 14
    assert [layout.layer_at(13, owner) for owner in range(6)] == [78, 79, None, None, None, None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_layers=0"),
        ((4, 5), "pool_size=5 must lie between 1 and the model's 4 layers"),
        ((4, 0), "pool_size=0"),
        ((4, 2, 5), "resident_layers=5"),
        ((4, 2, -1), "resident_layers=-1"),
    ],
)
def test_impossible_layouts_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        PoolLayout(*arguments)


def test_layers_of_the_host_take_no_memory_of_the_device():
    rest = {"hidden_size": 4, "vocab_size": 8, "tied": True, "dtype_bytes": 2}
    ours = weight_bytes_per_device(PoolLayout(6, 1, 4, on_host=True), layer_bytes=1000, **rest)
    assert ours == 4 * 1000 + 8 * 4 * 2 + 4 * 2
    with pytest.raises(ValueError, match="pool_size=2 must be 1 where the host owns layers"):
        PoolLayout(6, 2, 4, on_host=True)


def test_bytes_of_qwen72b_over_eight():
    layer = 2 * (8192 * 10240 + 10240 + 8192 * 8192 + 3 * 8192 * 29568 + 2 * 8192)
    got = weight_bytes_per_device(
        PoolLayout(80, 8),
        layer_bytes=layer,
        hidden_size=8192,
        vocab_size=152064,
        tied=False,
        dtype_bytes=2,
    )
    assert got == 10 * layer + 2 * 152064 // 8 * 8192 * 2 + 8192 * 2
    assert (
        kv_bytes_per_page(num_layers=80, num_kv_heads=8, head_dim=128, page_size=64, dtype_bytes=2)
        == 64 * 327680
    )


def test_vocabulary_padding():
    assert padded_vocab(100, 8) == 104
    assert padded_vocab(104, 8) == 104
