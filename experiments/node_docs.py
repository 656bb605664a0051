"""The tables of docs/multi_gpu.md that are estimated or simulated, written by code.

A document marks their places: what stands between ``<!-- table NAME -->`` and ``<!-- end -->`` is
replaced.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sidp_jax.estimate import Candidate, Setting, policy_of
from sidp_jax.modes.policy import CAS, CAS_STAGGERED, REPLICATED, WAS, fetch_seconds
from sidp_jax.plan_search import fetch_hidden_from, mode_ranges

Work = dict[str, Any]
Report = dict[str, Any]

LAYER_TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192)
LEAST = 0.98
"""What auto must reach of the best plain configuration."""

_EXTREMES = 5
_MODELS = {
    "qwen2.5_72b": "Qwen2.5-72B",
    "qwen3_32b": "Qwen3-32B",
    "llama3.1_70b": "Llama-3.1-70B",
}
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill_tables(text: str, tables: dict[str, str]) -> str:
    """A document with its marked tables replaced.

    Raises:
        ValueError: It marks a table that there is not.
    """

    def replaced(match: re.Match[str]) -> str:
        name = match[2]
        if name not in tables:
            raise ValueError(f"table {name!r} is unknown; known: {', '.join(tables)}")
        return f"{match[1]}{tables[name]}\n{match[3]}"

    return _BLOCK.sub(replaced, text)


def write_tables(path: Path, report: Report, layer_setting: Setting) -> None:
    """Replaces the tables of a document by those of a report."""
    text = path.read_text(encoding="utf-8")
    path.write_text(fill_tables(text, make_tables(report, layer_setting)), encoding="utf-8")


def make_tables(report: Report, layer_setting: Setting) -> dict[str, str]:
    """All tables by name, in Markdown.

    Args:
        report: Of ``simulate_node.py --grid``.
        layer_setting: Model and hardware whose layer is shown.
    """
    return {
        "layer": layer_table(layer_setting),
        "kv": kv_table(report),
        "best_plain": matrix(report, _best_plain),
        "pool": matrix(report, lambda work: _ratio(work["pooled_over_best_plain"])),
        "pool_dp": matrix(report, lambda work: _ratio(work["pooled_over_plain_dp"])),
        "auto": matrix(report, _auto),
        "extremes": extremes(report),
        "summary": summary_table(report),
    }


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def layer_table(setting: Setting) -> str:
    """Microseconds of one layer in each mode of a pool of eight, and which is cheapest when."""
    modes = (WAS, CAS, CAS_STAGGERED)
    policy = policy_of(setting, Candidate(8, 1, 1, 0, modes, 256, 8192))
    columns = (REPLICATED, *modes)
    rows = [
        [f"{tokens:,}", *(f"{1e6 * policy.seconds(mode, tokens):,.0f}" for mode in columns)]
        for tokens in LAYER_TOKENS
    ]
    names = {CAS: "cas, lockstep", CAS_STAGGERED: "cas, staggered"}
    head = ["tokens per replica", *(names.get(mode, mode) for mode in columns)]
    ranges = "; ".join(
        f"{names.get(mode, mode)} from {first:,}" for first, mode in mode_ranges(policy)
    )
    hidden = fetch_hidden_from(policy)
    fetch = 1e6 * fetch_seconds(policy.shape, policy.hardware)
    return (
        f"{_table(head, rows)}\n\nA fetch takes {fetch:,.0f} us, as long as the compute of "
        f"{hidden:,} tokens. Cheapest, by tokens per replica: {ranges}."
    )


def _nodes(report: Report) -> list[tuple[str, str, dict[str, Any]]]:
    """Hardware, model and node, in the order of the report."""
    named = [
        (*name.removeprefix("8 x ").split(", "), node) for name, node in report["nodes"].items()
    ]
    return [(hardware.upper(), _MODELS.get(model, model), node) for hardware, model, node in named]


def kv_table(report: Report) -> str:
    """KV tokens per GPU of every node, by TP."""

    def cells(row: dict[str, Any]) -> list[str]:
        plain, pooled = row["plain"], row.get("pooled")
        shown = [f"{plain:,.0f}" if plain else "does not fit"]
        if pooled is not None:
            gain = f" ({pooled / plain:.2f}x)" if plain and pooled else ""
            shown.append(f"{pooled:,.0f}{gain}" if pooled else "does not fit")
        return shown

    nodes = _nodes(report)
    rows = [
        [
            f"8 x {hardware}, {model}",
            *(cell for row in node["kv_capacity"][:3] for cell in cells(row)),
        ]
        for hardware, model, node in nodes
    ]
    head = ["node", *(f"TP{size} {kind}" for size in (1, 2, 4) for kind in ("plain", "pooled"))]
    return _table(head, rows)


def matrix(report: Report, show: Callable[[Work], str]) -> str:
    """Workloads in rows and nodes in columns."""
    nodes = _nodes(report)
    cells: dict[tuple[int, int], list[str]] = {}
    for place, (_, _, node) in enumerate(nodes):
        for work in node["workloads"]:
            row = cells.setdefault((work["prompt"], work["output"]), ["not run"] * len(nodes))
            row[place] = show(work)
    head = ["in / out", *(f"{hardware} {model}" for hardware, model, _ in nodes)]
    rows = [[f"{i:,} / {o:,}", *row] for (i, o), row in sorted(cells.items())]
    return _table(head, rows)


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"**{value:.2f}**" if round(value, 2) > 1 else f"{value:.2f}"


def _best_plain(work: Work) -> str:
    name = work["best_plain"]
    if name is None:
        return "-"
    rate = work["configurations"][name]["output_tokens_per_s"]
    return f"{rate:,.0f} {name.removeprefix('plain ').removeprefix('DP x ')}"


def _auto(work: Work) -> str:
    steady, whole = work["auto_over_best_plain"], work["auto_job_over_best_plain_whole"]
    return "-" if steady is None else f"{steady:.2f}, {whole:.2f}"


def _works(report: Report) -> list[tuple[str, Work]]:
    return [
        (f"8 x {hardware}, {model}", work)
        for hardware, model, node in _nodes(report)
        for work in node["workloads"]
    ]


def extremes(report: Report) -> str:
    """Where a pool does best and worst beside the best plain configuration."""
    works = [item for item in _works(report) if item[1]["pooled_over_best_plain"]]
    works.sort(key=lambda item: -item[1]["pooled_over_best_plain"])
    shown = works if len(works) <= 2 * _EXTREMES else works[:_EXTREMES] + works[-_EXTREMES:]
    rows = []
    for node, work in shown:
        pool = work["configurations"]["pooled"]
        steps = sum(pool["steps"].values())
        modes = ", ".join(f"{mode} {n / steps:.0%}" for mode, n in sorted(pool["steps"].items()))
        ratios = (work[f"{name}_over_best_plain"] for name in ("was", "cas", "pooled"))
        rows.append(
            [
                f"{work['prompt']:,} / {work['output']:,}",
                node,
                _best_plain(work),
                *map(_ratio, ratios),
                f"{pool['pools']} x {pool['pool_size']}, TP{pool['tensor_parallel_size']}",
                f"{pool['resident_layers']}",
                modes,
            ]
        )
    head = ["in / out", "node", "best plain, tokens/s", "WaS", "CaS", "pool"]
    return _table([*head, "pools x size", "resident layers", "its steps"], rows)


def summary_table(report: Report) -> str:
    """Counts and ranges over all workloads."""
    works = [work for _, work in _works(report)]

    def values(key: str) -> list[float]:
        return sorted(work[key] for work in works if work[key])

    def spread(key: str, over: float) -> str:
        found = values(key)
        if not found:
            return "none"
        above = sum(value > over for value in found)
        return (
            f"{found[0]:.2f} to {found[-1]:.2f}, median {median(found):.2f}; "
            f"above {over:g} in {above} of {len(found)}"
        )

    def short(key: str) -> str:
        found = values(key)
        below = [value for value in found if value < LEAST]
        return f"{len(below)} of {len(found)}, least {found[0]:.3f}" if found else "none"

    rows = [
        ["pool over the best plain DP x TP", spread("pooled_over_best_plain", 1)],
        ["pool over plain replicas of the same TP", spread("pooled_over_same_tp", 1)],
        ["pool over plain DP, where plain DP runs at all", spread("pooled_over_plain_dp", 1.5)],
        ["WaS alone over the best plain", spread("was_over_best_plain", 1)],
        ["CaS alone over the best plain", spread("cas_over_best_plain", 1)],
        ["auto over plain DP", spread("auto_over_plain_dp", 1.5)],
        [
            f"auto below {LEAST} of the best plain, steady state, as planned for a long job",
            short("auto_over_best_plain"),
        ],
        [
            f"auto below {LEAST} of the best plain, whole job, as planned for that job",
            short("auto_job_over_best_plain_whole"),
        ],
        [
            "auto is a pool",
            f"{sum(_pools(work, 'auto') for work in works)} of {len(works)} long jobs, "
            f"{sum(_pools(work, 'auto_job') for work in works)} of {len(works)} whole jobs",
        ],
    ]
    return _table(["over all workloads, simulated", ""], rows)


def _pools(work: Work, name: str) -> bool:
    return name in work["configurations"] and work["configurations"][name]["pool_size"] > 1
