r"""Simulate jobs on a node of eight GPUs that is not there: is pooling worth it, and where?

    python experiments/simulate_node.py --model experiments/shapes/qwen2.5_72b --hardware h200 \
        --case 3000,1024,256 --case 2000,512-2048,100-900 --case @lens.json
    python experiments/simulate_node.py --grid --out experiments/results/simulated_node.json
    python experiments/simulate_node.py --out ... --figures docs/figures --docs docs/multi_gpu.md
    python experiments/simulate_node.py --validate experiments/results/offline.json

Each job is replayed by the real scheduler, page allocator and policy (``sidp_jax.replay``) for
plain data parallelism, every DP x TP, WaS alone, CaS alone and both, each in the configuration that
the plan estimates to be best for the job's mean lengths. ``auto`` is what the plan recommends for a
long job of such lengths, ``auto_job`` for one of as many requests; it may be not to pool. Where
configurations come close the plan replays a job of its own. The jobs of the grid are others: of the
same means, but their prompts vary less, their outputs more, and the random numbers are different.
``--validate`` compares with whole jobs measured by ``bench_offline.py``. Every figure is simulated,
from a hardware profile; the profile says what of it was measured.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil
from operator import attrgetter
from pathlib import Path
from typing import Any

from node_docs import write_tables
from node_tables import draw_figures, print_tables

from sidp_jax.config import EngineConfig, load_config
from sidp_jax.estimate import Candidate, Setting, Workload, memory
from sidp_jax.hardware import as_values, load_profile, profile_for
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import REPLICATED, WAS
from sidp_jax.plan_replay import MOST_ROUNDS, ROUNDS, choose, replay_close, rounds
from sidp_jax.plan_search import (
    Option,
    plain_options,
    pooled_modes,
    pooled_options,
    tensor_sizes,
)
from sidp_jax.replay import Job, Lengths, SharedPrefix, Simulated, simulate
from sidp_jax.settle import DTYPE_BYTES, longest_sequence, make_policy

GPUS, PAGE_SIZE, UTILIZATION = 8, 64, 0.92
HARDWARE = ("h20", "h200", "b200")
MODELS = ("qwen3_32b", "qwen2.5_72b", "llama3.1_70b")
WORKLOADS = (
    (2048, 1024),
    (32768, 1024),
    (128, 32768),
    (32768, 64),
    (2048, 64),
    (32768, 32768),
    (128, 1024),
    (2048, 32768),
    (128, 64),
)
"""Prompt and output tokens of the grid, those first that differ most."""

PROMISING = 0.8
"""A plain configuration whose estimate is below this share of the best one's is not simulated,
unless it is plain data parallelism or has as large replicas as a pool. The plan replays fewer."""

PROMPT_SPREAD, OUTPUT_SPREAD = 0.25, 0.75
"""Prompts and outputs of a simulated job are uniform within these shares of their means."""

DECODE_LENGTHS = (16, 80)
"""Prompt and output of each request in the cases of ``bench_offline.py --decode``."""

TABLE_SEQS, TABLE_BUDGET = 256, 2048
"""Sizes of a step in the table of KV capacity."""

_SHAPES = Path(__file__).parent / "shapes"


def parse_job(text: str) -> Lengths:
    """The (prompt, output) lengths of a job.

    Args:
        text: ``N,IN,OUT``, where IN and OUT may be ranges ``LOW-HIGH`` to draw from uniformly, or
            ``@file`` with a list of ``[in, out]`` pairs.

    Raises:
        ValueError: It is neither.
    """
    if text.startswith("@"):
        return [(int(i), int(o)) for i, o in json.loads(Path(text[1:]).read_text())]
    try:
        count, *ranges = text.split(",")
        prompt, output = ([int(part) for part in r.split("-")] for r in ranges)
        rng = random.Random(text)
        return [
            (rng.randint(prompt[0], prompt[-1]), rng.randint(output[0], output[-1]))
            for _ in range(int(count))
        ]
    except ValueError:
        raise ValueError(f"case {text!r} must be N,IN,OUT, N,LOW-HIGH,LOW-HIGH or @file") from None


def mean_workload(lengths: Lengths) -> Workload:
    """What the plan is told of a job."""
    count = len(lengths)
    return Workload(
        ceil(sum(prompt for prompt, _ in lengths) / count),
        ceil(sum(output for _, output in lengths) / count),
    )


def make_setting(model: ModelConfig, hardware: str, longest: int) -> Setting:
    """A node's GPU with room for sequences of so many tokens."""
    length = ceil(longest / PAGE_SIZE) * PAGE_SIZE
    return Setting(model, load_profile(hardware), 2, PAGE_SIZE, length, UTILIZATION)


@dataclass(frozen=True)
class Found:
    """The best configurations for a workload by estimate, each kind by devices per replica."""

    plain: dict[int, Option]
    pools: dict[int, Option]
    was: Option | None
    cas: Option | None

    @classmethod
    def search(cls, setting: Setting, workload: Workload) -> Found:
        """Searches them all."""
        plain = plain_options(setting, GPUS, workload)
        modes = pooled_modes(setting)
        cas = tuple(mode for mode in modes if mode != WAS)
        pools, was, cas = (
            pooled_options(setting, GPUS, allowed, workload) for allowed in (modes, (WAS,), cas)
        )
        return cls(
            {size: option for size, option in plain.items() if option is not None},
            pools,
            max(was.values(), key=attrgetter("rate"), default=None),
            max(cas.values(), key=attrgetter("rate"), default=None),
        )

    def named(self) -> dict[str, Option]:
        """The configurations to compare; plain ones that are far behind are left out.

        ``plain DP`` and ``DP x TPn`` are plain, ``was``, ``cas`` and ``pooled`` (both) are pools.
        """
        pooled = max(self.pools.values(), key=attrgetter("rate"), default=None)
        pools = {"was": self.was, "cas": self.cas, "pooled": pooled}
        pools = {name: option for name, option in pools.items() if option is not None}
        least = PROMISING * max((option.rate for option in self.plain.values()), default=0.0)
        sizes = {1} | {option.candidate.tensor_size for option in pools.values()}
        plain = {
            "plain DP" if size == 1 else f"DP x TP{size}": option
            for size, option in self.plain.items()
            if size in sizes or option.rate >= least
        }
        return plain | pools

    def recommended(self, setting: Setting, workload: Workload) -> Option | None:
        """What the plan recommends."""
        options = [*self.plain.values(), *self.pools.values()]
        best = choose(replay_close(setting, options, workload), workload).best
        return None if best is None else best.option


def compare(setting: Setting, lengths: Lengths) -> dict[str, Any]:
    """Simulates a job in every configuration."""
    workload = mean_workload(lengths)
    found = Found.search(setting, workload)
    return _simulate_all(setting, found, workload, lengths, len(lengths))


def _simulate_all(
    setting: Setting, found: Found, workload: Workload, job: Lengths | Job, requests: int
) -> dict[str, Any]:
    options = found.named()
    for name, known in (("auto", 0), ("auto_job", requests)):
        option = found.recommended(setting, replace(workload, requests=known))
        if option is not None:
            options[name] = option
    done: dict[Candidate, Simulated] = {}
    results = {}
    for name, option in options.items():
        candidate = option.candidate
        if candidate not in done:
            pages = option.held.kv_tokens // setting.page_size
            done[candidate] = simulate(setting, candidate, pages, job)
        results[name] = _row(option, done[candidate])
    return {
        "prompt": workload.prompt,
        "output": workload.output,
        "requests": requests,
        "configurations": results,
        **_ratios(results),
    }


def _row(option: Option, job: Simulated) -> dict[str, Any]:
    chosen = option.candidate
    return {
        "pools": chosen.pools,
        "pool_size": chosen.pool_size,
        "tensor_parallel_size": chosen.tensor_size,
        "resident_layers": chosen.resident_layers,
        "was_fetch": chosen.was_fetch,
        "max_num_seqs": chosen.max_num_seqs,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
        "kv_tokens_per_gpu": option.held.kv_tokens / chosen.tensor_size,
        "output_tokens_per_s": job.steady_output_tokens_per_second,
        "whole_job_output_tokens_per_s": job.output_tokens_per_second,
        "whole_job_s": job.seconds,
        "planned_output_tokens_per_s": option.speed.output_tokens_per_second,
        "steps": dict(job.steps),
        "switches": len(job.switches),
        "preemptions": job.preemptions * chosen.pools,
        "sequences_per_replica": job.peak_running,
    }


def _ratios(results: dict[str, Any]) -> dict[str, float | str | None]:
    """``auto`` and the pool beside plain configurations, in the steady state and over the job."""
    plain = {name: row for name, row in results.items() if _is_plain(name)}
    ratios: dict[str, float | str | None] = {}
    for label, key in (("", "output_tokens_per_s"), ("_whole", "whole_job_output_tokens_per_s")):
        rates = {name: row[key] for name, row in plain.items()}
        fastest = max(rates, key=rates.get, default=None)
        for ours in ("auto", "auto_job", "pooled", "was", "cas"):
            rate = results[ours][key] if ours in results else None
            same = _same_tp(results, ours, rates)
            for other, value in (
                ("best_plain", rates.get(fastest)),
                ("plain_dp", rates.get("plain DP")),
                ("same_tp", same),
            ):
                ratios[f"{ours}_over_{other}{label}"] = rate / value if rate and value else None
        ratios[f"best_plain{label}"] = fastest
    return ratios


def _is_plain(name: str) -> bool:
    return name.startswith(("plain", "DP"))


def _same_tp(results: dict[str, Any], ours: str, rates: dict[str, float]) -> float | None:
    """Rate of the plain configuration whose replicas have as many devices."""
    if ours not in results:
        return None
    size = results[ours]["tensor_parallel_size"]
    return rates.get("plain DP" if size == 1 else f"DP x TP{size}")


def grid_job(options: Sequence[Option], prompt: int, output: int) -> Job:
    """A job long enough to show a steady state: some rounds of what runs at a time."""
    count = rounds(options, output) if options else 0
    return Job(prompt, output, count, PROMPT_SPREAD, OUTPUT_SPREAD, "grid")


def simulated_figures(profile: dict[str, Any]) -> dict[str, Any]:
    """What of a profile the simulation of a node uses: no text, and no layers from the host."""
    left_out = ("source", "assumptions", "host_bandwidth")
    return {key: value for key, value in profile.items() if key not in left_out}


def run_grid(
    hardware: Sequence[str], models: Sequence[str], report: dict[str, Any]
) -> Iterator[None]:
    """Simulates every workload on every node; the report grows by one at each turn.

    What the report already has is left as it is, unless the profile has changed since in what
    counts for it.
    """
    shapes = {shape: ModelConfig.from_pretrained(_SHAPES / shape) for shape in models}
    profiles = json.loads(json.dumps({name: as_values(load_profile(name)) for name in hardware}))
    for name, shape in product(hardware, models):
        where = f"{GPUS} x {name}, {shape}"
        if simulated_figures(report["profiles"].get(name, {})) != simulated_figures(profiles[name]):
            report["nodes"].pop(where, None)
        node = report["nodes"].setdefault(where, {"workloads": []})
        node["kv_capacity"] = kv_capacity(shapes[shape], name)
    report["profiles"] |= profiles
    for (prompt, output), name, shape in product(WORKLOADS, hardware, models):
        node = report["nodes"][f"{GPUS} x {name}, {shape}"]
        if any((w["prompt"], w["output"]) == (prompt, output) for w in node["workloads"]):
            continue
        workload = Workload(prompt, output)
        setting = make_setting(shapes[shape], name, grid_job([], prompt, output).longest)
        found = Found.search(setting, workload)
        job = grid_job([*found.named().values()], prompt, output)
        node["workloads"].append(_simulate_all(setting, found, workload, job, job.requests))
        yield


def kv_capacity(model: ModelConfig, hardware: str) -> list[dict[str, Any]]:
    """KV tokens per GPU of plain replicas and of a pool of all of them, by tensor parallel size."""
    setting = make_setting(model, hardware, 2 * PAGE_SIZE)
    modes = pooled_modes(setting)
    rows = []
    for size in tensor_sizes(model, GPUS):
        replicas = GPUS // size
        sizes = TABLE_SEQS, TABLE_BUDGET
        plain = Candidate(1, size, replicas, model.num_layers, (REPLICATED,), *sizes)
        tokens = {"plain": memory(setting, plain)}
        if replicas > 1:
            tokens["pooled"] = memory(setting, Candidate(replicas, size, 1, 0, modes, *sizes))
        per_gpu = {name: held.kv_tokens / size if held.fits else 0 for name, held in tokens.items()}
        rows.append({"tensor_parallel_size": size, **per_gpu})
    return rows


def validate(path: Path) -> list[dict[str, Any]]:
    """Simulates the jobs of a report of ``bench_offline.py`` and compares their time.

    The configuration is that of the report's command, the pages those of its cache.

    Raises:
        ValueError: The report names no configuration, or a model that cannot be read.
    """
    report = json.loads(path.read_text())
    config, shared = _run_of(report["command"])
    hardware = load_profile(config.hardware if config.hardware != "auto" else _profile_of(report))
    model = ModelConfig.from_pretrained(config.model_path)
    setting = Setting(
        model,
        hardware,
        DTYPE_BYTES[config.dtype],
        config.page_size,
        longest_sequence(config, model),
        config.gpu_memory_utilization,
    )
    policy = make_policy(config, model, hardware)
    candidate = Candidate(
        config.pool_size,
        config.tensor_parallel_size,
        1,
        policy.resident_layers,
        policy.modes,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        was_fetch=policy.was_fetch,
    )
    pages = report["kv_tokens"] // config.pool_size // config.page_size
    spread = config.prefill == "spread"
    rows = []
    for name, measured in report["cases"].items():
        job = _measured_job(name)
        job = simulate(setting, candidate, pages, job, spread=spread, shared_prefix=shared)
        rows.append(
            {
                "case": name,
                "measured_s": measured["wall_s"],
                "simulated_s": job.seconds,
                "ratio": job.seconds / measured["wall_s"],
                "measured_steps": measured.get("steps"),
                "simulated_steps": sum(job.steps.values()),
            }
        )
    return rows


def _measured_job(name: str) -> Lengths:
    """The lengths of a case of ``bench_offline.py``; ``decode N[,TOP_P]`` is N short prompts."""
    if name.startswith("decode "):
        return [DECODE_LENGTHS] * int(name.removeprefix("decode ").partition(",")[0])
    return parse_job(name)


def _run_of(command: str) -> tuple[EngineConfig, SharedPrefix | None]:
    """What a command of ``bench_offline.py`` ran with, and what the prefix cache could find."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--shared-prefix", type=SharedPrefix.parse)
    parser.add_argument("overrides", nargs="*")
    words = shlex.split(command)
    start = next((i for i, word in enumerate(words) if word.endswith("bench_offline.py")), None)
    if start is None:
        raise ValueError(f"command={command!r} is not one of bench_offline.py")
    known, rest = parser.parse_known_args(words[start + 1 :])
    overrides = [word for word in (*known.overrides, *rest) if "=" in word and word[0] != "-"]
    config = load_config(known.config, overrides)
    return config, known.shared_prefix if config.enable_prefix_caching else None


def _profile_of(report: dict[str, Any]) -> str:
    """The profile of the device that a report names."""
    kind = report.get("device") or report["what"].removeprefix("measured on one ").split(",")[0]
    return profile_for(kind, "cpu" if kind == "cpu" else "gpu")


def main(argv: Sequence[str] | None = None) -> None:
    """Simulates what is asked for, prints tables and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=_SHAPES / "qwen2.5_72b")
    parser.add_argument("--hardware", action="append", help="profile; with --grid, several")
    parser.add_argument("--models", action="append", help="with --grid: folders of shapes")
    parser.add_argument("--case", action="append", default=[], metavar="N,IN,OUT")
    parser.add_argument("--grid", action="store_true", help="every workload, GPU and model")
    parser.add_argument("--out", type=Path, help="JSON; an interrupted grid goes on from it")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="PNGs of --out; extra plot")
    parser.add_argument("--docs", type=Path, help="document whose tables --out fills")
    parser.add_argument("--validate", type=Path, metavar="REPORT.json")
    arguments = parser.parse_args(argv)
    if arguments.validate:
        _print_validation(arguments.validate, arguments.out)
    elif arguments.grid:
        gc.disable()  # millions of small tuples and no cycles: looking for those takes a fifth
        report = _new_report()
        if arguments.out.is_file():
            report |= {k: v for k, v in json.loads(arguments.out.read_text()).items() if k in _KEPT}
        names, models = arguments.hardware or HARDWARE, arguments.models or MODELS
        for _ in run_grid(names, models, report):
            _write(arguments.out, report)
        print_tables(report)
    elif arguments.case:
        report = _new_report()
        model = ModelConfig.from_pretrained(arguments.model)
        for name in arguments.hardware or ["h200"]:
            report["profiles"][name] = as_values(load_profile(name))
            jobs = [parse_job(case) for case in arguments.case]
            settings = [make_setting(model, name, max(map(sum, job))) for job in jobs]
            report["nodes"][f"{GPUS} x {name}, {arguments.model.name}"] = {
                "kv_capacity": kv_capacity(model, name),
                "workloads": [compare(s, job) for s, job in zip(settings, jobs, strict=True)],
            }
        print_tables(report)
        if arguments.out:
            _write(arguments.out, report)
    if arguments.figures:
        draw_figures(json.loads(arguments.out.read_text()), arguments.figures)
    if arguments.docs:
        write_tables(arguments.docs, json.loads(arguments.out.read_text()), layer_setting())


_KEPT = ("profiles", "nodes")
"""What a grid that goes on takes from the file."""


def layer_setting() -> Setting:
    """The model and the hardware of the document's table of one layer."""
    model = ModelConfig.from_pretrained(_SHAPES / "qwen2.5_72b")
    return make_setting(model, "h200", 2 * PAGE_SIZE)


def _new_report() -> dict[str, Any]:
    return {
        "what": "simulated; nothing here was measured by this command",
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "notes": [
            f"{GPUS} GPUs, bf16, pages of {PAGE_SIZE}, {UTILIZATION} of memory.",
            "Every configuration is the one that the plan estimates to be best for the workload.",
            "auto and auto_job: what the plan recommends for a long job of the mean lengths, and "
            "for one of as many requests; in close calls it replays jobs of its own, of other "
            "lengths.",
            f"DP x TP that is estimated below {PROMISING} of the best plain one is left out, "
            "unless a pool has as large replicas.",
            f"Grid: requests are {ROUNDS} to {MOST_ROUNDS} times the most sequences that any "
            f"configuration runs at a time; prompts are uniform within {PROMPT_SPREAD:.0%} of "
            f"their mean, outputs within {OUTPUT_SPREAD:.0%}, and evenly spread among any few in a "
            "row.",
            "output_tokens_per_s: from a quarter to three quarters of the output, without ramp and "
            "tail; whole_job_... are with them.",
            "Where prompt and output are longer than the model's own positions, its shapes are "
            "taken all the same.",
        ],
        "profiles": {},
        "nodes": {},
    }


def _write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _print_validation(path: Path, out: Path | None) -> None:
    started = time.perf_counter()
    rows = validate(path)
    print(f"simulated beside measured ({path}):")
    for row in rows:
        print(
            f"{row['case']}: measured {row['measured_s']:.1f} s, simulated "
            f"{row['simulated_s']:.1f} s, ratio {row['ratio']:.3f}; steps {row['measured_steps']} "
            f"and {row['simulated_steps']}"
        )
    print(f"({time.perf_counter() - started:.1f} s)")
    if out:
        _write(out, _new_report() | {"measured": str(path), "cases": rows})


if __name__ == "__main__":
    main()
