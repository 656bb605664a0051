"""A plan as tables of text and as a figure."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidp_jax.config import ConfigError
from sidp_jax.modes.policy import HOST, WAS

_PLAIN_WIDTH = 110
_MOST_SHAPES = 3
_PARTS = {
    "weights": "weights",
    "layer_buffers": "layer buffers",
    "activations": "activations",
    "sampling": "sampling",
    "kv_cache": "KV cache",
}
"""What a GPU's memory is used for: key in the plan, and name."""

_Option = dict[str, Any]
"""One of the plan's configurations."""


def print_plan(plan: dict[str, Any]) -> None:
    """Prints a plan; into files and pipes in a fixed width, so that tables keep their shape."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    console = Console(width=width, highlight=False, markup=False)
    model, hardware, workload = plan["model"], plan["hardware"], plan["workload"]
    console.print(f"Plan: {plan['kind']}.")
    console.print(
        f"Model: {model['path']}, {model['architecture']}, {model['num_layers']} layers of "
        f"{_size(model['layer_bytes'])} in {model['dtype']}."
    )
    console.print(f"Hardware: {plan['devices']} x {hardware['name']}. {hardware['source']}.")
    if "assumptions" in hardware:
        console.print(f"Not measured: {hardware['assumptions']}.")
    console.print(
        f"Workload: {workload['prompt']:,} tokens in, {workload['output']:,} out, "
        f"{workload['mean_length']:,} in the cache on average; max_model_len "
        f"{plan['max_model_len']:,}."
    )
    for part in (
        _owners(plan),
        _memory(plan),
        _activations(plan),
        _layers(plan),
        _crossovers(plan),
        _throughput(plan),
        *([_replays(plan)] if plan["replays"] else []),
    ):
        if isinstance(part, Table):
            console.print()
        console.print(part)
    console.print()
    console.print(_recommendation(plan))
    console.print("\nThe estimate of throughput, for a steady state (in, out: the workload):")
    for line in plan["formula"]:
        console.print(f"  {line}", soft_wrap=True)


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _owners(plan: dict[str, Any]) -> Table:
    table = _table("Who owns which layer", "replica", "layers", "count")
    table.columns[1].justify = "left"
    fetch = plan["configurations"]["as configured"]["configuration"]["was_fetch"]
    for replica, layers in enumerate(plan["owners"]):
        if layers:
            owner = "host" if fetch == HOST else str(replica)
            table.add_row(owner, ", ".join(map(str, layers)), str(len(layers)))
    if plan["resident"]:
        layers = plan["resident"]
        shown = "all" if len(layers) == plan["model"]["num_layers"] else ", ".join(map(str, layers))
        table.add_row("every one", shown, str(len(layers)))
    return table


def _beside(plan: dict[str, Any], title: str, rows: dict[str, Callable[[_Option], str]]) -> Table:
    """A table with a column for each configuration."""
    options = plan["configurations"]
    table = _table(title, "", *(_name(*item).replace(": ", "\n") for item in options.items()))
    for row, show in rows.items():
        table.add_row(row, *map(show, options.values()))
    return table


def _memory(plan: dict[str, Any]) -> Table:
    def part(key: str) -> Callable[[_Option], str]:
        return lambda option: _size(option["memory"][key])

    def kv_cache(option: _Option) -> str:
        held = option["memory"]
        if held["fits"]:
            return _size(held["kv_cache"])
        if held["kv_tokens"] == 0 or sum(held[part] for part in _PARTS) > held["usable"]:
            return "does not fit"
        return f"too little: {_size(held['kv_cache'])}"

    def usable(option: _Option) -> str:
        usable = option["memory"]["usable"]
        return "unknown" if usable is None else _size(usable)

    def kv_tokens(option: _Option) -> str:
        fits, tokens = option["memory"]["fits"], option["memory"]["kv_tokens"]
        return f"{tokens * _replicas(option):,}" if fits else "-"

    return _beside(
        plan,
        "Memory per GPU, estimated",
        {
            **{name: part(key) for key, name in _PARTS.items()},
            _PARTS["kv_cache"]: kv_cache,
            **({"on the host": part("host")} if _uses_host(plan) else {}),
            f"may be used ({plan['gpu_memory_utilization']:.0%})": usable,
            "KV tokens, all GPUs": kv_tokens,
            "sequences of mean length, all GPUs": _speed(
                lambda option, speed: f"{speed['concurrency'] * _replicas(option):,}"
            ),
        },
    )


def _uses_host(plan: dict[str, Any]) -> bool:
    return any(option["memory"]["host"] for option in plan["configurations"].values())


def _activations(plan: dict[str, Any]) -> str:
    modes = ", ".join(f"{_size(size)} in {mode}" for mode, size in plan["activations"].items())
    return f"Activations of the largest step, as configured: {modes}; the largest is reserved."


def _columns(plan: dict[str, Any]) -> list[str]:
    """The times that a step of the plan has."""
    return [key for key in plan["steps"][0] if key not in ("tokens", "best")]


def _layers(plan: dict[str, Any]) -> Table:
    columns = _columns(plan)
    pooled = "best" in plan["steps"][0]
    table = _table(
        "One layer, without attention, estimated, us",
        "tokens per replica",
        *(column.replace("_", "\n") for column in columns),
        *(["best"] if pooled else []),
    )
    for step in plan["steps"]:
        times = [f"{1e6 * step[column]:,.0f}" for column in columns]
        table.add_row(f"{step['tokens']:,}", *times, *([step["best"]] if pooled else []))
    return table


def _crossovers(plan: dict[str, Any]) -> str:
    if plan["mode_ranges"] is None:
        return "Every layer is at home."
    ranges = [f"{mode} from {first:,}" for first, mode in plan["mode_ranges"]]
    hidden = plan["fetch_hidden_from"]
    hides = (
        "no batch hides the fetch" if hidden is None else f"compute hides the fetch from {hidden:,}"
    )
    return (
        f"Cheapest, by tokens per replica and step: {', '.join(ranges)}; {hides}.\n"
        "replicated is never slower, where it fits. cas is the lockstep schedule."
    )


def _throughput(plan: dict[str, Any]) -> Table:
    def chosen(key: str) -> Callable[[_Option], str]:
        return lambda option: f"{option['configuration'][key]:,}"

    def resident(option: _Option) -> str:
        layers = option["configuration"]["resident_layers"]
        return "all" if layers == plan["model"]["num_layers"] else str(layers)

    def fetched(option: _Option) -> str:
        chosen = option["configuration"]
        return chosen["was_fetch"] if WAS in chosen["modes"] else "-"

    def number(key: str, scale: float = 1.0, digits: int = 0) -> Callable[[_Option], str]:
        return _speed(lambda _, speed: f"{scale * speed[key]:,.{digits}f}")

    return _beside(
        plan,
        "Throughput in the steady state, estimated",
        {
            "resident layers": resident,
            "WaS fetches by": fetched,
            "max_num_seqs": chosen("max_num_seqs"),
            "max_num_batched_tokens": chosen("max_num_batched_tokens"),
            "sequences per replica": number("running"),
            "bounded by": _speed(lambda _, speed: speed["limit"]),
            "steps by their tokens, padded": _speed(lambda _, speed: _shapes(speed)),
            "mean step, ms": number("step_seconds", scale=1e3, digits=1),
            "output tokens/s, all GPUs": number("output_tokens_per_second"),
            "requests/s, all GPUs": number("requests_per_second", digits=2),
        },
    )


def _replays(plan: dict[str, Any]) -> Table:
    """Configurations that were close, beside what they did in the replayed job."""
    requests = plan["replays"][0]["requests"]
    table = _table(
        f"Close calls: a job of {requests:,} requests, simulated, output tokens/s of all GPUs",
        "configuration",
        "estimated",
        "steady\nstate",
        "whole\njob",
        "preemptions",
    )
    for done in plan["replays"]:
        table.add_row(
            f"{_shape(done)}, {done['configuration']['max_num_seqs']:,} x "
            f"{done['configuration']['max_num_batched_tokens']:,}",
            f"{done['estimated_output_tokens_per_second']:,.0f}",
            f"{done['steady_output_tokens_per_second']:,.0f}",
            f"{done['output_tokens_per_second']:,.0f}",
            f"{done['preemptions']:,}",
        )
    return table


def _shapes(speed: dict[str, Any]) -> str:
    """Shapes of the steps, the most frequent ones first, a line each."""
    shapes = sorted(speed["shapes"], key=lambda shape: -shape["share"])[:_MOST_SHAPES]
    return "\n".join(f"{s['tokens']:,}: {s['share']:.0%}\n{s['mode']}" for s in shapes)


def _speed(show: Callable[[_Option, dict[str, Any]], str]) -> Callable[[_Option], str]:
    """Shows something of the throughput, and a dash for what does not fit."""
    return lambda o: "-" if o["throughput"] is None else show(o, o["throughput"])


def _recommendation(plan: dict[str, Any]) -> str:
    advice = plan["recommendation"]
    if advice["set"] is None:
        return f"Recommendation: none. {advice['reason'].capitalize()}."
    keys = " ".join(f"{key}={value}" for key, value in advice["set"].items())
    verdict = "pool" if advice["pool"] else "do not pool"
    how = f"decided by {advice['decided_by']}"
    return f"Recommendation, {how}: {verdict}; {advice['reason']}.\nSet {keys}."


def _name(name: str, option: dict[str, Any]) -> str:
    return f"{name}: {_shape(option)}"


def _shape(option: dict[str, Any]) -> str:
    chosen = option["configuration"]
    pools, size, tensor = chosen["pools"], chosen["pool_size"], chosen["tensor_size"]
    pooled = f"{pools} {'pools' if pools > 1 else 'pool'} of {size}"
    shape = f"DP{pools}" if size == 1 else pooled
    return f"{shape}{f' x TP{tensor}' if tensor > 1 else ''}"


def _replicas(option: dict[str, Any]) -> int:
    return option["configuration"]["pools"] * option["configuration"]["pool_size"]


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 or count == 0 else f"{count / 1e6:.1f} MB"


def draw_figure(plan: dict[str, Any], path: Path) -> None:
    """Draws time of a layer by tokens, and bytes per GPU, into a PNG file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "--figure needs matplotlib, which is not installed; pip install 'sidp-jax[plot]', or "
            "leave --figure out"
        ) from None
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    times, bytes_ = figure.subplots(1, 2)
    tokens = [step["tokens"] for step in plan["steps"]]
    for key in _columns(plan):
        line = "--" if key in ("fetch", "hop", "hop_staggered") else "o-"
        times.plot(tokens, [1e3 * step[key] for step in plan["steps"]], line, label=key)
    for first, _ in plan["mode_ranges"] or []:
        if 1 < first <= tokens[-1]:
            times.axvline(first, color="grey", linewidth=0.8)
    times.set_xscale("log", base=2)
    times.set(yscale="log", xlabel="tokens per replica and step", ylabel="ms")
    times.set(title="One layer, without attention")
    times.legend()
    names = [_name(*item).replace(": ", "\n") for item in plan["configurations"].items()]
    left = [0.0] * len(names)
    for part in _PARTS:
        sizes = [option["memory"][part] / 1e9 for option in plan["configurations"].values()]
        bytes_.barh(names, sizes, left=left, label=_PARTS[part])
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    usable = next(iter(plan["configurations"].values()))["memory"]["usable"]
    if usable is not None:
        bytes_.axvline(usable / 1e9, color="black", linestyle="--", label="may be used")
    bytes_.invert_yaxis()
    bytes_.set(xlabel="GB", title="Memory per GPU")
    figure.legend(*bytes_.get_legend_handles_labels(), loc="outside lower right", ncols=6)
    hardware = f"{plan['devices']} x {plan['hardware']['name']}"
    figure.suptitle(f"{plan['model']['path']} on {hardware}: estimated, not measured")
    figure.savefig(path, format="png", dpi=150)
