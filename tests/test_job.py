import json
import logging
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import FakeEngine, make_model_folder, read_results, write_rows

from sidp_jax import job as job_module
from sidp_jax import progress
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.job import Interrupted, Job
from sidp_jax.results import manifest_path

ROWS = [
    {"custom_id": "a", "prompt": "abc", "expected": "cba"},
    b"{not json",
    b"",
    {"custom_id": "b", "prompt": "hello", "expected": "wrong"},
    {"custom_id": "a", "prompt": "again"},
    {"prompt": "no id"},
    {"custom_id": "c", "prompt": "x" * 100},
    {"custom_id": "d", "prompt": "x", "tools": [{}]},
    {"custom_id": "e", "messages": [{"role": "user", "content": "hi"}]},
    {"custom_id": "f", "prompt": [1, 2, 3], "n": 2, "expected": "never"},
]
IDS = {1: "a", 2: "row-2", 4: "b", 5: "a", 6: "row-6", 7: "c", 8: "d", 9: "e", 10: "f"}
CODES = {
    2: "invalid_json",
    5: "duplicate_custom_id",
    7: "invalid_request",
    8: "unsupported",
}


@pytest.fixture
def config(tmp_path):
    return EngineConfig(
        model=str(make_model_folder(tmp_path / "model")),
        input=str(write_rows(tmp_path / "in.jsonl", ROWS)),
        output=str(tmp_path / "out" / "out.jsonl"),
    )


def change(config, **values):
    from dataclasses import replace

    return replace(config, **values)


def run(config, engine=None, **arguments):
    with Job.open(config) as job:
        return job.run(engine or FakeEngine(), **arguments)


def by_line(path):
    results = read_results(path)
    lines = {int(row["id"].removeprefix("row-")): row for row in results}
    assert len(lines) == len(results), "a row twice"
    return lines


def test_every_row_yields_one_row(config):
    summary = run(config)
    rows = by_line(config.output_path)
    assert {line: row["custom_id"] for line, row in rows.items()} == IDS
    errors = {line: row["error"]["code"] for line, row in rows.items() if row["error"]}
    assert errors == CODES
    assert all((row["response"] is None) == (row["error"] is not None) for row in rows.values())
    assert len({tuple(row) for row in rows.values()}) == 1, "columns differ"
    assert rows[1]["response"]["body"]["choices"][0]["text"] == "cba"
    assert rows[1]["response"]["body"]["model"] == config.model
    assert (summary.rows, summary.succeeded, summary.failed, summary.kept) == (9, 5, 4, 0)
    assert (summary.checked, summary.correct) == (3, 1)
    assert summary.prompt_tokens == 3 + 5 + 5 + 8 + 3
    assert summary.output_tokens > 0


def test_two_runs_are_equal(config, tmp_path):
    run(config)
    run(change(config, output=str(tmp_path / "again.jsonl")), FakeEngine(max_concurrency=1))
    first, second = (
        sorted(path.read_text().splitlines())
        for path in (config.output_path, tmp_path / "again.jsonl")
    )
    assert first == second


def test_results_appear_as_requests_finish(config):
    engine, seen = FakeEngine(max_concurrency=1), []
    step = engine.step

    def watched():
        seen.append(len(read_results(config.output_path)))
        return step()

    engine.step = watched
    run(config, engine)
    assert len(set(seen)) > 3


@pytest.mark.parametrize("cut", range(0, 4000, 97))
def test_a_job_cut_anywhere_goes_on(config, cut):
    run(config)
    whole = config.output_path.read_bytes()
    config.output_path.write_bytes(whole[:cut])
    engine = FakeEngine()
    summary = run(config, engine)
    assert sorted(config.output_path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert summary.kept == whole[:cut].count(b"\n")
    assert (summary.succeeded, summary.failed) == (5, 4)
    assert (summary.checked, summary.correct) == (3, 1)
    done = {json.loads(line)["id"] for line in whole[:cut].split(b"\n")[:-1]}
    assert not done & set(engine.seen), "a row done twice"


def test_a_complete_job_needs_no_engine(config):
    summary = run(config)
    with Job.open(config) as job:
        assert job.is_complete
        again = job.count_kept()
    assert again.kept == again.rows == 9
    assert (again.succeeded, again.failed) == (summary.succeeded, summary.failed)
    assert (again.checked, again.correct) == (summary.checked, summary.correct)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 5}, r"seed \(was 0, is 5\)"),
        ({"dtype": "float32"}, "dtype"),
        ({"max_model_len": 99}, "max_model_len"),
        ({"load_format": "dummy"}, "load_format"),
    ],
)
def test_a_changed_config_is_refused(config, values, message):
    run(config)
    before = config.output_path.read_bytes()
    with pytest.raises(ConfigError, match=f"{message}.*--overwrite"):
        Job.open(change(config, **values))
    assert config.output_path.read_bytes() == before


def test_changed_sampling_input_and_model_are_refused(config):
    run(config)
    sampling = EngineConfig.from_mapping({"model": "m", "sampling.top_k": 4}).sampling
    with pytest.raises(ConfigError, match=r"sampling\.top_k \(was 0, is 4\)"):
        Job.open(change(config, sampling=sampling))
    config.input_path.write_bytes(config.input_path.read_bytes() + b"{}\n")
    with pytest.raises(ConfigError, match="the content of the input file"):
        Job.open(config)
    write_rows(config.input_path, ROWS)
    weights = config.model_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(ConfigError, match=r"the model's file model\.safetensors"):
        Job.open(config)


def test_what_only_moves_the_work_may_change(config):
    run(config)
    config.output_path.write_bytes(b"".join(config.output_path.read_bytes().splitlines(True)[:4]))
    (config.model_path / "README.md").write_text("no part of the model")
    summary = run(change(config, pool_size=4, mode="cas", page_size=8, max_num_seqs=8))
    assert (summary.kept, summary.succeeded) == (4, 5)


def test_overwrite_starts_anew(config):
    run(config)
    with pytest.raises(ConfigError):
        Job.open(change(config, seed=5))
    summary = run(change(config, seed=5, overwrite=True))
    assert (summary.kept, summary.succeeded, len(by_line(config.output_path))) == (0, 5, 9)
    with pytest.raises(ConfigError, match="seed"):
        Job.open(config)


def test_a_file_of_somebody_else_is_refused(config):
    config.output_path.parent.mkdir()
    config.output_path.write_text("precious\n")
    with pytest.raises(ConfigError, match="not the result of a job"):
        Job.open(config)
    assert config.output_path.read_text() == "precious\n"


def test_an_empty_output_is_a_new_one(config):
    config.output_path.parent.mkdir()
    config.output_path.touch()
    assert run(config).kept == 0


@pytest.mark.parametrize("manifest", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_manifest_is_refused(config, manifest):
    run(config)
    manifest_path(config.output_path).write_bytes(manifest)
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        Job.open(config)


@pytest.mark.parametrize(
    "line", [b"\0\0\n", b"{}\n", b'{"id": "row-99", "response": null, "error": {}}\n']
)
def test_a_foreign_line_in_the_output_is_refused(config, line):
    run(config)
    config.output_path.write_bytes(line + config.output_path.read_bytes())
    with pytest.raises(ConfigError, match="line 1 of"):
        Job.open(config)


def test_the_same_row_twice_in_the_output_is_refused(config):
    run(config)
    lines = config.output_path.read_bytes().splitlines(True)
    config.output_path.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match="line 10 of"):
        Job.open(config)


def test_two_jobs_cannot_write_one_file(config):
    with Job.open(config), pytest.raises(ConfigError, match="another job is writing"):
        Job.open(config)
    run(config)


def test_an_output_that_cannot_be_written(config, tmp_path):
    with pytest.raises(ConfigError, match="cannot write the output"):
        Job.open(change(config, output=str(tmp_path)))


def test_an_empty_input_is_a_complete_job(config):
    config.input_path.write_bytes(b"\n\n")
    with Job.open(config) as job:
        assert job.is_complete
        assert job.count_kept().rows == 0


def driver(config, step_seconds):
    script = Path(__file__).with_name("job_driver.py")
    command = [sys.executable, str(script), config.input, config.output, config.model]
    return subprocess.Popen(
        [*command, str(step_seconds)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_the_engine_holds_few_requests_and_memory_does_not_grow_with_the_file(config):
    def measure(count):
        rows = [{"prompt": f"{i} {'x' * 2000}", "max_tokens": 1} for i in range(count)]
        write_rows(config.input_path, rows)
        config.output_path.unlink(missing_ok=True)
        output, errors = driver(config, step_seconds=0).communicate()
        assert len(by_line(config.output_path)) == count, errors.decode()
        return json.loads(output.splitlines()[-1])

    small, large = measure(500), measure(10_500)
    assert large["most_unfinished"] == 8
    # The file grows by 20 MB, all of which passes through; ids and states stay behind.
    assert large["peak_bytes"] - small["peak_bytes"] < 5e6


def test_custom_ids_are_found_again_after_they_are_merged(monkeypatch):
    monkeypatch.setattr(job_module._IdSet, "_RECENT", 7)
    ids, rng = job_module._IdSet(), random.Random(1)
    known = set()
    for _ in range(3000):
        text = str(rng.randrange(1500))
        assert ids.add(text) == (text not in known)
        known.add(text)


def test_digests_that_end_in_zeros(monkeypatch):
    class Digest:
        def __init__(self, raw, digest_size):
            self.raw = raw

        def digest(self):
            return self.raw.rjust(4, b"\1").ljust(16, b"\0")

    monkeypatch.setattr(job_module._IdSet, "_RECENT", 1)
    monkeypatch.setattr(job_module.hashlib, "blake2b", Digest)
    ids = job_module._IdSet()
    assert [ids.add(text) for text in ("a", "b", "a", "c", "b")] == [True, True, False, True, False]


def test_an_evil_engine_ends_the_job_at_once_and_loses_nothing(config):
    write_rows(config.input_path, [{"prompt": "abc" * (1 + i % 4)} for i in range(30)])
    evil = FakeEngine(fail_at_step=10)
    with pytest.raises(RuntimeError, match="the device is gone"):
        run(config, evil)
    assert evil.stats.steps["was"] == 10
    kept = config.output_path.read_bytes()
    assert 0 < kept.count(b"\n") < 30
    assert kept.endswith(b"\n")
    summary = run(config)
    assert config.output_path.read_bytes().startswith(kept)
    assert (summary.kept, summary.succeeded) == (kept.count(b"\n"), 30)


def test_an_engine_that_forgets_requests_does_not_hang_the_job(config):
    class Forgetful(FakeEngine):
        def step(self):
            self._left.clear()
            return []

    with pytest.raises(RuntimeError, match="5 requests unfinished"):
        run(config, Forgetful())


def test_asked_to_stop(config):
    calls = iter([False] * 12 + [True])
    with pytest.raises(Interrupted):
        run(config, FakeEngine(max_concurrency=1), should_stop=lambda: next(calls))
    done = len(by_line(config.output_path))
    assert 0 < done < 9
    assert run(config).kept == done


def test_a_log_line_without_a_terminal(config, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="sidp_jax"):
        run(config)
    line = next(record.message for record in caplog.records if "running" in record.message)
    for word in (
        "requests: ",
        "waiting: ",
        "preempted: 0",
        "KV cache usage: 50.0%",
        "hit rate: 25.0%",
        "mode: was",
    ):
        assert word in line
    assert "compilations: 0" in line


def test_a_bar_on_a_terminal(config):
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), force_terminal=True, width=120)
    run(config, console=console)
    assert "9/9" in console.file.getvalue()


def test_killed_at_any_moment_nothing_is_lost_or_done_twice(config, tmp_path):
    rows = [{"custom_id": f"id-{i % 190}", "prompt": "abc" * (1 + i % 9)} for i in range(200)]
    write_rows(config.input_path, rows)
    reference = change(config, output=str(tmp_path / "reference.jsonl"))
    run(reference)
    rng, kills = random.Random(0), 0
    for _ in range(60):
        process = driver(config, step_seconds=0.001)
        process.stdout.readline()  # from here on it works
        time.sleep(rng.uniform(0, 0.12))
        if kills < 10:
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors.decode()
    assert process.returncode == 0
    assert kills >= 3
    assert sorted(config.output_path.read_bytes().splitlines()) == sorted(
        reference.output_path.read_bytes().splitlines()
    )
