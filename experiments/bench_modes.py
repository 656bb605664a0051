"""Time one step in every mode on real GPUs: what pooling costs per layer over a real link.

    python experiments/bench_modes.py --model experiments/shapes/qwen2.5_72b --layers 8 \
        --pool-size 2 --tokens 16,256,1024,2048 --out experiments/results/modes.json

Every replica prefills one sequence of so many tokens, with dummy weights. Prints, for each number
of tokens, milliseconds per step and mode, the ratio to ``replicated`` (every layer local) with
the same tokens, and whether the sampled tokens are equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import logging
import platform
import statistics
import sys
import time
from itertools import product
from math import ceil, prod
from pathlib import Path

import numpy as np

from sidp_jax.batch import BatchLayout, build_batch
from sidp_jax.config import EngineConfig
from sidp_jax.models.config import ModelConfig
from sidp_jax.request import SamplingParams, Sequence
from sidp_jax.scheduler import Scheduler, SchedulerConfig
from sidp_jax.startup import start_jax

PAGE_SIZE, ROWS = 64, 8
# Modes that share one form of the weights.
GROUPS = (("replicated",), ("was", "cas", "cas_staggered"))


def prefill_step(pool_size: int, tokens: int, layout: BatchLayout) -> np.ndarray:
    """The packed batch of a step in which every replica prefills one random prompt."""
    pages = ceil(tokens / PAGE_SIZE) + 1
    longest = tokens + 1
    config = SchedulerConfig(pool_size, ROWS, layout.tokens, longest, PAGE_SIZE, pages)
    scheduler = Scheduler(config)
    rng = np.random.default_rng(tokens)
    for index in range(pool_size):
        prompt = rng.integers(0, 1000, tokens).tolist()
        params = SamplingParams(temperature=0, max_tokens=1)
        scheduler.add(Sequence(index, str(index), 0, prompt, params, 0, 1))
    return build_batch(scheduler.schedule(), layout, PAGE_SIZE)


def median_seconds(launch, repeats: int = 15) -> float:
    """Median of single steps, each waited for."""
    import jax

    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        jax.block_until_ready(launch())
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main() -> None:
    """Runs every mode at every size and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--pool-size", type=int, required=True)
    parser.add_argument("--tokens", default="16,256,1024,2048")
    parser.add_argument("--attention", default="mosaic")
    parser.add_argument("--layer-loop", default="unrolled")
    parser.add_argument("--platform", default="gpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("sidp_jax").setLevel(logging.INFO)
    config = EngineConfig(
        model=arguments.model, pool_size=arguments.pool_size, platform=arguments.platform
    )
    start_jax(config)
    import jax
    import jax.numpy as jnp

    from sidp_jax.checkpoint import load_weights
    from sidp_jax.mesh import make_mesh
    from sidp_jax.models.decoder import layer_spec
    from sidp_jax.pool import PoolLayout
    from sidp_jax.runner import Runner, RunnerShapes
    from sidp_jax.step import StepProgram

    model = dataclasses.replace(
        ModelConfig.from_pretrained(arguments.model), num_layers=arguments.layers
    )
    mesh = make_mesh(arguments.pool_size)
    dtype = jnp.dtype(arguments.dtype)
    sizes = sorted(int(size) for size in arguments.tokens.split(","))
    pages = ceil(sizes[-1] / PAGE_SIZE) + 1
    layouts = {size: BatchLayout(size, ROWS, pages, 17) for size in sizes}
    batches = {
        size: prefill_step(arguments.pool_size, size, layout) for size, layout in layouts.items()
    }
    shapes = RunnerShapes(tuple(layouts.values()), ROWS, PAGE_SIZE, pages, dtype)
    seconds: dict[int, dict[str, float]] = {size: {} for size in sizes}
    tokens: dict[int, dict[str, list[int]]] = {size: {} for size in sizes}
    for modes in GROUPS:
        resident = arguments.layers if modes == ("replicated",) else 0
        layout = PoolLayout(arguments.layers, arguments.pool_size, resident)
        program = StepProgram(model, layout, mesh, arguments.attention)
        weights = load_weights(
            None,
            model,
            layout,
            mesh,
            dtype=dtype,
            layer_loop=arguments.layer_loop,
            load_format="dummy",
        )
        steps = tuple(product(modes, shapes.batches))
        runner = Runner(program, weights, shapes, steps)
        runner.warm_up()
        for size in sizes:
            for mode in modes:
                launch = lambda: runner.launch(mode, "greedy", layouts[size], batches[size])  # noqa: B023, E731
                seconds[size][mode] = median_seconds(launch)
                tokens[size][mode] = np.asarray(launch().tokens)[:, 0].tolist()
    layer_bytes = dtype.itemsize * sum(prod(s.shape) for s in layer_spec(model).values())
    device = jax.devices()[0]
    report = {
        "what": f"measured on {arguments.pool_size} x {device.device_kind}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "layer_bytes": layer_bytes,
        "layers": arguments.layers,
        "steps": [],
    }
    for size in sizes:
        base = seconds[size]["replicated"]
        for mode, step in seconds[size].items():
            row = {
                "tokens_per_replica": size,
                "mode": mode,
                "step_ms": step * 1e3,
                "ratio_to_replicated": step / base,
                "same_tokens_as_replicated": tokens[size][mode] == tokens[size]["replicated"],
                "layer_bytes_per_second": layer_bytes * arguments.layers / step,
            }
            report["steps"].append(row)
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
