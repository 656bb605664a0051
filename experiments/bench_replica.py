r"""Time one replica of a pool at full size on one GPU that takes itself for one of eight.

    PYTHONPATH=. python experiments/bench_replica.py --model experiments/shapes/qwen2.5_72b \
        --out experiments/results/replica_h200.json

jax mocks the topology: the real forward program of a pool is compiled and run, with its real
memory, but collectives do nothing. So what is measured is a replica's compute and its memory; the
sampled tokens mean nothing, and the link's time comes from the hardware profile, in columns of its
own. ``--platform cpu`` runs the same on virtual devices, where nothing is mocked (small models);
``--platform aot`` only compiles, for ``--hardware``, on a machine without a GPU.

A step of up to ``--max-num-seqs`` tokens decodes one token of each of as many sequences with
``--context`` tokens; a larger one prefills prompts of ``--context`` tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from mocked_pool import finite_share, randomize_free_memory, start, usable_bytes
from one_step import (
    Form,
    Stepper,
    Work,
    bytes_per_device,
    compile_all,
    layer_policy,
    link_seconds,
    put_local,
    time_steps,
)
from report import Report

from sidp_jax import aot, estimate
from sidp_jax.checkpoint import load_weights
from sidp_jax.hardware import Hardware, as_values, load_profile
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import CAS, CAS_STAGGERED, REPLICATED, WAS

BUFFERS = {REPLICATED: 0, WAS: 2, CAS: 1, CAS_STAGGERED: 1}
"""Layers of temporaries that the cache leaves room for."""

TARGETS = {WAS: 1.05, CAS_STAGGERED: 1.15}
"""Most that a layer may take, in terms of ``replicated`` with the same tokens."""

KV_TARGETS = {"qwen2.5_72b": 1.8}
"""By model, the least KV tokens of 4 x TP2 that pool, in terms of 4 x TP2 that do not."""


_BUDGET = "not started: --budget-s is spent"
_SHOWN = (
    *("group", "mode", "layers", "tokens", "work", "step_ms", "layer_ms", "ratio_to_replicated"),
    *("met", "layer_ms_with_link", "temporary_layers", "kv_tokens", "kv_tokens_compiled"),
    *("finite_keys", "compile_s"),
)


@dataclass(frozen=True)
class Group:
    """Steps on one set of weights.

    Attributes:
        name: What it is, in the report.
        pool_size: Replicas.
        tensor_size: Devices of one.
        modes: Modes to run.
        sizes: Tokens of the steps.
        layers: Layers of the model; None is as many as fit.
    """

    name: str
    pool_size: int
    tensor_size: int
    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    layers: int | None


@dataclass(frozen=True)
class Plan:
    """What a group is compiled for.

    Attributes:
        group: What to run.
        form: The static side of its steps.
        work: What a replica does in a step, by its tokens.
        pages: Pages of a replica's cache, by mode; modes that do not fit are left out.
    """

    group: Group
    form: Form
    work: dict[int, Work]
    pages: dict[str, int]

    def lowering(self, mode: str, tokens: int) -> Callable[[], jax.stages.Lowered]:
        """What lowers one program."""
        return partial(self.form.lower, mode, tokens, max(self.group.sizes), self.pages[mode])


Programs = dict[tuple[str, int], tuple[jax.stages.Compiled, dict[str, Any]]]
"""By mode and tokens: the program, and what is known about it."""


def pages_beside(fixed: int, usable: int, page_bytes: int) -> int:
    """Pages of the cache that fit beside ``fixed`` bytes.

    Raises:
        ValueError: Not even one does.
    """
    pages = (usable - fixed) // page_bytes
    if pages < 1:
        raise ValueError(
            f"{fixed / 1e9:.1f} GB beside the KV cache leave no room for a page in the "
            f"{usable / 1e9:.1f} GB of a device that may be used; take fewer layers or tokens"
        )
    return pages


class Bench:
    """The measurements of one model.

    Args:
        options: The command line.
        report: Where rows and errors go.
        devices: Devices of the node, one of them real.
        hardware: Profile of the GPU and its link.
        usable: Bytes of a device that may be used.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        report: Report,
        devices: list,
        hardware: Hardware,
        usable: int,
    ):
        self.options, self.report, self.devices = options, report, devices
        self.hardware, self.usable = hardware, usable
        self._seconds: dict[int, float] = {}

    def run_model(self, folder: str) -> None:
        """Measures every group of a model."""
        self._seconds = {}
        self.name, self.model = Path(folder).name, ModelConfig.from_pretrained(folder)
        if self.options.layers:
            self.model = replace(self.model, num_layers=self.options.layers)
        plans = self._plans()
        if self.options.probe and not self._late():
            self._fit_caches(plans)
        for batch in [[plan] for plan in plans] if self.options.by_group else [plans]:
            compiled = [{} for _ in batch] if self._late() else self._compile(batch)
            for plan, programs in zip(batch, compiled, strict=True):
                if self._late():
                    self.report.add("errors", {"group": plan.group.name, "error": _BUDGET})
                elif self.options.platform == "aot":
                    for _, row in programs.values():
                        self.report.add("compiled", row, _SHOWN)
                elif programs:
                    with self.report.errors(model=self.name, group=plan.group.name):
                        self._measure(plan, programs)

    def _late(self) -> bool:
        return time.monotonic() > self.options.deadline

    def _plans(self) -> list[Plan]:
        """The groups, with caches that should fit by estimate."""
        plans = []
        for group in self._groups():
            work = {size: self._work(size) for size in group.sizes}
            with self.report.errors(model=self.name, group=group.name):
                form = self._form(group, group.layers or self._layers_that_fit(group, work))
                plan = Plan(group, form, work, {})
                plans.append(plan)
                for mode in group.modes:
                    with self.report.errors(model=self.name, group=group.name, mode=mode):
                        fixed = self._fixed(form, group, mode)
                        plan.pages[mode] = pages_beside(fixed, self.usable, form.page_bytes)
        return plans

    def _fit_caches(self, plans: list[Plan]) -> None:
        """Sizes the caches anew, by what the compiler says about the largest step of each mode."""
        # Tuning GEMMs is most of a compilation and changes no buffer.
        options = {"xla_gpu_autotune_level": 0} if self.options.platform == "gpu" else None
        lowerings = {
            (number, mode): plan.lowering(mode, self._sizes(plan.group, mode)[-1])
            for number, plan in enumerate(plans)
            for mode in plan.pages
        }
        for (number, mode), program, _ in compile_all(lowerings, options, self.options.threads):
            plan = plans[number]
            with self.report.errors(model=self.name, group=plan.group.name, mode=mode):
                pages = plan.pages.pop(mode)
                if isinstance(program, Exception):
                    raise program
                fixed = self._used(plan.form, program) - pages * plan.form.page_bytes
                plan.pages[mode] = pages_beside(fixed, self.usable, plan.form.page_bytes)

    def _groups(self) -> Iterator[Group]:
        options, layers, pool = self.options, self.model.num_layers, self.options.pool_size
        pooled = tuple(mode for mode in options.modes if mode != REPLICATED)
        if REPLICATED in options.modes:
            yield Group(REPLICATED, pool, 1, (REPLICATED,), options.sizes, options.base_layers)
        if pooled:
            yield Group("pooled", pool, 1, pooled, options.sizes, layers)
        if options.tensor:
            size, budget = options.tensor, (options.tensor_tokens,)
            replicas = pool // size
            yield Group(f"pooled {replicas} x TP{size}", replicas, size, (WAS,), budget, layers)
            yield Group(f"plain {replicas} x TP{size}", 1, size, (REPLICATED,), budget, layers)

    def _sizes(self, group: Group, mode: str) -> list[int]:
        """Tokens of the steps of a mode, ascending."""
        most = self.options.cas_limit if mode == CAS else max(group.sizes)
        return [size for size in group.sizes if size <= most]

    def _compile(self, plans: list[Plan]) -> list[Programs]:
        """Compiles the programs of groups side by side; those that fail are errors."""
        lowerings = {
            (number, mode, size): plan.lowering(mode, size)
            for number, plan in enumerate(plans)
            for mode in plan.pages
            for size in self._sizes(plan.group, mode)
        }
        options = aot._compiler_options() if self.options.platform == "aot" else None
        programs: list[Programs] = [{} for _ in plans]
        for key, program, seconds in compile_all(lowerings, options, self.options.threads):
            number, mode, size = key
            plan = plans[number]
            case = {"model": self.name, "group": plan.group.name, "mode": mode, "tokens": size}
            with self.report.errors(**case):
                if isinstance(program, Exception):
                    raise program
                row = case | self._memory(plan.form, program, plan.pages[mode])
                programs[number][mode, size] = program, row | {"compile_s": seconds}
        return programs

    def _measure(self, plan: Plan, programs: Programs) -> None:
        """Runs the compiled programs of a group, each mode with a cache of its own."""
        group, form, pages, work = plan.group, plan.form, plan.pages, plan.work
        program, started = form.program, time.perf_counter()
        weights = load_weights(
            None,
            program.config,
            program.layout,
            program.mesh,
            dtype=form.dtype,
            layer_loop=form.layer_loop,
            load_format="dummy",
        )
        print(f"{group.name}: weights in {time.perf_counter() - started:.1f} s", flush=True)
        for mode in dict.fromkeys(mode for mode, _ in programs):
            stepper = None
            sizes = [size for other, size in programs if other == mode]
            with self.report.errors(
                model=self.name, group=group.name, mode=mode, pages=pages[mode]
            ):
                stepper = Stepper(form, weights, pages[mode])
                largest = max(programs[mode, size][1]["temporary_bytes"] for size in sizes)
                randomize_free_memory(largest, form.dtype)
            for size in sizes if stepper else ():
                compiled, row = programs[mode, size]
                if self._late():
                    self.report.add("errors", row | {"error": _BUDGET})
                    continue
                with self.report.errors(**row):
                    self._run(stepper, compiled, work[size], row)
                if any(leaf.is_deleted() for leaf in stepper.kv):
                    stepper.allocate()  # a step that failed took its cache along
            if stepper:
                stepper.free()
        for leaf in jax.tree.leaves(weights):
            leaf.delete()

    def _run(self, stepper: Stepper, compiled, work: Work, row: dict[str, Any]) -> None:
        form, size = stepper.form, row["tokens"]
        needed, pages = work.pages(form.page_size), row["kv_tokens"] // form.page_size
        if needed > pages:
            raise ValueError(f"{work.name} needs {needed} pages, the cache has {pages}")
        buffer = put_local(form.batch(work, size), form.program.per_replica())
        timing = time_steps(
            lambda: stepper.run(compiled, buffer), self.options.round_s, self.options.rounds
        )
        memory = jax.local_devices()[0].memory_stats() or {}
        row |= {
            "work": work.name,
            "step_ms": timing.in_a_row * 1e3,
            "blocked_step_ms": timing.blocked * 1e3,
            "steps": timing.steps,
            "in_use_bytes": memory.get("bytes_in_use"),
            "peak_bytes_so_far": memory.get("peak_bytes_in_use"),
            "finite_keys": finite_share(stepper.kv.k),
        }
        row |= self._per_layer(form, row["mode"], size, timing.in_a_row)
        self.report.add("steps", row, _SHOWN)

    def _per_layer(self, form: Form, mode: str, tokens: int, seconds: float) -> dict[str, Any]:
        """Time of a layer without the link, with it, as estimated, and beside the baseline's."""
        layers, pool = form.program.config.num_layers, form.program.layout.pool_size
        tensor, policy = form.program.tensor_size, layer_policy(form, mode, self.hardware)
        # In staggered CaS a step has pool - 1 stages more than layers.
        stages = layers + pool - 1 if mode == CAS_STAGGERED else layers
        link = link_seconds(policy, mode, tokens)
        stage = seconds / stages
        with_link = (max(stage, link) if mode == WAS else stage + link) * stages / layers
        if mode == REPLICATED and tensor == 1:
            self._seconds[tokens] = stage
        base = self._seconds.get(tokens) if tensor == 1 else None
        ratio = stage / base if base else None
        return {
            "layer_ms": stage * 1e3,
            "ratio_to_replicated": ratio,
            "target": TARGETS.get(mode),
            "met": ratio <= TARGETS[mode] if ratio and mode in TARGETS else None,
            "link_ms_from_profile": link * 1e3,
            "layer_ms_with_link": with_link * 1e3,
            "estimate_ms_without_attention": policy.seconds(mode, tokens) * 1e3,
        }

    def _form(self, group: Group, layers: int) -> Form:
        model = replace(self.model, num_layers=layers)
        devices = self.devices[: group.pool_size * group.tensor_size]
        options = self.options
        return Form.make(
            model,
            make_mesh(group.pool_size, group.tensor_size, devices=devices),
            layers if REPLICATED in group.modes else 0,
            attention=options.attention,
            layer_loop=options.layer_loop,
            dtype=jnp.dtype(options.dtype),
            page_size=options.page_size,
            max_num_seqs=options.max_num_seqs,
            max_model_len=options.max_model_len,
        )

    def _work(self, tokens: int) -> Work:
        options = self.options
        return Work.of(tokens, context=options.context, most_decodes=options.max_num_seqs)

    def _fixed(self, form: Form, group: Group, mode: str) -> int:
        """Bytes of a device beside the cache: weights, temporaries of the largest step, sampler."""
        model, item = form.program.config, form.dtype.itemsize
        setting = estimate.Setting(
            model, self.hardware, item, form.page_size, form.max_model_len, 1.0
        )
        computed = CAS if mode == CAS else REPLICATED
        candidate = estimate.Candidate(
            group.pool_size,
            group.tensor_size,
            1,
            form.program.layout.resident_layers,
            (computed,),
            form.max_num_seqs,
            self._sizes(group, mode)[-1],
        )
        layer = estimate.layer_shape(model, group.tensor_size, item).weight_bytes
        activations = estimate.activation_bytes(setting, candidate)[computed]
        temporaries = int(BUFFERS[mode] * layer) + activations
        return bytes_per_device(form.weights()) + temporaries + self._sampling(form)

    def _sampling(self, form: Form) -> int:
        return estimate.SAMPLING_BYTES * form.max_num_seqs * form.program.config.vocab_size

    def _layers_that_fit(self, group: Group, work: dict[int, Work]) -> int:
        """The most layers that fit with a cache that the work can be done in."""
        needed = max(step.pages(self.options.page_size) for step in work.values())
        for layers in range(self.model.num_layers, group.pool_size - 1, -1):
            form = self._form(group, layers)
            fixed = self._fixed(form, group, REPLICATED)
            if self.usable - fixed >= needed * form.page_bytes:
                return layers
        raise ValueError(f"{group.name}: not even {group.pool_size} layers fit")

    def _used(self, form: Form, program: jax.stages.Compiled) -> int:
        """Bytes of a device that the program and the sampler take, with weights and cache."""
        memory = program.memory_analysis()
        # The logits of the step are among the sampler's bytes.
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes + self._sampling(form)

    def _memory(self, form: Form, program: jax.stages.Compiled, pages: int) -> dict[str, Any]:
        """What the compiler says, and the tokens that the cache could have held by that."""
        memory, used = program.memory_analysis(), self._used(form, program)
        fits = (self.usable - used) // form.page_bytes + pages
        layout = form.program.layout
        return {
            "pool_size": layout.pool_size,
            "tensor_size": form.program.tensor_size,
            "layers": layout.num_layers,
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
            "temporary_layers": memory.temp_size_in_bytes
            / estimate.layer_shape(
                self.model, form.program.tensor_size, form.dtype.itemsize
            ).weight_bytes,
            "kv_tokens": pages * form.page_size,
            "kv_tokens_compiled": fits * form.page_size,
            "share_of_usable": used / self.usable,
        }


def summarize(report: Report) -> None:
    """Puts what the targets are about into the report, and prints it."""
    rows = report.content.get("steps") or report.content.get("compiled") or []
    for pooled in rows:
        group, tensor = pooled["group"], pooled["tensor_size"]
        if tensor == 1 or not group.startswith("pooled"):
            continue
        for plain in rows:
            same = (plain["model"], plain["group"]) == (
                pooled["model"],
                group.replace("pooled", "plain"),
            )
            if same:
                target = KV_TARGETS.get(pooled["model"])
                summary = {"model": pooled["model"], "what": group, "target": target}
                for name in ("kv_tokens", "kv_tokens_compiled"):
                    summary |= {
                        f"{name}_per_gpu": pooled[name] / tensor,
                        f"{name}_per_gpu_plain": plain[name] / tensor,
                        f"{name}_ratio": pooled[name] / plain[name],
                    }
                summary["met"] = target and summary["kv_tokens_ratio"] >= target
                report.add("kv_per_gpu", summary)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", required=True, help="folder with config.json")
    parser.add_argument(
        "--modes", default="replicated,was,cas,cas_staggered", help="'' for --tensor alone"
    )
    parser.add_argument("--sizes", default="16,128,512,2048,8192", help="tokens per replica")
    parser.add_argument("--pool-size", type=int, default=8)
    parser.add_argument("--layers", type=int, help="layers of the model; all by default")
    parser.add_argument("--base-layers", type=int, help="of `replicated`; as many as fit")
    parser.add_argument("--cas-limit", type=int, default=512, help="most tokens in lockstep CaS")
    parser.add_argument("--tensor", type=int, default=2, help="GPUs per replica, for KV; 0: none")
    parser.add_argument("--tensor-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--attention", default="mosaic")
    parser.add_argument("--layer-loop", default="unrolled")
    parser.add_argument("--platform", default="gpu", choices=("gpu", "cpu", "aot"))
    parser.add_argument("--hardware", help="profile of the GPU; by the device's name")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.92)
    parser.add_argument("--memory-gb", type=float, help="memory of a device; what it has")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        help="size caches by a compilation of their own instead of by estimate; not for aot",
    )
    parser.add_argument(
        "--by-group", action="store_true", help="compile a group only when its turn comes"
    )
    parser.add_argument("--round-s", type=float, default=0.5, help="seconds of a round of steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="compilations at a time; all cores")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="start nothing later")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    options.modes = tuple(filter(None, options.modes.split(",")))
    if unknown := set(options.modes) - set(BUFFERS):
        parser.error(f"--modes: unknown {', '.join(sorted(unknown))}; known: {', '.join(BUFFERS)}")
    options.sizes = tuple(sorted(int(size) for size in options.sizes.split(",")))
    if options.probe is None:
        options.probe = options.platform != "aot"
    options.deadline = time.monotonic() + options.budget_s
    if options.platform == "aot" and not options.hardware:
        parser.error("--platform aot needs --hardware")
    return options


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures every model and returns the report."""
    options = parse(argv)
    devices, profile, what = start(options)
    hardware = load_profile(profile)
    usable = usable_bytes(options, hardware)
    report = Report(what, options.out, hardware=as_values(hardware), usable_bytes=usable)
    bench = Bench(options, report, devices, hardware, usable)
    for folder in options.model:
        with report.errors(model=folder):
            bench.run_model(folder)
    summarize(report)
    return report.content


if __name__ == "__main__":
    main()
