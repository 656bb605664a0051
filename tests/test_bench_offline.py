import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"
sys.path.append(str(FOLDER))

from gpu_trace import covered, read_activity  # noqa: E402


def test_a_report_for_a_tiny_model(tmp_path):
    out = tmp_path / "report.json"
    lengths = tmp_path / "lengths.json"
    lengths.write_text("[[3, 2], [9, 6]]")
    command = [sys.executable, FOLDER / "bench_offline.py", "--config", "tiny.yaml", "--out", out]
    command += ["--case", "4,8,4", "--case", f"@{lengths}", "--decode", "2", "--decode", "2,0.9"]
    command += ["pool_size=2", "max_num_seqs=4", "max_num_batched_tokens=16", "max_model_len=96"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    report = json.loads(out.read_text())
    assert list(report["cases"]) == ["4,8,4", f"@{lengths}", "decode 2", "decode 2,0.9"]
    case = report["cases"]["4,8,4"]
    assert case["output_tokens_per_s"] == pytest.approx(16 / case["wall_s"])
    assert case["mean_tokens_per_step"] == pytest.approx(48 / case["steps"])
    assert case["compilations"] == 0
    assert case["ratio_to_floor"] == pytest.approx(case["wall_s"] / case["floor_s"])


def test_covered_is_the_length_of_the_union():
    rng = random.Random(0)
    for _ in range(50):
        intervals = [(a, a + rng.randrange(6)) for a in rng.choices(range(40), k=8)]
        points = {point for start, end in intervals for point in range(start, end)}
        assert covered(intervals) == len(points)


def test_a_trace_without_a_gpu_is_refused(tmp_path):
    import jax

    with pytest.raises(ValueError, match="was a trace taken"):
        read_activity(tmp_path)
    with jax.profiler.trace(tmp_path):
        jax.numpy.ones(3).block_until_ready()
    with pytest.raises(ValueError, match="shows no GPU"):
        read_activity(tmp_path)
