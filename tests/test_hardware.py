from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sidp_jax.estimate import layer_shape
from sidp_jax.hardware import (
    Hardware,
    LayerTimes,
    load_profile,
    parse_profile,
    profile_for,
    profile_names,
    save_profile,
    value_at,
)
from sidp_jax.models.config import ModelConfig

SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"
PLAIN = {"flops": 1e12, "memory_bandwidth": 1e9, "link_bandwidth": 1e8, "hop_latency": 0}
PLAIN |= {"memory_bytes": 0, "source": "made up"}

# Seconds of one Qwen2.5-72B layer in steps of 16 layers, without head and attention.
MEASURED_H200 = {16: 0.447e-3, 128: 0.539e-3, 512: 1.52e-3, 2048: 5.63e-3, 8192: 22.0e-3}


def test_profiles_of_devices():
    assert {load_profile(name).name for name in profile_names()} == set(profile_names())
    assert profile_for("NVIDIA H200", "gpu") == "h200"
    assert profile_for("NVIDIA H20", "gpu") == "h20"
    assert profile_for("NVIDIA H100 80GB HBM3", "gpu") == "h100"
    assert profile_for("cpu", "cpu") == "cpu"
    with pytest.raises(ValueError, match="no hardware profile for 'NVIDIA A100-SXM4-80GB'"):
        profile_for("NVIDIA A100-SXM4-80GB", "gpu")


@pytest.mark.parametrize(("tokens", "seconds"), MEASURED_H200.items())
def test_the_h200_profile_agrees_with_measured_layers(tokens, seconds):
    shape = layer_shape(ModelConfig.from_pretrained(SHAPES / "qwen2.5_72b"), 1, 2)
    got = load_profile("h200").dense_seconds(tokens, shape.weight_bytes, shape.flops_per_token)
    assert got == pytest.approx(seconds, rel=0.1)


def test_the_h200_profile_agrees_with_measured_attention():
    # 256 decodes of 128 to 8192 tokens and a chunk of 2048 on 2048: 1.488 ms in one call.
    hardware, kv_token = load_profile("h200"), 2 * 8 * 128 * 2
    read = 4.329e12 * 1.053e-3
    chunk = 4 * 64 * 128 * (2048 * 2048 + 2048 * 2049 / 2)
    assert 256 * 128 * kv_token < read < 256 * 8192 * kv_token
    assert hardware.attention_seconds(read, [(chunk, 4096)]) == pytest.approx(1.488e-3, rel=0.1)


def measured(*layers, **changes):
    return Hardware("x", 1e12, 1e9, 1e8, 0.0, 0.0, "", layer_ms=layers, **changes)


def test_measured_layers_are_given_back_and_scale_with_the_roofline():
    hardware = measured(LayerTimes(1e6, 1e6, ((1.0, 2.0), (1000.0, 3.0))))
    assert hardware.dense_seconds(1, 1e6, 1e6) == pytest.approx(2e-3)
    assert hardware.dense_seconds(1000, 1e6, 1e6) == pytest.approx(3e-3)
    assert hardware.dense_seconds(1, 2e6, 2e6) == pytest.approx(4e-3)
    # Beyond the last point the ratio to the roofline stays: 3 ms where it is 1 ms.
    assert hardware.dense_seconds(4000, 1e6, 1e6) == pytest.approx(12e-3)


def test_a_layer_between_two_measured_ones_lies_between_them():
    small = LayerTimes(1e6, 1e6, ((1.0, 4.0),))
    large = LayerTimes(1e8, 1e8, ((1.0, 100.0),))
    hardware = measured(small, large)
    ratios = [hardware.dense_seconds(1, w, w) / (w / 1e9) for w in (1e5, 1e6, 1e7, 1e8, 1e9)]
    assert ratios == pytest.approx([4, 4, 2.5, 1, 1])


def test_beyond_its_last_point_a_layer_follows_the_next_in_size():
    small = LayerTimes(1e6, 1e6, ((1.0, 1.5), (1000.0, 2.0)))
    near = LayerTimes(2e6, 2e6, ((1000.0, 2.6), (4000.0, 8.8)))
    far = LayerTimes(1e9, 1e9, ((1000.0, 1e4), (4000.0, 4e4)))
    hardware = measured(small, near, far)
    assert hardware.dense_seconds(1000, 1e6, 1e6) == pytest.approx(2e-3), "as measured"
    assert hardware.dense_seconds(4000, 1e6, 1e6) == pytest.approx(4e-3 * 1.1)
    assert hardware.dense_seconds(9000, 1e6, 1e6) == pytest.approx(9e-3 * 1.1)
    assert hardware.dense_seconds(2000, 1e6, 1e6) == pytest.approx(2e-3 * (2.0 + 1.1) / 2)
    assert measured(near).dense_seconds(4000, 2e6, 2e6) == pytest.approx(8.8e-3)


def test_without_measured_layers_the_roofline_counts():
    hardware = measured()
    assert hardware.dense_seconds(1, 1e6, 2e6) == 1e-3
    assert hardware.dense_seconds(10**6, 1e6, 2e6) == 2.0


@given(st.lists(st.floats(0.1, 1e5), min_size=1, max_size=6, unique=True), st.floats(0.1, 1e5))
def test_a_curve_stays_between_its_points(xs, x):
    curve = tuple((x, 1.0 + i % 3) for i, x in enumerate(sorted(xs)))
    assert all(value_at(curve, x) == y for x, y in curve)
    below = [y for other, y in curve if other <= x][-1:] or [curve[0][1]]
    above = [y for other, y in curve if other >= x][:1] or [curve[-1][1]]
    assert min(below + above) <= value_at(curve, x) <= max(below + above)


@pytest.mark.parametrize("name", ["h200", "b200"])
def test_a_saved_profile_is_read_back(name, tmp_path):
    hardware = load_profile(name)
    path = tmp_path / f"{name}.yaml"
    save_profile(hardware, path)
    assert load_profile(str(path)) == hardware
    with pytest.raises(ValueError, match=r"saved as a \.yaml file, got .*x\.json"):
        save_profile(hardware, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flop": 1}, "unknown key 'flop'"),
        ({"flops": "fast"}, "flops='fast'"),
        ({"flops": 0}, "flops must be positive"),
        ({"decode_bandwidth": -1}, "decode_bandwidth must not be negative"),
        ({"prefill_flops": {4: 0}}, "prefill_flops must hold positive points"),
        ({"layer_ms": [{"tokens": 3}]}, "a measured layer has the keys"),
        (
            {"layer_ms": [{"weight_bytes": 1, "flops_per_token": 1, "milliseconds": {}}]},
            "a layer without times",
        ),
    ],
)
def test_bad_profiles_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        parse_profile("x", PLAIN | change)
    with pytest.raises(ValueError, match="missing"):
        parse_profile("x", {key: value for key, value in PLAIN.items() if key != "source"})
    with pytest.raises(ValueError, match="must hold lines"):
        parse_profile("x", yaml.safe_load("- 1"))
