"""The benchmark of the layers' loop: a small model on the CPU, and its ceiling by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import small_config

from sidp_jax.mesh import make_mesh

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

import bench_layers
from bench_offline import Ceilings

MODEL = Path(__file__).resolve().parent.parent / "sidp_jax/assets/tiny_adder"


def test_a_report_for_a_tiny_model(tmp_path):
    out = tmp_path / "report.json"
    arguments = ["--model", str(MODEL), "--layers", "3", "--tokens", "1,16", "--dtype", "float32"]
    content = bench_layers.main([*arguments, "--platform", "cpu", "--out", str(out)])
    assert json.loads(out.read_text()) == content
    assert "errors" not in content
    rows = [(row["form"], row["tokens"]) for row in content["layers"]]
    assert rows == [("unrolled", 1), ("unrolled", 16), ("scan", 1), ("scan", 16)]
    for row in content["layers"]:
        assert row["ratio"] == pytest.approx(row["layer_us"] / row["ceiling_us"])
        assert row["met"] == (row["ratio"] <= row["limit"])
        assert row["limit"] == {"unrolled": 1.1, "scan": 1.25}[row["form"]]


def test_both_forms_compute_the_same_from_the_same_weights(tmp_path):
    results = []
    for form in ("unrolled", "scan"):
        loop = bench_layers.Loop(small_config(4), make_mesh(1), form, np.dtype("float32"))
        weights = loop.weights(MODEL)
        results.append(loop.lower(5).compile()(weights, *loop.inputs(5)))
    x, _ = loop.inputs(5)
    np.testing.assert_allclose(*map(np.asarray, results), rtol=1e-6)
    assert np.abs(np.asarray(results[0]) - np.asarray(x)).max() > 0, "the layers do something"


def test_the_ceiling_is_the_longer_of_reading_and_of_computing():
    config = small_config()
    qkv, out = 2 * 4 * 16 * 32, 4 * 16 * 32
    kernels = qkv + out + 3 * 48 * 32
    values = kernels + 2 * 32 + 2 * 16
    ceilings = Ceilings(matmul_flops=1e6, copy_bandwidth=1e6)
    seconds = bench_layers.ceiling_seconds(config, 1, 2, ceilings)
    assert seconds == pytest.approx(values * 2 / 1e6)
    seconds = bench_layers.ceiling_seconds(config, 100, 2, ceilings)
    assert seconds == pytest.approx(kernels * 2 * 100 / 1e6)
