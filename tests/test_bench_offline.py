import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments"
sys.path.append(str(FOLDER))

from gpu_trace import Kernel, activity_of, covered, read_activity  # noqa: E402


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


def test_prompts_can_begin_alike(tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, FOLDER / "bench_offline.py", "--config", "tiny.yaml", "--out", out]
    command += ["--case", "4,8,4", "--shared-prefix", "6", "pool_size=1", "page_size=2"]
    command += ["max_num_seqs=4", "max_num_batched_tokens=16", "max_model_len=32"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    case = json.loads(out.read_text())["cases"]["4,8,4"]
    assert case["cached_tokens"] == 3 * 6
    assert "floor_s" not in case


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


def a_trace(steps, *, named=True, other_stream=()):
    """Steps of 10 us: a forward program with 3 kernels, a copy in it, then a sampler with 2."""
    kernels = []
    for step in range(steps):
        start = 10_000 * step
        program = "jit__forward(3)" if named else ""
        kernels += [
            Kernel("gemm", start + i * 2000, start + i * 2000 + 1500, program) for i in (0, 1)
        ]
        kernels.append(Kernel("memset", start + 3500, start + 4000))
        kernels.append(Kernel("gemm", start + 4000, start + 6000, program))
        sampler = "jit__sample(4)" if named else ""
        kernels += [Kernel("max", start + i, start + i + 400, sampler) for i in (7000, 7500)]
    return profile({"Stream #14(Compute)": kernels, "Stream #20(MemcpyD2H)": list(other_stream)})


def profile(lines):
    """A profile as the profiler writes it; jax reads it back."""
    from jax.profiler import ProfileData

    text, names = "", {}
    for number, (line, kernels) in enumerate(lines.items()):
        events = ""
        for kernel in kernels:
            key = names.setdefault(kernel.name, len(names) + 1)
            place = f"offset_ps: {kernel.start * 1000} "
            place += f"duration_ps: {(kernel.end - kernel.start) * 1000}"
            module = f'stats {{ metadata_id: 1 str_value: "{kernel.module}" }}'
            stats = module if kernel.module else 'stats { metadata_id: 2 str_value: "1" }'
            events += f"events {{ metadata_id: {key} {place} {stats} }}\n"
        text += f'lines {{ id: {number} name: "{line}" timestamp_ns: 500 {events} }}\n'
    for name, key in names.items():
        text += f'event_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }}\n'
    for key, name in enumerate(("hlo_module", "grid"), 1):
        text += f'stat_metadata {{ key: {key} value {{ id: {key} name: "{name}" }} }}\n'
    text = f'planes {{ name: "/host:CPU" }} planes {{ name: "/device:GPU:0" {text} }}'
    serialized = ProfileData.text_proto_to_serialized_xspace(text)
    return ProfileData.from_serialized_xspace(serialized)


# jax's reader makes a type without a module, at which newer Pythons warn, and dies if that raises.
READS_A_PROFILE = pytest.mark.filterwarnings("ignore:builtin type event_stats")


@READS_A_PROFILE
def test_a_step_is_a_forward_program_and_what_follows():
    copy = Kernel("copy", 0, 90_000)  # on a stream of its own: not counted
    activity = activity_of(a_trace(5, other_stream=[copy]), "here")
    assert [run.module for run in activity.runs()] == ["jit__forward(3)", "jit__sample(4)"] * 5
    steps = activity.steps()
    assert (steps.steps, steps.kernels, steps.sampler_kernels) == (3, 6, 2), "the ends are cut off"
    figures = steps.figures()
    assert figures == {
        "traced_step_ms": pytest.approx(10e-3),
        "gpu_busy_ms": pytest.approx(6.3e-3),
        "gpu_idle_share": pytest.approx(0.37),
        "kernels_per_step": 6,
        "gaps_in_programs_ms": pytest.approx(0.6e-3),
        "gaps_in_programs_share": pytest.approx(0.06),
        "between_programs_ms": pytest.approx((10 - 6 - 0.9) * 1e-3),
        "between_programs_share": pytest.approx(0.31),
        "sampler_ms": pytest.approx(0.8e-3),
        "sampler_share": pytest.approx(0.08),
        "sampler_kernels": 2,
    }
    assert activity.busy_s == pytest.approx(5 * (1.5 + 1.5 + 0.5 + 2 + 0.8) * 1e-6)


@READS_A_PROFILE
def test_steps_need_the_names_of_their_programs():
    for trace in (a_trace(5, named=False), a_trace(2)):
        with pytest.raises(ValueError, match="too few, begin in the trace"):
            activity_of(trace, "here").steps()
    with pytest.raises(ValueError, match="no kernels on a compute stream"):
        activity_of(profile({"Stream #20(MemcpyD2H)": [Kernel("copy", 0, 1)]}), "here")
