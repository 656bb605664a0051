"""A plan before any weight is read: ``python -m sidp_jax.plan --config X.yaml [key=value ...]``.

Needs the ``config.json`` of the model and no GPU: who owns what, what fits, which mode wins at
which batch size, and the best configuration for ``workload=IN,OUT``. All figures are estimates;
configurations that come out close are settled by a simulated job.
Exit codes: 0, there is a plan; 2, wrong usage or configuration.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sidp_jax.batch import token_buckets
from sidp_jax.config import ConfigError, EngineConfig, load_config
from sidp_jax.estimate import (
    FORMULA,
    Candidate,
    Setting,
    Workload,
    activation_bytes,
    layer_shape,
    policy_of,
)
from sidp_jax.hardware import (
    MEASURE,
    Hardware,
    as_values,
    load_profile,
    profile_for,
    save_profile,
)
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import (
    REPLICATED,
    Policy,
    fetch_seconds,
    lockstep_hop_seconds,
    staggered_hop_seconds,
)
from sidp_jax.plan_compile import compile_plan, compiled_report
from sidp_jax.plan_replay import WORTHWHILE, Choice, Replay, choose, replay_close
from sidp_jax.plan_report import draw_figure, print_plan
from sidp_jax.plan_search import (
    Option,
    evaluate,
    fetch_hidden_from,
    mode_ranges,
    plain_candidates,
    plain_options,
    pooled_modes,
    pooled_options,
)
from sidp_jax.settle import (
    DTYPE_BYTES,
    check_tensor_parallel,
    layout_of,
    longest_sequence,
    make_policy,
)
from sidp_jax.startup import count_gpus, resolve_platform, start_jax

DEFAULT_WORKLOAD = Workload(1024, 256)
_SUCCESS, _USAGE = 0, 2
_GPU_FOLDER = Path("/proc/driver/nvidia/gpus")

Plan = dict[str, Any]
"""What is printed, as JSON or as tables; ``make_plan`` lists its keys."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a plan from the command line and returns the exit code."""
    arguments = _parse(argv)
    try:
        workload, overrides = split_workload(arguments.overrides)
        config = load_config(arguments.config, overrides)
        hardware = _hardware(config, _read_model(config))
        plan = make_plan(config, workload, arguments.gpus, hardware)
        if arguments.save_profile is not None:
            save_profile(hardware, arguments.save_profile)
        if arguments.figure is not None:
            draw_figure(plan, arguments.figure)
        compiled = compile_plan(config, plan) if arguments.compile else []
    except (ValueError, OSError) as error:  # ConfigError and UnsupportedModelError are of these
        print(f"error: {error}", file=sys.stderr)
        return _USAGE
    if arguments.json:
        plan |= {"compiled": [step.as_json() for step in compiled]} if compiled else {}
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan)
        for step in compiled:
            print(f"\n{compiled_report(step, plan['model']['num_layers'])}")
    return _SUCCESS


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sidp_jax.plan",
        description="Estimates, before any weight is read and without a GPU, what fits, which mode "
        "wins at which batch size, and which configuration is best.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="X.yaml",
        help="a path, or the bare name of a file here or among those shipped, such as qwen72b.yaml",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        help="GPUs of the node; by default num_pools x pool_size x tensor_parallel_size",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also compile the step for the planned node here, which needs the extra aot and no "
        "GPU, and show its memory and its order beside the plan",
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    parser.add_argument(
        "--figure", type=Path, metavar="plan.png", help="also a figure; needs the extra plot"
    )
    parser.add_argument(
        "--save-profile",
        type=Path,
        metavar="FILE.yaml",
        help="keep the hardware profile, such as one from hardware=measure, for hardware=FILE.yaml",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings that beat those of the file, such as hardware=h200, and workload=IN,OUT: "
        "mean tokens of prompt and output",
    )
    return parser.parse_intermixed_args(argv)


def split_workload(overrides: Sequence[str]) -> tuple[Workload, list[str]]:
    """Takes ``workload=IN,OUT[,REQUESTS]`` out of the overrides; without it there is a default.

    Raises:
        ConfigError: The workload is not two or three positive integers.
    """
    workload, others = DEFAULT_WORKLOAD, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key != "workload":
            others.append(override)
            continue
        try:
            prompt, output, *requests = map(int, value.split(","))
            (count,) = requests or [0]
        except ValueError:
            raise ConfigError(
                f"workload={value} must be IN,OUT, mean tokens of prompt and output, or "
                "IN,OUT,REQUESTS; for example workload=1024,256"
            ) from None
        workload = Workload(prompt, output, count)
    return workload, others


def make_plan(
    config: EngineConfig,
    workload: Workload,
    num_devices: int | None = None,
    hardware: Hardware | None = None,
) -> Plan:
    """Estimates a configuration and its alternatives on the same GPUs.

    Args:
        config: The configuration; its model needs no more than ``config.json``.
        workload: Requests of the job.
        num_devices: GPUs of the node; None is as many as the configured pools take.
        hardware: One of those GPUs; None is what the configuration says.

    Returns:
        Numbers in bytes, seconds and tokens, ready for JSON: ``model``, ``hardware``, ``devices``,
        ``workload``, ``owners``, ``resident``, ``activations``, ``steps``, ``mode_ranges``,
        ``fetch_hidden_from``, ``configurations``, ``replays``, ``recommendation``, ``formula`` and
        some that repeat the input.

    Raises:
        ValueError: Something is missing or impossible; the message says what to set.
    """
    model = _read_model(config)
    setting = Setting(
        model=model,
        hardware=_hardware(config, model) if hardware is None else hardware,
        dtype_bytes=DTYPE_BYTES[config.dtype],
        page_size=config.page_size,
        max_model_len=_max_model_len(config, model, workload),
        gpu_memory_utilization=config.gpu_memory_utilization,
    )
    devices = config.num_pools * config.num_devices if num_devices is None else num_devices
    configured = _configured(config, model, setting.hardware, devices)
    layout = layout_of(config, model)
    policy = policy_of(setting, configured)
    options, replays, choice = _options(setting, configured, devices, workload)
    return {
        "kind": (
            "estimates, from a profile that this command measured"
            if config.hardware == MEASURE
            else "estimates; nothing here was measured by this command"
        ),
        "model": {
            "path": config.model,
            "architecture": model.architecture,
            "num_layers": model.num_layers,
            "layer_bytes": layer_shape(model, 1, setting.dtype_bytes).weight_bytes,
            "dtype": config.dtype,
        },
        "hardware": as_values(setting.hardware),
        "devices": devices,
        "workload": asdict(workload) | {"mean_length": workload.mean_length},
        "max_model_len": setting.max_model_len,
        "gpu_memory_utilization": setting.gpu_memory_utilization,
        "owners": [
            [layer for layer in layout.pooled if layout.owner(layer) == owner]
            for owner in range(configured.pool_size)
        ],
        "resident": list(layout.resident),
        "activations": activation_bytes(setting, configured),
        **_layer_times(policy, config.max_num_batched_tokens),
        "configurations": {name: _as_json(option) for name, option in options.items()},
        "replays": [_replay_as_json(done) for done in replays if done.job is not None],
        "recommendation": _recommendation(setting, choice),
        "formula": list(FORMULA),
    }


def _read_model(config: EngineConfig) -> ModelConfig:
    folder = config.model_path
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model={config.model!r}: there is no {(folder / 'config.json').absolute()}; a plan "
            "needs no weights, but that file: set model to a folder that holds it, such as one of "
            "experiments/shapes in the repository"
        )
    return ModelConfig.from_pretrained(folder)


def _hardware(config: EngineConfig, model: ModelConfig) -> Hardware:
    """The profile: as configured, that of the first GPU or the CPU of this machine, or measured."""
    if config.hardware == MEASURE:
        return _measured(config, model)
    if config.hardware != "auto":
        return load_profile(config.hardware)
    if resolve_platform(config.platform) == "cpu":
        return load_profile("cpu")
    for path in sorted(_GPU_FOLDER.glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return load_profile(profile_for(line.partition(":")[2].strip(), "gpu"))
    raise ConfigError(
        "hardware=auto goes by the GPU of this machine, and there is none; set hardware=h200, or "
        "another profile, to plan for it"
    )


def _measured(config: EngineConfig, model: ModelConfig) -> Hardware:
    """Starts jax on the devices that are here, and times them."""
    here = count_gpus() if resolve_platform(config.platform) == "gpu" else config.num_devices
    start_jax(replace(config, pool_size=max(1, here), tensor_parallel_size=1))
    from sidp_jax.measure import measure_hardware

    return measure_hardware(model, config.tensor_parallel_size, config.dtype)


def _max_model_len(config: EngineConfig, model: ModelConfig, workload: Workload) -> int:
    length = longest_sequence(config, model)
    if workload.prompt + workload.output > length:
        raise ConfigError(
            f"workload={workload.prompt},{workload.output} is longer than max_model_len={length}; "
            "raise max_model_len, or plan for shorter requests"
        )
    return length


def _configured(
    config: EngineConfig, model: ModelConfig, hardware: Hardware, devices: int
) -> Candidate:
    """The configuration as it stands, repeated until all GPUs of the node are in use."""
    if devices < 1 or devices % config.num_devices:
        raise ConfigError(
            f"--gpus {devices} must be a multiple of the {config.num_devices} that one pool takes, "
            "pool_size x tensor_parallel_size; change one of them"
        )
    check_tensor_parallel(config, model)
    policy = make_policy(config, model, hardware)
    return Candidate(
        pool_size=config.pool_size,
        tensor_size=config.tensor_parallel_size,
        pools=devices // config.num_devices,
        resident_layers=policy.resident_layers,
        modes=policy.modes,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        num_kv_pages=config.num_kv_pages,
        was_fetch=policy.was_fetch,
    )


def _options(
    setting: Setting, configured: Candidate, devices: int, workload: Workload
) -> tuple[dict[str, Option], list[Replay], Choice | None]:
    """The configuration beside its alternatives, as far as their memory can be known.

    The best of the plain ones and of the pools are those that the replay prefers, where it is
    close.
    """
    options = {"as configured": evaluate(setting, configured, workload)}
    if setting.usable_bytes is None:
        return options, [], None
    plain = plain_options(setting, devices, workload)
    pooled = pooled_options(setting, devices, pooled_modes(setting), workload)
    replays = replay_close(setting, [*plain.values(), *pooled.values()], workload)
    choice = choose(replays, workload)
    # Of what fits in no size of a step, the smallest shows by how much it does not.
    smallest = next(plain_candidates(setting.model, devices, 1))
    options["plain DP"] = plain[1] or evaluate(setting, smallest, workload)
    sharded = choose([r for r in replays if r.option.candidate.tensor_size > 1], workload).plain
    if sharded is not None:
        options["best DP x TP"] = sharded.option
    if choice.pooled is not None:
        options["best pooled"] = choice.pooled.option
    return options, replays, choice


def _layer_times(policy: Policy, budget: int) -> Plan:
    """Seconds of one layer at each shape, without attention, and which mode wins where."""
    pooled = policy.modes != (REPLICATED,)
    shape, hardware, size = policy.shape, policy.hardware, policy.pool_size
    steps = []
    for tokens in token_buckets(budget):
        step = {"tokens": tokens, "replicated": policy.seconds(REPLICATED, tokens)}
        if pooled:
            step |= {mode: policy.seconds(mode, tokens) for mode in policy.modes}
            step["fetch"] = fetch_seconds(shape, hardware, policy.was_fetch, size)
            step["hop"] = lockstep_hop_seconds(tokens, size, shape, hardware)
            step["hop_staggered"] = staggered_hop_seconds(tokens, shape, hardware)
            step["best"] = policy.best(tokens)
        steps.append(step)
    return {
        "steps": steps,
        "mode_ranges": [list(r) for r in mode_ranges(policy)] if pooled else None,
        "fetch_hidden_from": fetch_hidden_from(policy) if pooled else None,
    }


def _as_json(option: Option) -> Plan:
    return {
        "configuration": asdict(option.candidate) | {"modes": list(option.candidate.modes)},
        "memory": asdict(option.held),
        "throughput": None if option.speed is None else asdict(option.speed),
    }


def _replay_as_json(done: Replay) -> Plan:
    job = done.job
    return {
        "configuration": asdict(done.option.candidate)
        | {"modes": list(done.option.candidate.modes)},
        "requests": job.requests,
        "estimated_output_tokens_per_second": done.option.rate,
        "steady_output_tokens_per_second": job.steady_output_tokens_per_second,
        "output_tokens_per_second": job.output_tokens_per_second,
        "seconds": job.seconds,
        "preemptions": job.preemptions * done.option.candidate.pools,
    }


def _recommendation(setting: Setting, choice: Choice | None) -> Plan:
    """Pool or not, how that was decided, and the keys to set."""
    if choice is None:
        name = setting.hardware.name
        reason = f"profile {name!r} does not know the memory of a device, so nothing is compared"
        return {"pool": None, "decided_by": None, "reason": reason, "set": None}
    best, plain, pooled = choice.best, choice.plain, choice.pooled
    if best is None:
        reason = "no configuration of these GPUs fits by itself; take more of them, or shorter "
        reason += "sequences, or for a single GPU keep layers on the host: pool_host_layers"
        return {"pool": None, "decided_by": None, "reason": reason, "set": None}
    if plain is None:
        reason = "no plain configuration fits"
    elif pooled is None:
        reason = "no pool fits"
    else:
        reason = _comparison(plain, pooled, choice.whole)
    chosen = best.option.candidate
    keys = {
        "num_pools": chosen.pools,
        "pool_size": chosen.pool_size,
        "tensor_parallel_size": chosen.tensor_size,
        "resident_layers": chosen.resident_layers if choice.pool else 0,
        "was_fetch": chosen.was_fetch if choice.pool else "auto",
        "max_num_seqs": chosen.max_num_seqs,
        "max_num_batched_tokens": chosen.max_num_batched_tokens,
    }
    decided = "estimate" if best.job is None else "replay of a job, simulated"
    return {
        "pool": choice.pool,
        "decided_by": decided,
        "reason": reason,
        "set": keys,
    }


def _comparison(plain: Replay, pooled: Replay, whole: bool) -> str:
    """The best pool beside the best plain configuration, both replayed or both estimated."""
    replayed = plain.job is not None and pooled.job is not None
    ours, theirs = (done.rate(whole) if replayed else done.option.rate for done in (pooled, plain))
    how = f"replayed at {ours:,.0f} output tokens/s"
    if not replayed:
        how = f"estimated at {ours:,.0f} output tokens/s"
    elif whole:
        how += " over the whole job"
    return (
        f"the best pool is {how}, the best plain configuration at {theirs:,.0f}: "
        f"{ours / theirs:.2f}x, and a pool has to promise {WORTHWHILE:.2f}x"
    )


if __name__ == "__main__":
    sys.exit(main())
