"""The benchmark of one replica: rows on CPU devices, batches, and that errors stay local."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sidp_jax.batch import unpack
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

import bench_replica
import mocked_pool
from one_step import Form, Stepper, Work, compile_all

MODEL = Path(__file__).resolve().parent.parent / "sidp_jax/assets/tiny_adder"
POOL, LAYERS, PAGE = 4, 4, 16
ARGUMENTS = [
    *("--model", str(MODEL), "--platform", "cpu", "--memory-gb", "0.01", "--layers", str(LAYERS)),
    *("--pool-size", str(POOL), "--sizes", "4,48", "--cas-limit", "4", "--max-num-seqs", "8"),
    *(
        "--context",
        "32",
        "--max-model-len",
        "64",
        "--page-size",
        str(PAGE),
        "--tensor-tokens",
        "48",
    ),
    *("--attention", "reference", "--layer-loop", "scan", "--round-s", "0", "--rounds", "1"),
    "--no-probe",  # this CPU compiler copies the cache
]


def form(**changes):
    settings = {
        "attention": "reference",
        "layer_loop": "scan",
        "dtype": np.dtype("float32"),
        "page_size": PAGE,
        "max_num_seqs": 8,
        "max_model_len": 64,
    }
    model = ModelConfig.from_pretrained(MODEL)
    return Form.make(model, make_mesh(POOL), 0, **settings | changes)


def test_the_embedding_of_a_mocked_pool_needs_no_collective():
    table = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    x = mocked_pool.local_embedding(None, jax.numpy.asarray(table), jax.numpy.array([1, 9, 4]))
    np.testing.assert_array_equal(x, table[[1, 1, 0]])


def test_small_steps_decode_and_large_ones_prefill():
    assert Work.of(3, context=40, most_decodes=8).rows == ((39, 1),) * 3
    work = Work.of(100, context=40, most_decodes=8)
    assert work.rows == ((0, 40), (0, 40), (0, 20))
    assert work.name == "prefill 2 x 40 + prefill 1 x 20"
    assert work.pages(PAGE) == 3 + 3 + 2
    assert Work.of(9, context=40, most_decodes=8).rows == ((0, 9),)


def test_every_sequence_of_a_batch_has_pages_of_its_own():
    work = Work.of(70, context=40, most_decodes=8)
    layout = form().batch_layout(80)
    batch = unpack(form().batch(work, 80), layout)
    for replica in range(POOL):
        slots = batch.kv_slots[replica, :70]
        assert len(set(slots.tolist())) == 70
        assert (batch.kv_slots[replica, 70:] == -1).all()
        expected = [
            batch.block_tables[replica, row, position // PAGE] * PAGE + position % PAGE
            for row, (start, length) in enumerate(work.rows)
            for position in range(start, start + length)
        ]
        assert slots.tolist() == expected


def test_a_program_that_does_not_compile_is_handed_on_as_its_error():
    def broken():
        raise ValueError("no such program")

    good = lambda: jax.jit(lambda x: x + 1).lower(1.0)  # noqa: E731
    results = {key: program for key, program, _ in compile_all({"bad": broken, "good": good})}
    assert isinstance(results["bad"], ValueError)
    assert float(results["good"](1.0)) == 2.0


def test_every_mode_and_size_has_a_row(tmp_path):
    out = tmp_path / "report.json"
    report = bench_replica.main([*ARGUMENTS, "--out", str(out)])
    assert "errors" not in report
    assert "no performance" in report["what"]
    cases = {(row["group"], row["mode"], row["tokens"]) for row in report["steps"]}
    assert cases == {
        *(("replicated", "replicated", size) for size in (4, 48)),
        *(("pooled", mode, size) for mode in ("was", "cas_staggered") for size in (4, 48)),
        ("pooled", "cas", 4),
        ("pooled 2 x TP2", "was", 48),
        ("plain 2 x TP2", "replicated", 48),
    }
    for row in report["steps"]:
        assert row["step_ms"] > 0
        assert row["finite_keys"] == 1.0
        assert row["layer_ms_with_link"] >= row["layer_ms"]
        # The compiled program's own account is what the cache was taken to leave room for.
        kv_bytes = row["kv_tokens"] * 2 * LAYERS * 2 * 32 * 2 // row["tensor_size"]
        assert kv_bytes < row["argument_bytes"] < 0.01e9
    pooled, plain = report["steps"][-2:]
    (summary,) = report["kv_per_gpu"]
    assert summary["kv_tokens_per_gpu"] == pooled["kv_tokens"] / 2
    assert summary["kv_tokens_ratio"] == pooled["kv_tokens"] / plain["kv_tokens"]
    assert summary["met"] is None  # the target is one of the 72B model's


def test_a_step_that_fails_is_an_error_and_the_rest_goes_on(tmp_path, monkeypatch):
    run, failed = Stepper.run, []

    def out_of_memory_once(self, program, buffer):
        if not failed:
            failed.append(True)
            jax.tree.map(lambda leaf: leaf.delete(), self.kv)
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return run(self, program, buffer)

    monkeypatch.setattr(Stepper, "run", out_of_memory_once)
    out = tmp_path / "report.json"
    report = bench_replica.main([*ARGUMENTS, "--modes", "was", "--tensor", "0", "--out", str(out)])
    (error,) = report["errors"]
    assert error["tokens"] == 4
    assert "Out of memory" in error["error"]
    (row,) = report["steps"]
    assert row["tokens"] == 48


def test_nothing_starts_after_the_budget(tmp_path):
    report = bench_replica.main([*ARGUMENTS, "--budget-s", "0"])
    assert "steps" not in report
    assert {error["group"] for error in report["errors"]} == {
        *("replicated", "pooled", "pooled 2 x TP2", "plain 2 x TP2")
    }


@pytest.mark.parametrize("modes", ["nonsense", "was,nonsense"])
def test_an_unknown_mode_is_refused(modes, capsys):
    with pytest.raises(SystemExit):
        bench_replica.parse(["--model", "m", "--modes", modes])
    assert "known: replicated, was, cas, cas_staggered" in capsys.readouterr().err


def test_a_cache_is_sized_by_what_the_compiler_says(monkeypatch):
    argument_bytes = []

    def used(self, form, program):
        memory = program.memory_analysis()
        argument_bytes.append(memory.argument_size_in_bytes)
        return memory.argument_size_in_bytes + 3_000_000

    monkeypatch.setattr(bench_replica.Bench, "_used", used)
    options = ("--modes", "was", "--sizes", "4", "--tensor", "0", "--probe")
    (row,) = bench_replica.main([*ARGUMENTS, *options])["steps"]
    usable, page_bytes = int(0.01e9 * 0.92), 2 * LAYERS * 2 * 32 * 2 * PAGE
    assert 0 <= usable - 3_000_000 - row["argument_bytes"] < page_bytes
    assert argument_bytes[1] == row["argument_bytes"] < argument_bytes[0]
    assert row["kv_tokens"] == row["kv_tokens_compiled"]


def test_no_room_for_a_cache_is_an_error_that_says_what_to_do():
    assert bench_replica.pages_beside(fixed=30, usable=100, page_bytes=20) == 3
    with pytest.raises(ValueError, match="take fewer layers or tokens"):
        bench_replica.pages_beside(fixed=90, usable=100, page_bytes=20)
