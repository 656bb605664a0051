r"""Time the loop over the layers without attention, in both of its forms, beside its ceilings.

    PYTHONPATH=. python experiments/bench_layers.py --model experiments/shapes/qwen2.5_72b \
        --out experiments/results/layers_h200.json

The layers' real code, as ``replicated`` runs it, with attention left out: its result is the
queries, and there is no cache. A ceiling is the longer of reading a layer's parameters at the
bandwidth of a copy, and of its products at the rate of a large one; both are measured in the same
run. The layers are random, as ``load_format: dummy`` draws them, and too many for a cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from bench_offline import Ceilings, measure_ceilings
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from one_step import compile_all
from report import Report

from sidp_jax.checkpoint import load_weights
from sidp_jax.config import EngineConfig
from sidp_jax.kv_cache import KVCache
from sidp_jax.measure import TOKENS, seconds_of
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.modes import replicated
from sidp_jax.modes.loop import LayerContext
from sidp_jax.pool import PoolLayout
from sidp_jax.startup import start_jax
from sidp_jax.step import StepProgram
from sidp_jax.weights import Weights, weights_spec

LIMITS = {"unrolled": 1.10, "scan": 1.25}
"""The aim for each form of the loop, as a ratio to the ceiling; GPUs take ``unrolled``."""


@dataclass(frozen=True)
class Loop:
    """The layers of a model on one device, in one form.

    Attributes:
        model: The model, with as many layers as are timed.
        mesh: The device.
        form: ``unrolled`` or ``scan``.
        dtype: Type of weights and activations.
    """

    model: ModelConfig
    mesh: Mesh
    form: str
    dtype: jnp.dtype

    @property
    def layout(self) -> PoolLayout:
        """Every layer is here."""
        return PoolLayout(self.model.num_layers, 1, self.model.num_layers)

    def weights(self, folder: Path) -> Weights:
        """Random weights on the device."""
        return load_weights(
            folder,
            self.model,
            self.layout,
            self.mesh,
            dtype=self.dtype,
            layer_loop=self.form,
            load_format="dummy",
            seed=0,
        )

    def inputs(self, tokens: int) -> tuple[jax.Array, jax.Array]:
        """Random activations ``[tokens, hidden]``, and positions ``[tokens]``."""
        here = NamedSharding(self.mesh, PartitionSpec())
        shape = (tokens, self.model.hidden_size)
        x = jax.random.normal(jax.random.key(tokens), shape, self.dtype)
        return jax.device_put((x, jnp.arange(tokens, dtype=jnp.int32)), here)

    def lower(self, tokens: int) -> jax.stages.Lowered:
        """The loop over all layers, for a number of tokens."""
        here = NamedSharding(self.mesh, PartitionSpec())
        x, positions = (
            jax.ShapeDtypeStruct(shape, dtype, sharding=here)
            for shape, dtype in (
                ((tokens, self.model.hidden_size), self.dtype),
                ((tokens,), jnp.int32),
            )
        )
        weights = weights_spec(
            self.model, self.layout, self.mesh, layer_loop=self.form, dtype=self.dtype
        )
        return jax.jit(self._run).lower(weights, x, positions)

    def _run(self, weights: Weights, x: jax.Array, positions: jax.Array) -> jax.Array:
        def attend(q, k, v, kv, layer, active=None):
            return q, kv

        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        program = StepProgram(
            self.model, self.layout, self.mesh, "reference" if on_cpu else "mosaic"
        )
        context = LayerContext(
            self.model,
            self.layout,
            program.positions(positions, self.dtype),
            attend,
            program.platform,
            program.kernels,
        )
        nothing = KVCache(jnp.zeros(()), jnp.zeros(()))
        return replicated.run_layers(context, weights, x, nothing)[0]


def ceiling_seconds(model: ModelConfig, tokens: int, itemsize: int, ceilings: Ceilings) -> float:
    """The least time for one layer without attention: its parameters read, its products done."""
    spec = layer_spec(model)
    values = sum(prod(param.shape) for param in spec.values())
    kernels = sum(prod(param.shape) for name, param in spec.items() if name.endswith("kernel"))
    reading = values * itemsize / ceilings.copy_bandwidth
    return max(reading, 2 * kernels * tokens / ceilings.matmul_flops)


def time_form(
    loop: Loop, folder: Path, tokens: Sequence[int], ceilings: Ceilings, report: Report
) -> None:
    """Times one form of the loop and adds a row for each number of tokens."""
    weights = loop.weights(folder)
    lowerings = {count: lambda count=count: loop.lower(count) for count in tokens}
    # All before the first is timed: the compiler tries products out on the same device.
    for count, program, compile_s in list(compile_all(lowerings)):
        with report.errors(form=loop.form, tokens=count):
            if isinstance(program, Exception):
                raise program
            seconds = seconds_of(program, weights, *loop.inputs(count)) / loop.model.num_layers
            ceiling = ceiling_seconds(loop.model, count, loop.dtype.itemsize, ceilings)
            row = {"form": loop.form, "tokens": count, "layer_us": seconds * 1e6}
            row |= {"ceiling_us": ceiling * 1e6, "ratio": seconds / ceiling}
            row |= {"limit": LIMITS[loop.form], "met": seconds / ceiling <= LIMITS[loop.form]}
            temporaries = program.memory_analysis().temp_size_in_bytes
            row |= {"compile_s": compile_s, "temporary_bytes": temporaries}
            report.add("layers", row)
    for leaf in jax.tree.leaves(weights):
        leaf.delete()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Times every form and returns the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--forms", default=",".join(LIMITS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--platform", default="auto", choices=("auto", "cpu", "gpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    forms = options.forms.split(",")
    if unknown := set(forms) - set(LIMITS):
        parser.error(f"--forms: unknown {', '.join(sorted(unknown))}; known: {', '.join(LIMITS)}")
    start_jax(
        EngineConfig(
            model=str(options.model),
            load_format="dummy",
            dtype=options.dtype,
            platform=options.platform,
        )
    )
    model = replace(ModelConfig.from_pretrained(options.model), num_layers=options.layers)
    mesh = make_mesh(1)
    device = mesh.devices.flat[0]
    ceilings = measure_ceilings(options.dtype, 8192 if device.platform != "cpu" else 512)
    report = Report(
        f"layers without attention, measured on {device.device_kind}",
        options.out,
        model=options.model.name,
        num_layers=options.layers,
        ceilings=asdict(ceilings),
    )
    for form in forms:
        loop = Loop(model, mesh, form, jnp.dtype(options.dtype))
        time_form(
            loop, options.model, [int(n) for n in options.tokens.split(",")], ceilings, report
        )
    rows = report.content.get("layers", [])
    for row in rows:
        print(
            f"{row['form']:9s} {row['tokens']:6d} tokens {row['layer_us']:10.1f} us, ceiling "
            f"{row['ceiling_us']:10.1f} us, ratio {row['ratio']:.3f}, aim {row['limit']:.2f}"
            f"{'' if row['met'] else '  MISSED'}"
        )
    return report.content


if __name__ == "__main__":
    main()
