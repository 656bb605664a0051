"""Compiles steps for GPUs that are not there and prints what they say, a line of JSON for each.

A process of its own: the tests' jax is set up for speed on the CPU. Argument: the cases, as JSON.
"""

import json
import sys
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

from sidp_jax.aot import compile_forward
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import ATTENTION, FEED_FORWARD, layer_spec
from sidp_jax.timeline import Timeline, read_timeline

SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"


def replay(timeline: Timeline, kernels: list[int], compute: float, attention: float) -> float:
    """Time of a layer if the link and the GEMMs ran at fixed rates; a fetch of a layer takes 1.

    The link runs fetches one after another, as they are issued; a GEMM takes as its weights' share
    of ``compute``; attention follows the first GEMM of a layer; nothing else takes time.
    """
    layer_bytes = sum(kernels)
    now = link = 0.0
    ends, begins, gemms = {}, [], 0
    for layer, event in zip(timeline.layers, timeline.events, strict=True):
        if event.collective == "broadcast" and event.kind == "start":
            link = max(link, now) + event.nbytes / layer_bytes
            ends[event.name] = link
        elif event.collective == "broadcast" and event.kind == "done":
            now = max(now, ends[event.name])
        elif event.kind == "gemm" and layer >= 0:
            if layer == len(begins):
                begins.append(now)
                gemms = 0
            if gemms < len(kernels):  # behind the last layer's there is the head
                now += compute * kernels[gemms] / layer_bytes + (attention if gemms == 0 else 0)
            gemms += 1
    return (begins[-1] - begins[2]) / (len(begins) - 3)


def main() -> None:
    for shape, layers, arguments in json.loads(sys.argv[1]):
        config = replace(ModelConfig.from_pretrained(SHAPES / shape), num_layers=layers)
        compiled = compile_forward(config, **arguments)
        memory = compiled.memory_analysis()
        programs = getattr(compiled, "parts", {"": compiled})
        timelines = {name: read_timeline(part.as_text()) for name, part in programs.items()}
        timeline = max(timelines.values(), key=lambda each: len(each.of("gemm")))
        fetches = [
            {
                "layer": fetch.layer,
                "nbytes": fetch.start.nbytes,
                "beneath": [layer for layer, _ in fetch.beneath],
            }
            for fetch in timeline.fetches
        ]
        received = Counter()
        for event in (event for each in timelines.values() for event in each.events):
            received[event.collective] += event.received * event.times
        spec = layer_spec(config)
        size = arguments["tensor_size"]
        kernels = [2 * prod(spec[name].shape) // size for name in (*ATTENTION, *FEED_FORWARD)]
        replays = [
            (compute, attention, replay(timeline, kernels, compute, attention))
            for compute in (0.1, 0.5, 0.8, 1.0, 1.25, 2.0)
            for attention in (0.0, 0.3, 0.5)
            if timeline.fetches and arguments["mode"] == "was"
        ]
        report = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "received": received,
            "synchronous": [
                event.nbytes
                for event in timeline.of("collective")
                if event.collective == "broadcast"
            ],
            "fetches": fetches,
            "replays": replays,
            "copies": [
                (copy.shape, copy.nbytes)
                for each in timelines.values()
                for copy in each.copies(1 << 20)
            ],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
