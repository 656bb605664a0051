r"""Time steps in every mode on the real GPUs of a node: what pooling costs over a real link.

    PYTHONPATH=. python experiments/bench_modes.py --model experiments/shapes/qwen2.5_72b \
        --layers 16 --pool-size 2 --out experiments/results/modes.json

    PYTHONPATH=. python experiments/bench_modes.py --model experiments/shapes/qwen2.5_72b \
        --layers 24 --host-layers 6 --out experiments/results/host_layers.json

First the link's ceiling is measured, by plain broadcasts, copies and permutations of messages as
large as a layer and as the activations of a step. Then steps run many in a row, with dummy weights:
up to ``--max-num-seqs`` tokens decode one token of each of as many sequences with ``--context``
tokens, more prefill prompts of that length. The floor of a step is the longer of two times: that of
``replicated``, where every layer is at home, and the one that its messages take on the link, at the
ceiling. With ``--host-layers`` the link is that from the host's memory to the one GPU.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from one_step import Form, Stepper, Work, compile_all, layer_policy, link_seconds, time_steps
from report import Report

from sidp_jax.checkpoint import load_weights
from sidp_jax.config import EngineConfig
from sidp_jax.hardware import Hardware, as_values, load_profile, profile_for
from sidp_jax.measure import copy_bandwidth, host_bandwidth
from sidp_jax.mesh import POOL, make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.modes.policy import COLLECTIVE, COPIES, HOST, REPLICATED, WAS
from sidp_jax.startup import start_jax
from sidp_jax.step import RUN_LAYERS

MESSAGES = 8  # of one timed program, each made of what the one before brought
COMPARED_ROWS = 4
_BUDGET = "not started: --budget-s is spent"


def broadcast(x: jax.Array, number: int, pool_size: int, platform: str) -> jax.Array:
    """A plain broadcast from a replica that changes with the message's number."""
    source = number % pool_size
    if platform == "gpu":
        return jax.lax.pbroadcast(x, (POOL,), source)
    return jax.lax.psum(jnp.where(jax.lax.axis_index(POOL) == source, x, 0), POOL)


def permute(x: jax.Array, number: int, pool_size: int, platform: str) -> jax.Array:
    """A plain permutation: everyone sends to the next replica."""
    onward = [(place, (place + 1) % pool_size) for place in range(pool_size)]
    return jax.lax.ppermute(x, POOL, onward)


TRANSFERS = {"broadcast": broadcast, "ppermute": permute}
COPY = "copy"


def time_transfer(
    name: str, mesh: Mesh, nbytes: int, dtype: jnp.dtype, options: argparse.Namespace
) -> dict[str, Any]:
    """Times a message of so many bytes per device, sent on and on.

    Returns:
        A row: bytes, microseconds for one message, and bytes/s into one device.
    """
    size, platform = mesh.shape[POOL], _platform(mesh)

    def several(x: jax.Array) -> jax.Array:
        for number in range(MESSAGES):
            # Without a barrier, neighbours could be merged into one message.
            x = jax.lax.optimization_barrier(TRANSFERS[name](x, number, size, platform))
        return x

    spec = PartitionSpec(POOL)
    mapped = jax.shard_map(several, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    program = jax.jit(mapped, donate_argnums=0)
    count = nbytes // dtype.itemsize
    message = jax.jit(
        lambda: jax.lax.broadcasted_iota(jnp.int32, (size, count), 1).astype(dtype),
        out_shardings=NamedSharding(mesh, spec),
    )()
    held = [message]

    def launch() -> jax.Array:
        held[0] = program(held[0])
        return held[0]

    seconds = time_steps(launch, options.round_s, options.rounds).in_a_row / MESSAGES
    held[0].delete()
    return {"what": name, "bytes": nbytes, "us": seconds * 1e6, "bytes_per_s": nbytes / seconds}


def measure_link(
    report: Report, mesh: Mesh, model: ModelConfig, options: argparse.Namespace, profile: Hardware
) -> dict[str, Hardware]:
    """Measures the link, into the section ``link``.

    Returns:
        The profile with the link as measured, for the messages of each kind; where the measurement
        failed, and the report says so, as it was.
    """
    dtype = jnp.dtype(options.dtype)
    layer = dtype.itemsize * sum(prod(spec.shape) for spec in layer_spec(model).values())
    activations = [size * model.hidden_size * dtype.itemsize for size in options.tokens]
    wanted = {"broadcast": [layer, layer // 4], "ppermute": [layer, *activations]}
    if COPIES in options.was_fetch:
        wanted[COPY] = [layer, layer // 4]
    measured = dict.fromkeys([*TRANSFERS, COPY], profile)
    for name, sizes in wanted.items():
        rows = []
        for nbytes in sorted(set(sizes)):
            with report.errors(what=name, bytes=nbytes):
                if name == COPY:
                    rate = copy_bandwidth(nbytes)
                    row = {"what": COPY, "bytes": nbytes, "bytes_per_s": rate}
                    row["us"] = 1e6 * nbytes / rate
                else:
                    row = time_transfer(name, mesh, nbytes, dtype, options)
                row["ratio_to_profile"] = row["bytes_per_s"] / profile.link_bandwidth
                report.add("link", row)
                rows.append(row)
        if rows:
            best, smallest = max(row["bytes_per_s"] for row in rows), rows[0]
            latency = max(0.0, smallest["us"] / 1e6 - smallest["bytes"] / best)
            # What a transfer takes by itself, of permutations too.
            latencies = {"hop_latency": latency, "permute_latency": latency}
            measured[name] = replace(profile, name="measured", link_bandwidth=best, **latencies)
    return measured


def measure_host(
    report: Report, model: ModelConfig, options: argparse.Namespace, profile: Hardware
) -> dict[str, Hardware]:
    """Measures copies from the host, as large as a layer and as its kernels. Like the link's."""
    dtype, best = jnp.dtype(options.dtype), 0.0
    kernels = [dtype.itemsize * prod(spec.shape) for spec in layer_spec(model).values()]
    for nbytes in sorted({sum(kernels), max(kernels)}):
        rate = host_bandwidth(jax.devices()[0], nbytes)
        report.add("link", {"what": "host to device", "bytes": nbytes, "bytes_per_s": rate})
        best = max(best, rate)
    return dict.fromkeys(TRANSFERS, replace(profile, name="measured", host_bandwidth=best))


def _platform(mesh: Mesh) -> str:
    return "cpu" if mesh.devices.flat[0].platform == "cpu" else "gpu"


@dataclass
class Bench:
    """Steps of all modes.

    Attributes:
        options: The command line.
        report: Where rows and errors go.
        mesh: The devices.
        model: The architecture, with as many layers as are run.
        profile: The hardware, as the policy knows it.
        link: The same with the link as measured, by kind of message.
    """

    options: argparse.Namespace
    report: Report
    mesh: Mesh
    model: ModelConfig
    profile: Hardware
    link: dict[str, Hardware]

    def __post_init__(self) -> None:
        options = self.options
        self.work = {
            size: Work.of(size, context=options.context, most_decodes=options.max_num_seqs)
            for size in options.tokens
        }
        self.pages = max(work.pages(options.page_size) for work in self.work.values())
        self._seconds: dict[int, float] = {}
        self._logits: dict[int, np.ndarray] = {}

    def run(
        self, modes: tuple[str, ...], resident_layers: int, was_fetch: str = COLLECTIVE
    ) -> None:
        """Runs modes that share one form of the weights and of fetches."""
        options = self.options
        form = Form.make(
            self.model,
            self.mesh,
            resident_layers,
            attention=options.attention,
            was_fetch=was_fetch,
            layer_loop=options.layer_loop,
            dtype=jnp.dtype(options.dtype),
            page_size=options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_model_len=max(options.context, max(options.tokens)),
        )
        lowerings = {
            (mode, size): partial(form.lower, mode, size, max(options.tokens), self.pages)
            for mode in modes
            for size in options.tokens
        }
        on_host = form.program.layout.on_host
        programs = {}
        for (mode, size), program, seconds in compile_all(lowerings, threads=options.threads):
            with self.report.errors(mode=mode, tokens=size):
                if isinstance(program, Exception):
                    raise program
                programs[mode, size] = program, seconds
        stepper = Stepper(form, self._weights(form), self.pages)
        for (mode, size), (program, seconds) in programs.items():
            case = {"mode": mode, "tokens_per_replica": size}
            case |= {"host_layers": options.host_layers} if on_host else {}
            case |= {"was_fetch": was_fetch} if mode == WAS else {}
            if time.monotonic() > options.deadline:
                self.report.add("errors", case | {"error": _BUDGET})
                continue
            with self.report.errors(**case):
                row = self._run(stepper, program, mode, size)
                self.report.add("steps", case | row | {"compile_s": seconds})
            if any(leaf.is_deleted() for leaf in stepper.kv):
                stepper.allocate()  # a step that failed took its cache along
        stepper.free()

    def _weights(self, form: Form):
        program = form.program
        return load_weights(
            None,
            program.config,
            program.layout,
            program.mesh,
            dtype=form.dtype,
            layer_loop=form.layer_loop,
            load_format="dummy",
        )

    def _run(self, stepper: Stepper, program, mode: str, size: int) -> dict[str, Any]:
        form = stepper.form
        batch = form.batch(self.work[size], size)
        buffer = jax.device_put(batch, form.program.per_replica())
        # With a cache of its own: what other modes and sizes have left there is another context.
        stepper.free()
        stepper.allocate()
        logits = np.asarray(stepper.run(program, buffer)[:, :COMPARED_ROWS])
        timing = time_steps(
            lambda: stepper.run(program, buffer), self.options.round_s, self.options.rounds
        )
        layers, seconds = self.model.num_layers, timing.in_a_row
        row = {
            "work": self.work[size].name,
            "step_ms": seconds * 1e3,
            "blocked_step_ms": timing.blocked * 1e3,
            "steps": timing.steps,
            "layer_ms": seconds / layers * 1e3,
        }
        policy = layer_policy(form, mode, self.profile)
        row["estimate_layer_ms_without_attention"] = policy.seconds(mode, size) * 1e3
        fetch = COPY if policy.was_fetch == COPIES else "broadcast"
        hardware = self.link[fetch if mode == WAS else "ppermute"]
        fetched = len(form.program.layout.pooled)
        link = fetched * link_seconds(replace(policy, hardware=hardware), mode, size)
        row["link_bound_ms"] = link * 1e3
        if mode == REPLICATED:
            self._seconds[size], self._logits[size] = seconds, logits
        base, expected = self._seconds.get(size), self._logits.get(size)
        if base is None:
            return row
        return row | {
            "ratio_to_replicated": seconds / base,
            "ratio_to_floor": seconds / max(base, link),
            "bound_by": "link" if link > base else "replicated",
            "logits_error": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with config.json")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pool-size", type=int, default=1)
    parser.add_argument("--host-layers", type=int, default=0, help="of a pool of one")
    parser.add_argument("--tokens", default="16,128,512,2048,8192", help="per replica and step")
    parser.add_argument("--modes", default=",".join(RUN_LAYERS))
    parser.add_argument("--was-fetch", help="of WaS: collective, copies; both, but with scan")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--attention", default="mosaic")
    parser.add_argument("--layer-loop", default="unrolled")
    parser.add_argument("--platform", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--hardware", help="profile of the GPU; by the device's name")
    parser.add_argument("--round-s", type=float, default=0.5, help="seconds of a round of steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="compilations at a time; all cores")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    options.modes = tuple(options.modes.split(","))
    if unknown := set(options.modes) - set(RUN_LAYERS):
        known = ", ".join(RUN_LAYERS)
        parser.error(f"--modes: unknown {', '.join(sorted(unknown))}; known: {known}")
    whole = options.layer_loop == "unrolled"
    known = f"{COLLECTIVE},{COPIES}" if whole else COLLECTIVE
    options.was_fetch = tuple((options.was_fetch or known).split(","))
    if unknown := set(options.was_fetch) - {COLLECTIVE, COPIES}:
        parser.error(f"--was-fetch: unknown {', '.join(sorted(unknown))}")
    if COPIES in options.was_fetch and not whole:
        parser.error("--was-fetch: copies need --layer-loop unrolled")
    if options.host_layers:
        options.modes = (REPLICATED, WAS)
        if options.pool_size != 1 or options.host_layers > options.layers:
            parser.error("--host-layers: at most --layers of them, and --pool-size 1")
    elif options.pool_size < 2:
        parser.error("--pool-size: at least 2, or give --host-layers")
    options.tokens = tuple(sorted(int(size) for size in options.tokens.split(",")))
    options.deadline = time.monotonic() + options.budget_s
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs every mode at every size and returns the report."""
    options = parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("sidp_jax").setLevel(logging.INFO)
    start_jax(
        EngineConfig(
            model=options.model,
            pool_size=options.pool_size,
            pool_host_layers=options.host_layers,
            platform=options.platform,
            dtype=options.dtype,
        )
    )
    device = jax.devices()[0]
    profile = load_profile(options.hardware or profile_for(device.device_kind, device.platform))
    whole = ModelConfig.from_pretrained(options.model)
    model = replace(whole, num_layers=options.layers)
    where = f"{options.pool_size} x {device.device_kind}"
    what = f"measured on {where}" if device.platform == "gpu" else f"{where}: no performance"
    report = Report(what, options.out, hardware=as_values(profile), layers=options.layers)
    mesh = make_mesh(options.pool_size)
    if options.host_layers:
        link = measure_host(report, model, options, profile)
    else:
        link = measure_link(report, mesh, model, options, profile)
    bench = Bench(options, report, mesh, model, profile, link)
    left_out = {REPLICATED} if COLLECTIVE in options.was_fetch else {REPLICATED, WAS}
    collective = tuple(mode for mode in options.modes if mode not in left_out)
    runs = [((REPLICATED,), options.layers, COLLECTIVE)]
    if options.host_layers:
        runs.append(((WAS,), options.layers - options.host_layers, HOST))
    else:
        runs.append((collective, 0, COLLECTIVE))
        runs += [((WAS,), 0, COPIES)] if COPIES in options.was_fetch else []
    for modes, resident, was_fetch in runs:
        if set(modes) & set(options.modes):
            with report.errors(modes=modes, was_fetch=was_fetch):
                bench.run(modes, resident, was_fetch)
    return report.content


if __name__ == "__main__":
    main()
