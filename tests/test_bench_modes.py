"""The benchmark of all modes over a link: its rows on CPU devices, and that errors stay local."""

import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

import bench_modes
from one_step import Form

ROOT = Path(__file__).resolve().parent.parent
ARGUMENTS = [
    *("--model", str(ROOT / "sidp_jax/assets/tiny_adder"), "--platform", "cpu", "--layers", "2"),
    *("--pool-size", "2", "--tokens", "4,48", "--max-num-seqs", "8", "--context", "32"),
    *("--page-size", "16", "--attention", "reference", "--layer-loop", "scan"),
    *("--dtype", "float32", "--round-s", "0", "--rounds", "1"),
]


def test_every_mode_is_timed_beside_the_floor(tmp_path):
    report = bench_modes.main([*ARGUMENTS, "--out", str(tmp_path / "report.json")])
    assert "errors" not in report
    assert report["what"] == "2 x cpu: no performance"
    assert {row["what"] for row in report["link"]} == {"broadcast", "ppermute"}
    # A layer and the activations of both sizes, 64 float32 to a token.
    sent = [row["bytes"] for row in report["link"] if row["what"] == "ppermute"]
    assert sent[:2] == [4 * 64 * 4, 48 * 64 * 4]
    modes = ("replicated", "was", "cas", "cas_staggered")
    cases = [(row["mode"], row["tokens_per_replica"]) for row in report["steps"]]
    assert cases == [(mode, size) for mode in modes for size in (4, 48)]
    times = {case: row["step_ms"] for case, row in zip(cases, report["steps"], strict=True)}
    for (mode, size), row in zip(cases, report["steps"], strict=True):
        floor = max(times["replicated", size], row["link_bound_ms"])
        assert row["ratio_to_floor"] == pytest.approx(row["step_ms"] / floor)
        # The same numbers from every mode: a floor of steps that compute something else is none.
        assert row["logits_error"] <= (1e-4 if mode.startswith("cas") else 0)


def test_both_forms_of_was_are_timed():
    more = ["--layers", "4", "--layer-loop", "unrolled", "--modes", "replicated,was"]
    report = bench_modes.main([*ARGUMENTS, *more, "--tokens", "4"])
    assert "errors" not in report
    assert {row["what"] for row in report["link"]} == {"broadcast", "copy", "ppermute"}
    _, collective, copies = report["steps"]
    assert (collective["was_fetch"], copies["was_fetch"]) == ("collective", "copies")
    assert copies["logits_error"] == collective["logits_error"] == 0
    best = max(row["bytes_per_s"] for row in report["link"] if row["what"] == "copy")
    layer = max(row["bytes"] for row in report["link"])
    # Four layers, of which each replica gets two from the other.
    assert copies["link_bound_ms"] == pytest.approx(2e3 * layer / best, rel=0.01)
    with pytest.raises(SystemExit):
        bench_modes.main([*ARGUMENTS, "--was-fetch", "copies"])


def test_layers_from_the_host_are_timed_beside_all_at_home():
    host = ["--layers", "4", "--host-layers", "2", "--pool-size", "1", "--layer-loop", "unrolled"]
    report = bench_modes.main([*ARGUMENTS, "--tokens", "4", *host])
    assert "errors" not in report
    assert {row["what"] for row in report["link"]} == {"host to device"}
    home, fetched = report["steps"]
    assert (home["mode"], fetched["mode"], fetched["host_layers"]) == ("replicated", "was", 2)
    best = max(row["bytes_per_s"] for row in report["link"])
    layer = max(row["bytes"] for row in report["link"])
    assert fetched["link_bound_ms"] == pytest.approx(2e3 * layer / best, rel=0.01)
    floor = max(home["step_ms"], fetched["link_bound_ms"])
    assert fetched["ratio_to_floor"] == pytest.approx(fetched["step_ms"] / floor)
    assert fetched["logits_error"] == 0


def test_what_does_not_compile_is_an_error_and_the_rest_goes_on(monkeypatch):
    lower = Form.lower

    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such collective")

    def no_cas(self, mode, *sizes):
        if mode == "cas":
            raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")
        return lower(self, mode, *sizes)

    monkeypatch.setattr(Form, "lower", no_cas)
    monkeypatch.setattr(bench_modes, "TRANSFERS", {"broadcast": broken, "ppermute": broken})
    report = bench_modes.main([*ARGUMENTS, "--tokens", "4", "--modes", "cas,was"])
    *link, cas = report["errors"]
    assert {error["what"] for error in link} == {"broadcast", "ppermute"}
    assert cas == {"mode": "cas", "tokens": 4, "error": "JaxRuntimeError: INTERNAL: no such kernel"}
    (row,) = report["steps"]
    assert row["mode"] == "was"
    assert "ratio_to_floor" not in row  # nothing to compare with was asked for
