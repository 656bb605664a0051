r"""Check and time products with a row chosen on the device, beside XLA's and the ceilings.

    python experiments/bench_matmul.py --model experiments/shapes/qwen2.5_72b --out results.json \
        [--tokens 16,256] [--sweep]

The four products of a model's layers. Four rows of the weights take turns, together larger than the
L2 cache; activations are random and differ from call to call, and each call waits for the one
before: otherwise XLA makes one product of all that share a row. Memory is filled with NaN before
each check, and every figure's result is compared with a float32 reference on a sample of its
outputs. Device time, of calls queued in one program. The floor of a product is the longer of
reading its weights, at the bandwidth of a copy, and of its operations, at the rate of a large
product, both measured in the same run. Prints a compact table last.
"""

import argparse
import dataclasses
import faulthandler
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import ceilings, poison, relative_error, seconds_of
from jax import lax
from report import Report

from sidp_jax.kernels.indexed_matmul import indexed_matmul
from sidp_jax.kernels.indexed_matmul_mosaic import TuningConfig, choose, group_of
from sidp_jax.models.config import ModelConfig

TOKENS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CALLS = 8  # of one timed program
ROWS = 4  # of the weights, in pairs
HANGS = 60  # seconds after which a measurement counts as hanging
LIMIT = 1e-2  # relative error in bfloat16


def sweep_configs(tokens: int, outputs: int, inputs: int) -> Iterator[TuningConfig]:
    """Configs worth a measurement: what the heuristic chooses, and what it may be wrong about."""
    yield choose(tokens, outputs, inputs)
    # Tiles such that one or two rounds of all multiprocessors take them.
    even = next(n for n in range(16, 512, 16) if -(-outputs // n) <= 132)
    rounds = 1
    while even > 256:
        rounds += 1
        even = next(n for n in range(16, 512, 16) if -(-outputs // n) <= 132 * rounds)

    def make(block_tokens, block_outputs, block_inputs=64, *, cluster=1, share="inputs", **rest):
        group = group_of(tokens, block_tokens, cluster, share)
        shared = {"cluster": cluster, "share": share, "group_tokens": group}
        return TuningConfig(block_tokens, block_outputs, block_inputs, **shared, **rest)

    if tokens <= 64:
        for block_inputs in (64, 128, 256):
            yield make(64, min(even, 128), block_inputs)
        yield make(64, min(2 * even, 256), 128 if even < 64 else 64, splits=2)
        if tokens == 64:
            yield make(64, min(even, 128), 128, cluster=2)
            yield make(64, min(2 * even, 256), splits=2, cluster=2)
    elif tokens <= 128:
        yield make(128, min(even, 256), cluster=2)
        yield make(128, min(2 * even, 256), splits=2)
        yield make(128, min(2 * even, 256), splits=2, cluster=2)
        yield make(128, 256, splits=4, cluster=2)
    else:
        yield make(128, 256)
        yield make(128, 256, cluster=2, share="weights")
        yield make(128, 256, cluster=2, share="inputs")
        yield make(256, 128)
        yield make(256, 128, cluster=2, share="inputs")
        yield make(128, 192, cluster=2, share="weights")
        yield make(128, 224, cluster=2, share="weights")
        if tokens == 256:
            yield make(128, min(2 * even, 256), cluster=2, share="weights")
            yield make(128, 256, splits=2, cluster=2, share="weights")
            yield make(128, 128, cluster=2, share="weights")
            yield make(256, min(even, 128), cluster=2)


def row_of(call: int) -> int:
    """The row of the weights that a call takes: pairs take turns, then the rows of each."""
    return 2 * (call % 2) + call // 2 % 2


class Product:
    """One projection: pairs of rows of weights in either form, and activations for every call."""

    def __init__(self, tokens: int, weights):
        self.tokens, self.weights = tokens, weights
        self.outputs, self.inputs = weights[0][0].shape
        shape = (tokens, self.inputs)
        keys = jax.random.split(jax.random.key(time.time_ns() % 2**31), CALLS)
        make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
        self.x = [make(key) for key in keys]

    def floor(self, ceiling: dict[str, float]) -> float:
        """Seconds that this machine needs at least."""
        weight_bytes = 2 * self.outputs * self.inputs
        flops = 2 * self.tokens * self.outputs * self.inputs
        return max(weight_bytes / (ceiling["TB/s"] * 1e12), flops / (ceiling["TFLOP/s"] * 1e12))

    def measure(self, multiply) -> tuple[float, float]:
        """Seconds of one call of `multiply(x, pair, row, number)`, and its relative error."""

        @jax.jit
        def program(x, weights, rows):
            out = []
            for i in range(CALLS):
                after, *_ = lax.optimization_barrier((x[i], *out[-1:]))
                pair, row = divmod(row_of(i), 2)
                out.append(multiply(after, weights[pair], rows[i], row))
            return out

        # Scalars of their own: taking them from a vector would be a kernel before each call.
        rows = [jnp.int32(row_of(i) % 2) for i in range(CALLS)]
        poison(1.0)
        out = program(self.x, self.weights, rows)
        error = max(self.sample_error(out[i], i) for i in (0, CALLS - 1))
        del out
        inner = 4 if self.tokens <= 1024 else 2
        return seconds_of(program, self.x, self.weights, rows, inner=inner) / CALLS, error

    def sample_error(self, out, call: int) -> float:
        """Relative error of some outputs of all tokens, edges included."""
        edges = (np.arange(16), np.arange(self.outputs - 16, self.outputs))
        columns = np.unique(np.concatenate([*edges, np.arange(7, self.outputs, 61)]))
        kernel = self.weights[row_of(call) // 2][row_of(call) % 2]
        expected = _wide_product(self.x[call], kernel[columns])
        return relative_error(out[:, columns].astype(jnp.float32), expected)


@jax.jit
def _wide_product(x, kernel):
    dot = partial(jnp.dot, precision=lax.Precision.HIGHEST)
    return dot(x.astype(jnp.float32), kernel.astype(jnp.float32).T)


def xla(x, pair, row, number: int):
    """XLA's product (cuBLAS or a kernel of its own) with an array known to the compiler."""
    return lax.dot_general(x, pair[number], (((1,), (1,)), ((), ())))


def bench(report: dict, name: str, tokens: int, weights, configs, forms) -> None:
    """Measure one projection with one number of tokens."""
    product = Product(tokens, weights)
    floor = product.floor(report["ceilings"])

    def add(kind: str, multiply, config: TuningConfig | None = None) -> None:
        # A kernel that hangs must not take the machine's time with it.
        faulthandler.dump_traceback_later(HANGS, exit=True)
        if kind == "stacked":
            product.weights = [jnp.stack(pair) for pair in weights]
        try:
            seconds, error = product.measure(multiply)
        except Exception as failure:  # one config must not end a sweep
            print(f"FAILED {name} {tokens} {kind} {config}: {failure}"[:600], flush=True)
            report["failures"].append([name, tokens, kind, str(config), str(failure)[:2000]])
            return
        finally:
            faulthandler.cancel_dump_traceback_later()
            product.weights = weights
        row = {"projection": name, "tokens": tokens, "kind": kind, "us": seconds * 1e6}
        row |= {"floor_us": floor * 1e6, "ratio": seconds / floor, "error": error}
        row["config"] = None if config is None else dataclasses.asdict(config)
        row["chosen"] = config == choose(tokens, product.outputs, product.inputs)
        report["matmul"].append(row)
        mark = "" if error < LIMIT else "  BAD"
        print(
            f"{name:8s} {tokens:5d} {kind:8s} {row['us']:9.1f} us  x{row['ratio']:.3f} of floor  "
            f"error {error:.1e}  {describe(config)}{mark}",
            flush=True,
        )

    add("XLA", xla)
    for config in configs:

        def ours(x, pair, row, number, config=config):
            return indexed_matmul(x, pair, row, implementation="mosaic", tuning=config)

        for form in forms:
            add(form, ours, config)


def describe(config: TuningConfig | None) -> str:
    """A config in a few characters."""
    if config is None:
        return ""
    c = config
    shared = f" {c.cluster} share {c.share}" if c.cluster > 1 else ""
    split = f" split {c.splits}" if c.splits > 1 else ""
    return f"{c.block_tokens}x{c.block_outputs}x{c.block_inputs} deep {c.depth}{split}{shared}"


def table(report: dict) -> str:
    """The ratios to the floor: of the chosen config, of the best one, and of XLA."""
    names = list(dict.fromkeys(row["projection"] for row in report["matmul"]))
    lines = ["tokens  " + "".join(f"{name:>28s}" for name in names)]
    lines.append("        " + "       chosen   best     XLA" * len(names))
    for tokens in dict.fromkeys(row["tokens"] for row in report["matmul"]):
        line = f"{tokens:6d}  "
        for name in names:
            rows = [
                row
                for row in report["matmul"]
                if (row["tokens"], row["projection"]) == (tokens, name) and row["error"] < LIMIT
            ]
            ours = [row["ratio"] for row in rows if row["kind"] != "XLA"]
            chosen = [row["ratio"] for row in rows if row["chosen"]]
            other = [row["ratio"] for row in rows if row["kind"] == "XLA"]
            cells = [min(found, default=float("nan")) for found in (chosen, ours, other)]
            line += "      " + "".join(f"{cell:7.3f}" for cell in cells) + " "
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """Run what was asked for and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--model", type=Path, required=True, help="folder with config.json")
    parser.add_argument("--only", help="some of the projections, with commas")
    parser.add_argument("--forms", default="tuple", help="of the weights: tuple, stacked")
    parser.add_argument("--sweep", action="store_true", help="several configs of each product")
    parser.add_argument("--seconds", type=float, default=220, help="start nothing after so many")
    args = parser.parse_args()
    started = time.monotonic()
    written = Report(
        f"measured on one {jax.devices()[0].device_kind}",
        args.out,
        model=args.model.name,
        ceilings=ceilings(),
        matmul=[],
        failures=[],
    )
    report = written.content
    shapes = ModelConfig.from_pretrained(args.model).layer_products()
    for name in args.only.split(",") if args.only else shapes:
        make = jax.jit(lambda key, s=shapes[name]: jax.random.normal(key, s, jnp.bfloat16))
        rows = [make(key) for key in jax.random.split(jax.random.key(3), ROWS)]
        weights = [tuple(rows[i : i + 2]) for i in range(0, ROWS, 2)]
        for tokens in map(int, args.tokens.split(",")):
            if time.monotonic() - started > args.seconds:
                print(f"left out for lack of time: {name} {tokens}", flush=True)
                continue
            shape = (tokens, *shapes[name])
            configs = sweep_configs(*shape) if args.sweep else [choose(*shape)]
            bench(report, name, tokens, weights, dict.fromkeys(configs), args.forms.split(","))
            written.write()
    print(table(report))


if __name__ == "__main__":
    main()
