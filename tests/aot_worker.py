"""Compiles steps for GPUs that are not there and prints what they say, a line of JSON for each.

A process of its own: the tests' jax is set up for speed on the CPU. Argument: the cases, as JSON.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from sidp_jax.aot import compile_forward
from sidp_jax.models.config import ModelConfig
from sidp_jax.timeline import read_timeline

SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"


def main() -> None:
    for shape, layers, arguments in json.loads(sys.argv[1]):
        config = replace(ModelConfig.from_pretrained(SHAPES / shape), num_layers=layers)
        compiled = compile_forward(config, **arguments)
        memory = compiled.memory_analysis()
        timeline = read_timeline(compiled.as_text())
        fetches = [
            {
                "layer": fetch.layer,
                "nbytes": fetch.start.nbytes,
                "beneath": [layer for layer, _ in fetch.beneath],
            }
            for fetch in timeline.fetches
        ]
        report = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "received": timeline.received_bytes(),
            "synchronous": [
                event.nbytes
                for event in timeline.of("collective")
                if event.collective == "broadcast"
            ],
            "fetches": fetches,
            "copies": [(copy.shape, copy.nbytes) for copy in timeline.copies(1 << 20)],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
