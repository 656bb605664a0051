from bisect import bisect
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidp_jax.hardware import Hardware, load_profile, value_at
from sidp_jax.modes.policy import (
    CAS,
    CAS_STAGGERED,
    REPLICATED,
    WAS,
    LayerShape,
    Policy,
    PolicyState,
    preferred_fetch,
)

QWEN72B = LayerShape(
    num_layers=80,
    weight_bytes=1_755_000_000,
    flops_per_token=2 * 877.5e6,
    activation_bytes=2 * 8192,
    qkv_bytes=2 * 10240,
    attended_bytes=2 * 8192,
)


ALL = (WAS, CAS, CAS_STAGGERED)


def policy(hardware="h200", pool_size=8, modes=(WAS, CAS), **changes):
    return Policy(modes, pool_size, QWEN72B, load_profile(hardware), **changes)


def run(policy, tokens):
    """Decides step after step; returns the modes and the switches."""
    state, modes, switches = PolicyState(), [], []
    for count in tokens:
        state, switch = policy.decide(state, count)
        modes.append(state.mode)
        switches += [] if switch is None else [switch]
    return modes, switches


def test_large_batches_fetch_weights_and_small_ones_send_activations():
    modes, switches = run(policy(), [2048, 2048, 16, 16, 2048])
    assert modes == [WAS, WAS, CAS, CAS, WAS]
    assert [(s.step, s.old, s.new, s.tokens) for s in switches] == [
        (2, WAS, CAS, 16),
        (4, CAS, WAS, 2048),
    ]
    assert all(s.new_seconds < s.old_seconds for s in switches)
    assert "was -> cas at 16 tokens" in str(switches[0])


@pytest.mark.parametrize("tokens", [16, 8192])
def test_a_fetch_from_the_host_rides_under_everything_before_it(tokens):
    p = policy(modes=(WAS,), pool_size=1, resident_layers=60, was_fetch="host")
    home = policy(pool_size=1, modes=(REPLICATED,)).seconds(REPLICATED, tokens)
    fetch, attention = 1.755e9 / p.hardware.host_bandwidth, 1e-3
    # Layers 3, 7, ..., 79 lie on the host: four before each, for the first one of them in the step
    # before.
    expected = 20 * max(fetch, 4 * (home + attention))
    assert p.step_seconds(WAS, tokens, attention) == pytest.approx(expected)


def test_was_costs_the_longer_of_compute_and_fetch_and_their_interference():
    p = policy()
    fetch = 1.755e9 / p.hardware.link_bandwidth
    first = fetch / 80  # nothing is before it
    disturbed = p.hardware.fetch_interference * 79 / 80
    expected = p.seconds(REPLICATED, 4096) + first + disturbed * fetch
    assert p.seconds(WAS, 4096) == pytest.approx(expected)
    dense = p.seconds(REPLICATED, 256)
    assert p.seconds(WAS, 256) == pytest.approx(fetch + dense / 80 + disturbed * dense)


@pytest.mark.parametrize(("pool", "layers"), [(2, 80), (4, 80), (3, 8)])
@pytest.mark.parametrize("tokens", [16, 1024, 8192])
def test_copies_of_a_row_ride_under_the_row_before(pool, layers, tokens):
    """Event by event: a row is sent off when the one before it begins, the first a step ahead."""
    shape = replace(policy().shape, num_layers=layers)
    p = Policy((WAS,), pool, shape, load_profile("h200"), was_fetch="copies")
    attention, now, arrives = 2e-4, 0.0, 0.0
    home = p.step_seconds(REPLICATED, tokens, attention) / layers
    sent = shape.weight_bytes * (pool - 1) / pool / p.hardware.copy_bandwidth
    rows = [min(pool, layers - at) for at in range(0, layers, pool)]
    for row, following in zip(rows, (*rows[1:], rows[0]), strict=True):
        now = max(now, arrives)
        arrives = now + following * sent
        now += row * home + p.hardware.copy_interference * min(row * home, following * sent)
        # What takes longer, copies or compute, takes so much longer that nothing is counted twice.
        arrives += p.hardware.copy_interference * min(row * home, following * sent)
    expected = max(now, arrives)
    assert p.step_seconds(WAS, tokens, attention) == pytest.approx(expected)


def test_a_row_that_is_the_only_one_is_copied_once_and_stays():
    shape = policy().shape
    for pool, resident in ((2, 78), (2, 79), (4, 76)):
        h200, fetch = load_profile("h200"), "copies"
        p = Policy((WAS,), pool, shape, h200, resident_layers=resident, was_fetch=fetch)
        assert p.seconds(WAS, 64) == pytest.approx(p.seconds(REPLICATED, 64))


def test_copies_are_preferred_in_small_pools_where_their_speed_is_known():
    h200 = load_profile("h200")
    assert [preferred_fetch(h200, pool) for pool in (2, 3, 8)] == ["copies", *["collective"] * 2]
    assert preferred_fetch(replace(h200, copy_bandwidth=0.0), 2) == "collective"


def test_resident_layers_cost_the_same_in_every_mode():
    half = policy(resident_layers=40)
    for tokens in (16, 1024):
        home = half.seconds(REPLICATED, tokens)
        assert half.seconds(CAS, tokens) == pytest.approx(
            (home + policy().seconds(CAS, tokens)) / 2
        )
    # Each fetch of 4.56 ms now rides under two layers of 2.33 ms.
    undisturbed = replace(half, hardware=replace(half.hardware, fetch_interference=0.0))
    assert undisturbed.seconds(WAS, 1024) < 1.03 * half.seconds(REPLICATED, 1024)


@given(
    st.sampled_from(["h20", "h100", "h200", "b200"]),
    st.integers(2, 8),
    st.sampled_from([0, 20]),
    st.sets(st.sampled_from(ALL), min_size=1),
    st.lists(st.integers(1, 8192), min_size=1, max_size=50),
)
def test_no_mode_is_kept_that_costs_over_5_percent_more(hardware, pool, resident, modes, tokens):
    if resident:
        modes = modes - {CAS_STAGGERED} or {WAS}
    p = policy(hardware, pool, tuple(sorted(modes)), resident_layers=resident)
    modes, switches = run(p, tokens)
    for mode, count in zip(modes, tokens, strict=True):
        assert p.may_run(mode, count)
        assert p.seconds(mode, count) <= 1.05 * min(p.seconds(m, count) for m in p.modes)
    for switch in switches:
        assert switch.old_seconds == p.seconds(switch.old, switch.tokens)
        assert switch.new_seconds == p.seconds(switch.new, switch.tokens)
    changes = sum(a != b for a, b in pairwise(modes))
    assert changes == len(switches)


def test_hysteresis_does_not_alternate_around_the_crossover():
    p = policy()
    counts = range(1, 4096)
    below = bisect(counts, False, key=lambda t: p.seconds(CAS, t) >= p.seconds(WAS, t))
    assert len(run(p, [below, below + 1] * 50)[1]) == 0
    eager = policy(margin=0.0)
    assert len(run(eager, [below, below + 1] * 50)[1]) > 50


def test_staggered_cas_keeps_data_parallel_speed_where_was_waits_for_the_link():
    p = policy()
    for tokens in (64, 256, 1024):
        staggered, local = p.seconds(CAS_STAGGERED, tokens), p.seconds(REPLICATED, tokens)
        gemms = local * value_at(p.hardware.indexed_matmul_ratio, tokens)
        assert max(local, gemms) < staggered < 1.35 * gemms
        assert staggered < min(p.seconds(WAS, tokens), p.seconds(CAS, tokens))
    assert p.seconds(WAS, 8192) < p.seconds(CAS_STAGGERED, 8192)


def test_a_mode_that_costs_much_more_never_runs():
    p = policy()
    assert [mode for mode in p.modes if p.may_run(mode, 16)] == [CAS]
    assert [mode for mode in p.modes if p.may_run(mode, 2048)] == [WAS]


def test_one_mode_is_never_left():
    fixed = Policy((CAS,), 8, QWEN72B, load_profile("h200"))
    assert run(fixed, [1, 8192, 1]) == ([CAS] * 3, [])


def test_bad_values_are_errors():
    with pytest.raises(ValueError, match="at least one mode"):
        Policy((), 8, QWEN72B, load_profile("h200"))
    with pytest.raises(ValueError, match=r"margin=0\.2"):
        policy(margin=0.2)
    with pytest.raises(ValueError, match="unknown mode 'tp'"):
        policy().seconds("tp", 4)
    with pytest.raises(ValueError, match="hardware='a100' is unknown; known: "):
        load_profile("a100")
    with pytest.raises(ValueError, match="resident_layers=4 must be 0 for cas_staggered"):
        policy(resident_layers=4).seconds(CAS_STAGGERED, 4)
    with pytest.raises(ValueError, match="flops must be positive"):
        Hardware("x", 0.0, 1.0, 1.0, 0.0, 0.0, "")
    with pytest.raises(ValueError, match="memory_bytes must not be negative"):
        Hardware("x", 1.0, 1.0, 1.0, 0.0, -1.0, "")
