"""The report of ``simulate_node.py`` as tables of text and as figures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Node = dict[str, Any]

_RATIOS = {
    "auto_over_best_plain": "auto / best plain",
    "pooled_over_best_plain": "pool / best plain",
    "pooled_over_same_tp": "pool / same TP",
    "pooled_over_plain_dp": "pool / plain DP",
    "was_over_best_plain": "WaS / best plain",
    "cas_over_best_plain": "CaS / best plain",
}


_MARKERS = {
    "plain DP": ("x", "tab:gray"),
    "was": ("^", "tab:orange"),
    "cas": ("v", "tab:green"),
    "pooled": ("s", "tab:blue"),
    "auto": ("o", "black"),
}


def print_tables(report: dict[str, Any]) -> None:
    """Prints both tables for every node."""
    console = Console(width=150, highlight=False, markup=False)
    console.print(f"{report['what']}.")
    for note in report["notes"]:
        console.print(f"  {note}", soft_wrap=True)
    for name, node in report["nodes"].items():
        console.print(_capacity(name, node))
        console.print(_throughput(name, node))
    console.print(summary(report))


def _capacity(name: str, node: Node) -> Table:
    table = Table(title=f"{name}: KV tokens per GPU, estimated", title_justify="left")
    for column in ("TP", "plain", "pooled", "ratio"):
        table.add_column(column, justify="right")
    for row in node["kv_capacity"]:
        plain, pooled = row["plain"], row.get("pooled")
        table.add_row(
            str(row["tensor_parallel_size"]),
            f"{plain:,.0f}" if plain else "does not fit",
            "-" if pooled is None else f"{pooled:,.0f}" if pooled else "does not fit",
            f"{pooled / plain:.2f}" if plain and pooled else "-",
        )
    return table


def _throughput(name: str, node: Node) -> Table:
    title = f"{name}: output tokens/s of the node in the steady state, simulated"
    table = Table(title=title, title_justify="left")
    table.add_column("in, out", justify="right")
    names = _names(node)
    for column in (*names, *_RATIOS.values()):
        table.add_column(column, justify="right")
    for work in node["workloads"]:
        rates = [
            f"{work['configurations'][key]['output_tokens_per_s']:,.0f}\n"
            f"{_shape(work['configurations'][key])}"
            if key in work["configurations"]
            else "does not fit"
            for key in names
        ]
        ratios = [f"{work[key]:.2f}" if work[key] else "-" for key in _RATIOS]
        table.add_row(f"{work['prompt']:,}, {work['output']:,}", *rates, *ratios)
    return table


def _names(node: Node) -> list[str]:
    names: dict[str, None] = {}
    for work in node["workloads"]:
        names |= dict.fromkeys(work["configurations"])
    return sorted(names, key=["plain DP", *(f"DP x TP{n}" for n in (2, 4, 8)), *_POOLS].index)


_POOLS = ("was", "cas", "pooled", "auto", "auto_job")


def _shape(row: dict[str, Any]) -> str:
    pool = "" if row["pool_size"] == 1 else f"{row['pools']}xW{row['pool_size']} "
    resident = f" R{row['resident_layers']}" if row["pool_size"] > 1 else ""
    return f"{pool}TP{row['tensor_parallel_size']}{resident}"


def summary(report: dict[str, Any]) -> str:
    """How ``auto`` and pooling did over all workloads."""
    works = [work for node in report["nodes"].values() for work in node["workloads"]]

    def spread(key: str, chosen: Callable[[dict], bool] = lambda _: True) -> str:
        values = sorted(work[key] for work in works if work[key] and chosen(work))
        if not values:
            return f"{key}: none"
        wins = sum(value > 1 for value in values)
        return (
            f"{key}: {values[0]:.2f} to {values[-1]:.2f}, median {values[len(values) // 2]:.2f}, "
            f"above 1 in {wins} of {len(values)}"
        )

    lines = [spread(key) for key in _RATIOS]
    lines.append(spread("auto_job_over_best_plain_whole") + " (whole jobs)")
    return "\n".join(["All workloads, simulated:", *lines])


def draw_figures(report: dict[str, Any], folder: Path) -> None:
    """Draws ``simulated_kv.png`` and ``simulated_throughput.png``.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(
            "--figures needs matplotlib, which is not installed; pip install 'sidp-jax[plot]'"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    _draw_capacity(Figure(figsize=(12, 7), layout="constrained"), report, folder)
    _draw_throughput(Figure(figsize=(14, 9), layout="constrained"), report, folder)


def _grid(figure: Any, report: dict[str, Any]) -> list[tuple[str, Node, Any]]:
    """An axis for each node, GPUs in rows and models in columns."""
    nodes = report["nodes"]
    columns = len({name.split(", ")[1] for name in nodes})
    axes = figure.subplots(-(-len(nodes) // columns), columns, squeeze=False)
    return [(name, node, axis) for (name, node), axis in zip(nodes.items(), axes.flat, strict=True)]


def _draw_capacity(figure: Any, report: dict[str, Any], folder: Path) -> None:
    for name, node, axis in _grid(figure, report):
        rows = node["kv_capacity"]
        for offset, key in ((-0.2, "plain"), (0.2, "pooled")):
            values = [row.get(key, 0) / 1e3 for row in rows]
            axis.bar([i + offset for i in range(len(rows))], values, 0.4, label=key)
        axis.set_xticks(range(len(rows)), [f"TP{row['tensor_parallel_size']}" for row in rows])
        axis.set(title=name, ylabel="thousand KV tokens per GPU")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.suptitle("KV cache per GPU, plain and pooled over the node: estimated, not measured")
    figure.savefig(folder / "simulated_kv.png", format="png", dpi=110)


def _draw_throughput(figure: Any, report: dict[str, Any], folder: Path) -> None:
    for name, node, axis in _grid(figure, report):
        works = node["workloads"]
        for number, (key, (marker, colour)) in enumerate(_MARKERS.items()):
            offset = 0.15 * (number - (len(_MARKERS) - 1) / 2)
            points = [
                (place + offset, _over_best_plain(work, key))
                for place, work in enumerate(works)
                if key in work["configurations"] and work["best_plain"]
            ]
            places, ratios = [x for x, _ in points], [y for _, y in points]
            axis.scatter(places, ratios, marker=marker, color=colour, label=key)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.axhspan(0, 1, color="tab:red", alpha=0.06, linewidth=0)
        labels = [f"{_short(w['prompt'])}/{_short(w['output'])}" for w in works]
        axis.set_xticks(range(len(works)), labels, rotation=60, fontsize=8)
        axis.set(title=name, ylim=(0, 1.3), xlim=(-0.5, len(works) - 0.5))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.supylabel("over the best plain DP x TP")
    figure.suptitle(
        "Output tokens/s of a node over that of the best plain DP x TP, by tokens in / out: "
        "simulated, not measured"
    )
    figure.savefig(folder / "simulated_throughput.png", format="png", dpi=110)


def _over_best_plain(work: dict[str, Any], key: str) -> float:
    rows = work["configurations"]
    return rows[key]["output_tokens_per_s"] / rows[work["best_plain"]]["output_tokens_per_s"]


def _short(tokens: int) -> str:
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}k"
