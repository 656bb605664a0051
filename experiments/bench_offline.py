r"""Time whole jobs on the engine: dummy weights, random token ids, greedy, fixed output lengths.

    python experiments/bench_offline.py --config experiments/shapes/qwen3_32b.yaml \
        --case 512,1024,256 --case 512,128,1024 --out experiments/results/offline.json

``--case N,IN,OUT`` is N requests of IN prompt and OUT output tokens; ``--case @lens.json`` reads a
list of ``[in, out]`` pairs. Prints, per case, throughput beside the floor for the same work, which
comes from the matrix and copy rates measured in the same run. On a GPU a few steps in the middle of
each case are traced, for the share of time that the GPU waits, between programs and inside them,
and for that of the sampler; ``--decode N`` (repeatable) does the same for steps of N sequences that
all decode, ``--decode N,TOP_P`` where they sample; give ``prefill=first`` and as many
``max_num_seqs`` with it. The clock stands still while a trace is written. With ``--shared-prefix
TOKENS[,REQUESTS]`` so many requests, or all, begin alike; give ``enable_prefix_caching=true`` too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count
from math import ceil, prod
from pathlib import Path

import numpy as np
from gpu_trace import read_activity
from report import Report

from sidp_jax.config import load_config
from sidp_jax.engine import Engine
from sidp_jax.replay import SharedPrefix
from sidp_jax.request import SamplingParams
from sidp_jax.startup import resolve_platform, start_jax

Lengths = list[tuple[int, int]]
_DECODE_STEPS = 20
# Otherwise XLA launches kernel by kernel while a profiler looks on, and a trace shows other gaps.
_TRACED_AS_RUN = "--xla_enable_command_buffers_during_profiling=true"


@dataclass(frozen=True)
class Ceilings:
    """What this machine reaches, measured in this run.

    Attributes:
        matmul_flops: FLOP/s of a large matrix product in the model's type.
        copy_bandwidth: Bytes/s, read plus written, of a large copy on the device.
    """

    matmul_flops: float
    copy_bandwidth: float


def measure_ceilings(dtype: str, size: int) -> Ceilings:
    """Times ``size`` x ``size`` matrix products and a copy of ``64 * size * size`` values."""
    import jax
    import jax.numpy as jnp

    def best(function, *arguments) -> float:
        jax.block_until_ready(function(*arguments))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times.append(time.perf_counter() - start)
        return min(times)

    x, y = jax.random.normal(jax.random.key(0), (2, size, size), jnp.dtype(dtype))
    y = y / size**0.5  # so that the products of products keep their size

    def products(x: jax.Array, y: jax.Array) -> jax.Array:
        for _ in range(8):
            x = x @ y
        return x

    seconds = best(jax.jit(products), x, y) / 8
    block = jnp.ones((64, size, size), jnp.dtype(dtype))
    copy = best(jax.jit(jnp.copy), block)
    return Ceilings(2 * size**3 / seconds, 2 * block.nbytes / copy)


def parse_case(text: str) -> Lengths:
    """The (prompt, output) lengths of a case.

    Raises:
        ValueError: The text is neither ``N,IN,OUT`` nor ``@file``.
    """
    if text.startswith("@"):
        return [(int(i), int(o)) for i, o in json.loads(Path(text[1:]).read_text())]
    count, prompt, output = (int(part) for part in text.split(","))
    return [(prompt, output)] * count


def floor_seconds(engine: Engine, lengths: Lengths, ceilings: Ceilings) -> float:
    """The least time for a job: every byte moved and every product done just once.

    Dense work is bound by its FLOPs, or by reading the weights once for each of the fewest
    steps that the concurrency allows; attention by reading K and V for every output token, and
    by the products of the prompts. The devices share the work evenly, and nothing crosses a link.
    """
    model, shapes = engine.model_config, engine.runner.shapes
    from sidp_jax.models.decoder import layer_spec

    layer = sum(prod(s.shape) for n, s in layer_spec(model).items() if n.endswith("kernel"))
    dense = model.num_layers * layer
    head = model.vocab_size * model.hidden_size
    tokens = sum(i + o for i, o in lengths)
    outputs = sum(o for _, o in lengths)
    flops = 2 * dense * tokens + 2 * head * outputs
    item = shapes.kv_dtype.itemsize
    kv_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * item
    concurrency = min(
        engine.max_concurrency, engine.kv_tokens / np.mean([i + o for i, o in lengths])
    )
    steps = max(max(o for _, o in lengths), ceil(outputs / concurrency))
    mesh = engine.runner.program.mesh
    weights = steps * (dense + head) * item / engine.runner.program.tensor_size
    kv_read = sum(o * i + o * o / 2 for i, o in lengths) * kv_token
    attention = sum(i * i for i, _ in lengths) * 2 * model.num_layers
    attention *= model.num_heads * model.head_dim
    return (
        max(flops / mesh.size / ceilings.matmul_flops, weights / ceilings.copy_bandwidth)
        + kv_read / mesh.size / ceilings.copy_bandwidth
        + attention / mesh.size / ceilings.matmul_flops
    )


class Trace:
    """A few steps of a job to trace, and the time that as many take just before, untraced.

    The two lengths of a step tell how far the profiler disturbs it.

    Args:
        folder: Where the trace goes.
        first: Number of the first step.
        steps: How many.
    """

    def __init__(self, folder: Path, first: int, steps: int = _DECODE_STEPS):
        self.folder, self.first, self.steps = folder, max(first, steps), steps
        self._timed_from = self._step_s = 0.0

    def before_step(self, number: int) -> float:
        """Starts or ends the trace where it is due; seconds that this took."""
        import jax

        start = time.perf_counter()
        if number == self.first - self.steps:
            self._timed_from = start
        elif number == self.first:
            self._step_s = (start - self._timed_from) / self.steps
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = options.host_tracer_level = 0
            options.enable_hlo_proto = False
            jax.profiler.start_trace(self.folder, profiler_options=options)
        elif number == self.first + self.steps:
            jax.profiler.stop_trace()
        return time.perf_counter() - start

    def figures(self) -> dict[str, float]:
        """Length of a step without the trace, and what the trace shows; see ``gpu_trace``."""
        figures = {"step_ms": self._step_s * 1e3}
        try:
            activity = read_activity(self.folder)
            print(activity.table())
            figures["gpu_idle_share"] = activity.idle_share
            figures |= activity.steps().figures()
        except ValueError as error:  # the job is done, and its other figures hold
            print(f"not all that a trace should tell: {error}")
        return figures


def run_case(
    engine: Engine,
    lengths: Lengths,
    seed: int,
    trace: Trace | None = None,
    top_p: float | None = None,
    shared_prefix: SharedPrefix | None = None,
) -> dict[str, float]:
    """Runs one job to its end.

    Args:
        engine: Idle, warmed up.
        lengths: Prompt and output tokens of each request.
        seed: Seed of the prompts' token ids.
        trace: Steps to trace.
        top_p: Sample at temperature 1 with this top-p; greedy if not given.
        shared_prefix: What prompts begin with alike.
    """
    sampling = {"temperature": 0} if top_p is None else {"temperature": 1, "top_p": top_p}
    rng = np.random.default_rng(seed)
    vocab = engine.model_config.vocab_size
    prompts = [rng.integers(0, vocab, i).tolist() for i, _ in lengths]
    if shared_prefix is not None:
        first = 0
        for index, prompt in enumerate(prompts):
            if shared_prefix.group(index) != shared_prefix.group(first):
                first = index
            alike = min(shared_prefix.tokens, len(prompt), len(prompts[first]))
            prompt[:alike] = prompts[first][:alike]
    cached = engine.scheduler.num_cached_tokens
    compilations, before = engine.compilations, engine.stats.steps.copy()
    switches = len(engine.stats.switches)
    preemptions = engine.scheduler.num_preemptions
    start = time.perf_counter()
    for index, (prompt, (_, output)) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(**sampling, max_tokens=output, ignore_eos=True)
        engine.add_request(f"{seed}-{index}", prompt, params)
    produced, paused = 0, 0.0
    for number in count():
        if not engine.has_work:
            break
        if trace is not None:
            paused += trace.before_step(number)
        produced += sum(len(o.outputs[0].token_ids) for o in engine.step())
    wall = time.perf_counter() - start - paused
    prompt_tokens = sum(i for i, _ in lengths)
    assert produced == sum(o for _, o in lengths), "every request has its length"
    modes = engine.stats.steps - before
    steps = sum(modes.values())
    return {
        "wall_s": wall,
        "requests_per_s": len(lengths) / wall,
        "prompt_tokens_per_s": prompt_tokens / wall,
        "output_tokens_per_s": produced / wall,
        "total_tokens_per_s": (prompt_tokens + produced) / wall,
        "steps": steps,
        "steps_by_mode": dict(modes),
        "mode_switches": len(engine.stats.switches) - switches,
        "mean_tokens_per_step": (prompt_tokens + produced) / steps,
        "preemptions": engine.scheduler.num_preemptions - preemptions,
        "cached_tokens": engine.scheduler.num_cached_tokens - cached,
        "compilations": engine.compilations - compilations,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all cases, prints a line for each and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--case", action="append", default=[], metavar="N,IN,OUT")
    parser.add_argument("--decode", action="append", default=[], metavar="N[,TOP_P]")
    parser.add_argument("--shared-prefix", metavar="TOKENS[,REQUESTS]")
    parser.add_argument("--trace", type=Path, help="folder for traces of a GPU")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args(argv)
    cases = {text: parse_case(text) for text in arguments.case}
    # Here rather than in the parser, which would leave out what a bad one must be.
    shared = arguments.shared_prefix and SharedPrefix.parse(arguments.shared_prefix)
    decode = [(16, 4 * _DECODE_STEPS)]
    cases |= {f"decode {text}": decode * int(text.split(",")[0]) for text in arguments.decode}
    if not cases:
        parser.error("nothing to do: give --case or --decode")
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("sidp_jax").setLevel(logging.INFO)
    config = load_config(arguments.config, ["load_format=dummy", *arguments.overrides])
    if config.num_pools > 1:
        parser.error(f"num_pools={config.num_pools} must be 1: one pool is measured at a time")
    if arguments.trace is not None and resolve_platform(config.platform) == "gpu":
        # First, so that the same flag from the user beats it.
        os.environ["XLA_FLAGS"] = f"{_TRACED_AS_RUN} {os.environ.get('XLA_FLAGS', '')}".strip()
    start_jax(config)
    import jax

    from sidp_jax.build import build_engine

    device = jax.devices()[0]
    ceilings = measure_ceilings(config.dtype, 8192 if device.platform != "cpu" else 512)
    start = time.perf_counter()
    engine = build_engine(config)
    ready = time.perf_counter() - start
    longest = max(i + o for lengths in cases.values() for i, o in lengths)
    if longest > engine.max_model_len:
        parser.error(f"a case has {longest} tokens a request; set max_model_len={longest}")
    run_case(engine, [(16, 4)] * min(64, engine.max_concurrency), seed=0)
    report = Report(
        f"measured on {device.device_kind}, pool of {config.pool_size}",
        arguments.out,
        ceilings=asdict(ceilings),
        model=config.model,
        ready_s=ready,
        kv_tokens=engine.kv_tokens,
        cases={},
    )
    for seed, (name, lengths) in enumerate(cases.items(), 1):
        trace, top_p = None, None
        if name.startswith("decode") and "," in name:
            top_p = float(name.split(",")[1])
        if arguments.trace is not None:
            folder = arguments.trace / name.replace(",", "-").replace(" ", "-").lstrip("@")
            trace = Trace(folder, max(output for _, output in lengths) // 2)
        figures = run_case(engine, lengths, seed, trace, top_p, shared)
        if trace is not None:
            figures |= trace.figures()
        if shared is None:  # it counts every prompt in full
            floor = floor_seconds(engine, lengths, ceilings)
            figures |= {"floor_s": floor, "ratio_to_floor": figures["wall_s"] / floor}
        figures["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
        report.content["cases"][name] = figures
        report.write()
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in figures.items()}
        print(name, json.dumps(shown))
    print(f"ready in {ready:.1f} s, {engine.kv_tokens:,} KV tokens, ceilings {ceilings}")


if __name__ == "__main__":
    main()
