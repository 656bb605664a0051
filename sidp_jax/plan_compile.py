"""``plan --compile``: the planned step as the compiler sees it, beside the plan's own figures.

The step is compiled for the node's GPUs on a machine that has none (``aot.py``). Nothing is run:
memory and the order of fetches and GEMMs are the compiler's, times are not.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from sidp_jax.batch import token_buckets
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.estimate import Candidate, Memory, Setting, memory, policy_of
from sidp_jax.hardware import load_profile
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import HOST, WAS
from sidp_jax.settle import DTYPE_BYTES
from sidp_jax.timeline import Timeline, read_timeline

_ROWS = 2
"""Rows of the slab that are compiled: what a layer holds and does does not depend on more."""


@dataclass(frozen=True)
class Compiled:
    """One mode's largest step, and what the plan says of the same.

    Attributes:
        mode: The mode.
        layers: Decoder layers that were compiled.
        tokens: Tokens of one replica in the step.
        attention: Implementation of attention that was compiled.
        planned: The plan's memory for so many layers, with as many bytes of cache.
        arguments: Bytes of the program's arguments: weights and KV cache.
        aliased: Bytes of arguments that are updated in place: the KV cache.
        temporaries: Bytes of everything else: layer buffers and activations.
        timeline: What one device does in the step, in order; of several programs, in a row.
        copies: Whether layers are copied between several programs: buffers are arguments then.
    """

    mode: str
    layers: int
    tokens: int
    attention: str
    planned: Memory
    arguments: int
    aliased: int
    temporaries: int
    timeline: Timeline
    copies: bool

    @property
    def middle(self) -> int:
        """Number of a middle layer in the timeline."""
        return min(self.layers // 2, max(self.timeline.layers))

    def as_json(self) -> dict[str, Any]:
        """All of it, the timeline as lines of text."""
        lines = middle_layer(self.timeline, self.middle)
        return {**vars(self), "planned": asdict(self.planned), "timeline": lines}


def compile_plan(config: EngineConfig, plan: dict[str, Any]) -> list[Compiled]:
    """Compiles the largest step of every mode of the configuration as it stands.

    Args:
        config: The configuration that was planned.
        plan: What ``plan.make_plan`` made of it.

    Raises:
        ConfigError: The GPU cannot be compiled for, or a package is missing; the message says what
            to install.
    """
    setting = Setting(
        model=ModelConfig.from_pretrained(config.model_path),
        hardware=load_profile(plan["hardware"]["name"]),
        dtype_bytes=DTYPE_BYTES[config.dtype],
        page_size=config.page_size,
        max_model_len=plan["max_model_len"],
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    planned = plan["configurations"]["as configured"]["configuration"]
    candidate = Candidate(**planned | {"modes": tuple(planned["modes"])})
    layer_loop = "unrolled" if config.layer_loop == "auto" else config.layer_loop
    return [compile_step(setting, candidate, mode, layer_loop) for mode in candidate.modes]


def compile_step(
    setting: Setting, candidate: Candidate, mode: str, layer_loop: str = "unrolled"
) -> Compiled:
    """Compiles the largest step that may run in one mode for the planned node.

    Args:
        setting: What is planned for: model, GPU, lengths.
        candidate: The configuration.
        mode: One of its modes.
        layer_loop: Form of the loop over the layers.

    Raises:
        ConfigError: As ``compile_plan``.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"  # the GPUs are the compiler's alone
    from sidp_jax.aot import TARGETS, compile_forward
    from sidp_jax.copied_layers import CompiledCopiedForward

    hardware = setting.hardware.name
    if hardware not in TARGETS:
        raise ConfigError(
            f"--compile does not know hardware={hardware}; set one of {', '.join(sorted(TARGETS))}"
        )
    if candidate.was_fetch == HOST:
        raise ConfigError(
            "--compile knows no memory of a host; leave it out, or set pool_host_layers=0"
        )
    hopper = TARGETS[hardware].compute_capability[0] == 9
    attention = "mosaic" if hopper else "reference"
    whole = memory(setting, candidate)
    layers = min(setting.model.num_layers, _ROWS * candidate.pool_size)
    # The cache takes the memory that it takes with all layers.
    pages = whole.kv_tokens // setting.page_size * setting.model.num_layers // layers
    setting = replace(setting, model=replace(setting.model, num_layers=layers))
    policy = policy_of(setting, candidate)
    sizes = token_buckets(candidate.max_num_batched_tokens)
    tokens = max((size for size in sizes if policy.may_run(mode, size)), default=sizes[0])
    candidate = replace(
        candidate,
        max_num_batched_tokens=tokens,
        modes=(mode,),
        num_kv_pages=pages,
        resident_layers=min(candidate.resident_layers, layers),
    )
    try:
        compiled = compile_forward(
            setting.model,
            hardware,
            candidate.pool_size,
            mode,
            tokens,
            num_kv_pages=pages,
            tensor_size=candidate.tensor_size,
            resident_layers=candidate.resident_layers,
            was_fetch=candidate.was_fetch,
            layer_loop=layer_loop,
            attention=attention,
            page_size=setting.page_size,
            max_num_seqs=candidate.max_num_seqs,
            max_pages_per_seq=ceil(setting.max_model_len / setting.page_size),
            dtype=dict(map(reversed, DTYPE_BYTES.items()))[setting.dtype_bytes],
        )
    except RuntimeError as error:
        raise ConfigError(f"--compile: {error}") from error
    held = compiled.memory_analysis()
    several = isinstance(compiled, CompiledCopiedForward)
    return Compiled(
        mode,
        layers,
        tokens,
        attention,
        memory(setting, candidate),
        held.argument_size_in_bytes,
        held.alias_size_in_bytes,
        held.temp_size_in_bytes,
        read_timeline((compiled.longest_period if several else compiled).as_text()),
        several,
    )


def compiled_report(compiled: Compiled, num_layers: int) -> str:
    """Memory beside the plan's figures, and the timeline of a middle layer, as text."""
    planned = compiled.planned
    held, rest = planned.weights + planned.kv_cache, planned.activations
    if compiled.copies:
        held += planned.layer_buffers
    else:
        rest += planned.layer_buffers
    parts = [
        (
            "weights, buffers, KV cache" if compiled.copies else "weights and KV cache",
            held,
            compiled.arguments,
        ),
        ("KV cache, in place", planned.kv_cache, compiled.aliased),
        (
            "activations" if compiled.copies else "layer buffers, activations",
            rest,
            compiled.temporaries,
        ),
    ]
    parts.append(("all", parts[0][1] + parts[2][1], parts[0][2] + parts[2][2]))
    lines = [
        f"Compiled here, not run: {compiled.mode}, {compiled.tokens:,} tokens, {compiled.layers} "
        f"of {num_layers} layers with all of the cache's memory, {compiled.attention} attention.",
        f"  {'GB of one GPU':28}{'plan':>10}{'compiled':>10}{'plan is':>10}",
    ]
    for name, plan, found in parts:
        off = f"{plan / found - 1:+.1%}" if found else "-"
        lines.append(f"  {name:28}{plan / 1e9:10.3f}{found / 1e9:10.3f}{off:>10}")
    lines += ["", *middle_layer(compiled.timeline, compiled.middle)]
    if compiled.copies:
        lines.append("  fetches are copies between programs of a row each, of which this is one")
    elif compiled.mode == WAS:
        fetches = [fetch for fetch in compiled.timeline.fetches if fetch.start.nbytes > 1 << 20]
        exposed = [fetch for fetch in compiled.timeline.exposed() if fetch in fetches]
        lines.append(
            f"  {len(fetches)} fetches, {len(exposed)} without a GEMM of the layer before between "
            "start and end"
        )
    received = compiled.timeline.received_bytes() / compiled.layers
    lines.append(f"  received over the link, per layer: {received / 1e6:,.1f} MB")
    return "\n".join(lines)


def middle_layer(timeline: Timeline, layer: int) -> list[str]:
    """What happens in one layer: GEMMs, kernels, and fetches as they start and are waited for."""
    lines = [f"Layer {layer} on one GPU, in the order of issue:"]
    for number, event in zip(timeline.layers, timeline.events, strict=True):
        if number == layer and (event.kind != "copy" or event.nbytes > 1 << 24):
            lines.append(f"  {event}")
    return lines
