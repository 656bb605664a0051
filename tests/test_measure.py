import jax
import pytest
from helpers import small_config

from sidp_jax import measure
from sidp_jax.hardware import load_profile, save_profile
from sidp_jax.measure import measure_hardware


@pytest.fixture(scope="module")
def measured():
    return measure_hardware(small_config(), 1, "float32")


def test_every_figure_is_measured_or_said_to_be_assumed(measured, tmp_path):
    assert measured.name == "measure"
    assert f"measured on {jax.device_count()} x" in measured.source
    (times,) = measured.layer_ms
    assert [tokens for tokens, _ in times.milliseconds] == [1, 16, 64, 256]
    for tokens, ms in times.milliseconds:
        got = measured.dense_seconds(tokens, times.weight_bytes, times.flops_per_token)
        assert got == pytest.approx(ms / 1e3)
    assert measured.hop_latency > 0, "eight virtual devices have a link"
    assert "attention runs at the rates of the copy" in measured.assumptions
    path = tmp_path / "here.yaml"
    save_profile(measured, path)
    assert load_profile(str(path)).layer_ms == measured.layer_ms


def test_a_layer_of_many_tokens_takes_longer(measured):
    (times,) = measured.layer_ms
    assert times.milliseconds[-1][1] > times.milliseconds[0][1]


def test_one_device_takes_its_link_from_the_profile_of_its_kind(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    figures, assumed = measure._link(jax.devices()[0])
    assert figures["link_bandwidth"] == load_profile("cpu").link_bandwidth
    assert "is that of cpu" in assumed[0]
