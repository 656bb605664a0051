import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import FakeEngine, make_model_folder, read_results, write_rows

from sidp_jax import run


@pytest.fixture(autouse=True)
def restore_logging():
    package = logging.getLogger("sidp_jax")
    before = package.handlers[:], package.level, package.propagate
    yield
    package.handlers[:], package.level, package.propagate = before


@pytest.fixture
def engine(monkeypatch):
    """The engine that the command line gets."""
    engine = FakeEngine()
    module = SimpleNamespace(build_engine=lambda config: engine)
    monkeypatch.setitem(sys.modules, "sidp_jax.build", module)
    return engine


@pytest.fixture
def arguments(tmp_path):
    make_model_folder(tmp_path / "model")
    rows = [{"prompt": "abc", "expected": "cba"}, {"prompt": "abcd", "expected": "?"}]
    write_rows(tmp_path / "in.jsonl", rows)
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path / 'model'}\nplatform: cpu\n")
    return [
        "--config",
        str(tmp_path / "run.yaml"),
        f"input={tmp_path / 'in.jsonl'}",
        f"output={tmp_path / 'out.jsonl'}",
        "pool_size=8",
    ]


def test_success_ends_with_a_table(engine, arguments, tmp_path, capsys):
    assert run.main(arguments) == 0
    table = capsys.readouterr().out
    for words in ("requests", "succeeded", "total tokens/s", "KV tokens", "4,096", "was 4"):
        assert words in table
    assert "1 of 2 (50.00%)" in table
    assert len(read_results(tmp_path / "out.jsonl")) == 2


def test_error_rows_give_3(engine, arguments, tmp_path):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "abc"}, "no json"])
    assert run.main(arguments) == 3
    assert run.main(arguments) == 3, "also when nothing is left to do"


def test_a_complete_job_builds_no_engine(engine, arguments, monkeypatch, capsys):
    assert run.main(arguments) == 0
    monkeypatch.setitem(sys.modules, "sidp_jax.build", None)
    assert run.main(arguments) == 0
    assert "1 of 2 (50.00%)" in capsys.readouterr().out


def test_a_changed_job_is_refused_and_overwrite_starts_anew(engine, arguments, capsys):
    assert run.main(arguments) == 0
    assert run.main([*arguments, "seed=3"]) == 2
    assert "seed (was 0, is 3)" in capsys.readouterr().err
    assert run.main([*arguments, "seed=3", "--overwrite"]) == 0


def test_an_engine_that_raises_gives_1_and_the_same_command_goes_on(engine, arguments, tmp_path):
    engine.fail_at_step = 4
    assert run.main(arguments) == 1
    assert len(read_results(tmp_path / "out.jsonl")) == 1
    engine.fail_at_step = None
    engine._left.clear()
    assert run.main(arguments) == 0


def test_a_signal_ends_the_job_after_its_step(engine, arguments, tmp_path, capsys):
    step = engine.step

    def step_and_signal():
        if engine.stats.steps["was"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step()

    engine.step = step_and_signal
    before = signal.getsignal(signal.SIGTERM)
    assert run.main(arguments) == 1
    assert signal.getsignal(signal.SIGTERM) == before
    assert "the same command goes on" in capsys.readouterr().err
    assert len(read_results(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["pool_sizes=3"], "nearest known one is 'pool_size'"),
        (["mode=wass"], "did you mean 'was'"),
        (["sampling.temperature=hot"], "sampling.temperature='hot'"),
        (["model=nowhere"], "there is no folder"),
        (["input=nowhere"], "there is no file"),
    ],
)
def test_configuration_errors_give_2(engine, arguments, extra, message, capsys):
    assert run.main([*arguments, *extra]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config", "tiny.yaml", "--nope"]])
def test_usage_errors_give_2(argv):
    with pytest.raises(SystemExit) as info:
        run.main(argv)
    assert info.value.code == 2


def test_an_unknown_config_names_those_that_ship(capsys):
    assert run.main(["--config", "gpt5.yaml"]) == 2
    assert "llama70b.yaml, qwen32b.yaml, qwen72b.yaml, tiny.yaml" in capsys.readouterr().err


def command(*arguments, **options):
    environment = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
    return subprocess.Popen(
        [sys.executable, "-m", "sidp_jax.run", *arguments],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("name", ["qwen72b.yaml", "qwen32b.yaml", "llama70b.yaml"])
def test_a_large_config_says_what_is_missing_and_what_to_set(name, tmp_path):
    process = command("--config", name, cwd=tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "there is no folder" in errors
    assert "set model=" in errors
    assert "needs 8 GPUs, and this machine shows 0; set their product" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.iterdir()), "nothing is written"


GOLDEN = Path(__file__).with_name("golden") / "qwen3"


def test_the_real_thing_killed_and_resumed(tmp_path):
    """Every row exactly once, with the tokens that Hugging Face gives, through a kill -9."""
    import numpy as np

    golden = np.load(GOLDEN / "golden.npz")
    prompts = [[int(token) for token in prompt if token >= 0] for prompt in golden["prompts"]]
    answers = golden["greedy"][:, :24].tolist()
    rows = [{"prompt": prompts[i % 4], "ignore_eos": True} for i in range(64)]
    write_rows(tmp_path / "in.jsonl", rows)
    arguments = [
        "--config",
        "tiny.yaml",
        f"model={GOLDEN}",
        "input=in.jsonl",
        "output=out.jsonl",
        "pool_size=2",
        "mode=was",
        "max_model_len=128",
        "max_num_seqs=2",
        "max_num_batched_tokens=16",
        "sampling.max_tokens=24",
    ]
    process = command(*arguments, cwd=tmp_path)
    output = tmp_path / "out.jsonl"
    while process.poll() is None and not (output.exists() and output.stat().st_size):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = output.read_bytes().count(b"\n")
    assert 0 < kept < 64
    process = command(*arguments, cwd=tmp_path)
    table, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "earlier run" in table
    results = read_results(output)
    assert sorted(int(row["id"][4:]) for row in results) == list(range(1, 65))
    for row in results:
        expected = answers[(int(row["id"][4:]) - 1) % 4]
        assert row["response"]["body"]["choices"][0]["token_ids"] == expected
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["dtype"] == "float32"
