"""Reads a scheduled HLO module into a timeline: what one device of a step does, in order. No jax.

GEMMs, fetches, other collectives, copies and loops, with their bytes: enough to see whether fetches
ride beneath GEMMs, what crosses the link, and whether something large is copied.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COLLECTIVES = {
    "collective-broadcast": "broadcast",
    "collective-permute": "permute",
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-to-all": "all-to-all",
    "all-reduce": "all-reduce",
}
# A fusion that ends in one of these writes what it read elsewhere, as a copy does.
_MOVES = {"copy", "transpose", "slice", "dynamic-slice", "concatenate", "pad", "reshape"}

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]+[0-9]*)(?:e\w+)?\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_DEVICES = re.compile(r"num_partitions=(\d+)")
_SCOPE = re.compile(r'op_name="([^"]*)"')


@dataclass(frozen=True)
class Event:
    """Something that one device does in a step.

    Attributes:
        kind: ``gemm``, ``kernel`` (a custom call of ours), ``start``, ``done``, ``collective`` (one
            that nothing overlaps), ``copy``, ``loop`` or ``end`` (of a loop).
        name: The instruction; of a ``done`` that of its start.
        shape: The result, for example ``bf16[256,8192]``; of several the largest.
        nbytes: Bytes of the result.
        scope: The ``jax.named_scope`` it comes from.
        collective: Sort of the collective, else empty.
        received: Bytes that a device receives, averaged over the devices.
        times: How often it runs in a step: the trips of the loops around it.
    """

    kind: str
    name: str
    shape: str
    nbytes: int
    scope: str = ""
    collective: str = ""
    received: float = 0.0
    times: int = 1

    def __str__(self) -> str:
        what = f"{self.collective or self.scope.rpartition('/')[2] or self.name}"
        size = f"{self.nbytes / 1e6:10.1f} MB"
        often = f"  x{self.times}" if self.times > 1 else ""
        return f"{self.kind:10} {size}  {what:16} {self.shape}{often}"


@dataclass(frozen=True)
class Fetch:
    """One tensor of a layer on its way into the local buffer.

    Attributes:
        layer: Its number among the fetched layers.
        start: The event that starts it.
        beneath: Layers and results of the GEMMs between its start and its end, in order.
    """

    layer: int
    start: Event
    beneath: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Timeline:
    """What one device does in a step, in the order in which it is issued.

    Attributes:
        events: All events; those of a loop's body stand between its ``loop`` and its ``end``.
    """

    events: tuple[Event, ...]

    def of(self, *kinds: str) -> list[Event]:
        """The events of some kinds."""
        return [event for event in self.events if event.kind in kinds]

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """For each event the layer that runs: it changes with the first GEMM of each layer."""
        numbers, layer, inside = [], -1, False
        for event in self.events:
            if event.kind == "gemm" and "pre_attention" in event.scope:
                layer += not inside
                inside = True
            elif event.kind == "gemm":
                inside = False
            numbers.append(layer)
        return tuple(numbers)

    @cached_property
    def fetches(self) -> tuple[Fetch, ...]:
        """All asynchronous broadcasts of an unrolled program, in the order of their starts."""
        ends = {event.name: i for i, event in enumerate(self.events) if event.kind == "done"}
        seen: dict[str, int] = defaultdict(int)
        found = []
        for i, event in enumerate(self.events):
            if event.kind != "start" or event.collective != "broadcast":
                continue
            between = range(i, ends[event.name])
            gemms = [(self.layers[j], self.events[j]) for j in between]
            beneath = tuple((layer, gemm.shape) for layer, gemm in gemms if gemm.kind == "gemm")
            found.append(Fetch(seen[event.shape], event, beneath))
            seen[event.shape] += 1
        return tuple(found)

    def exposed(self) -> list[Fetch]:
        """Fetches that no GEMM of the layer before theirs covers; the first layer has none."""
        return [
            fetch
            for fetch in self.fetches
            if fetch.layer > 0 and fetch.layer - 1 not in {layer for layer, _ in fetch.beneath}
        ]

    def copies(self, least_bytes: int) -> list[Event]:
        """Copies whose result has at least so many bytes."""
        return [event for event in self.of("copy") if event.nbytes >= least_bytes]

    def received_bytes(self) -> float:
        """Bytes that one device receives from the others in a step, averaged over the devices."""
        return sum(event.received * event.times for event in self.events)

    def __str__(self) -> str:
        lines, shown = [], None
        for layer, event in zip(self.layers, self.events, strict=True):
            if layer != shown:
                lines.append(f"layer {layer}" if layer >= 0 else "before the first layer")
                shown = layer
            lines.append(f"  {event}")
        return "\n".join(lines)


def read_timeline(hlo: str) -> Timeline:
    """Reads a scheduled module, as ``jax.stages.Compiled.as_text()`` gives it.

    Args:
        hlo: The module's text.

    Raises:
        ValueError: The text is no scheduled module: the order of its lines would mean nothing.
    """
    first = hlo.partition("\n")[0]
    if "is_scheduled=true" not in first:
        raise ValueError(
            "the HLO text does not begin with a scheduled module; pass compiled.as_text(), not "
            "lowered.as_text()"
        )
    devices = _DEVICES.search(first)
    return Timeline(tuple(_events(_read(hlo), "ENTRY", 1, int(devices.group(1)) if devices else 1)))


@dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    type: str
    opcode: str
    operands: str
    rest: str

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found.group(1)

    @property
    def scope(self) -> str:
        found = _SCOPE.search(self.rest)
        return found.group(1) if found else ""


def _read(hlo: str) -> dict[str, list[_Instruction]]:
    """The instructions of every computation; the entry's under ``ENTRY`` too."""
    computations: dict[str, list[_Instruction]] = {}
    body: list[_Instruction] = []
    for line in hlo.splitlines():
        if line[:1] not in (" ", "}", ""):
            if header := _COMPUTATION.match(line):
                body = computations["ENTRY" if header.group(1) else header.group(2)] = []
        elif found := _INSTRUCTION.match(line):
            root, *fields = found.groups()
            body.append(_Instruction(bool(root), *fields))
    return computations


def _events(
    computations: dict[str, list[_Instruction]], name: str, times: int, devices: int
) -> Iterator[Event]:
    for instruction in computations[name]:
        if instruction.opcode == "while":
            trips = _TRIPS.search(instruction.rest)
            count = times * (int(trips.group(1)) if trips else 1)
            yield Event("loop", instruction.name, f"{count} times", 0, times=times)
            yield from _events(computations, instruction.attribute("body"), count, devices)
            yield Event("end", instruction.name, "", 0, times=times)
        elif (event := _event(instruction, computations, devices)) is not None:
            yield replace(event, times=times)


def _event(
    instruction: _Instruction, computations: dict[str, list[_Instruction]], devices: int
) -> Event | None:
    opcode = instruction.opcode
    base = opcode.removesuffix("-start").removesuffix("-done")
    shape, nbytes = _largest(instruction.type)
    if base in _COLLECTIVES:
        sort = _COLLECTIVES[base]
        if opcode.endswith("-done"):
            start = instruction.operands.partition(",")[0].split("%")[-1].strip()
            return Event("done", start, shape, nbytes, instruction.scope, sort)
        result = _result(instruction)
        shapes = [f"{kind}[{dims}]" for kind, dims in _ARRAY.findall(result)]
        nbytes = sum(map(_nbytes, shapes))
        if sort == "permute":
            received = nbytes * _crossing(instruction.rest) / devices
        else:
            received = _received(sort, nbytes, _group_size(instruction.rest))
        kind = "start" if opcode.endswith("-start") else "collective"
        shape = " ".join(shapes)
        return Event(kind, instruction.name, shape, nbytes, instruction.scope, sort, received)
    kind = _kind(instruction, computations)
    if kind == "gemm":  # without the workspace beside its result
        shape, nbytes = _largest(re.sub(r"s8\[\d+\]", "", instruction.type))
    return kind and Event(kind, instruction.name, shape, nbytes, instruction.scope)


def _kind(instruction: _Instruction, computations: dict[str, list[_Instruction]]) -> str | None:
    """``gemm``, ``kernel``, ``copy``, or None for what the timeline does not show."""
    if instruction.opcode in ("copy", "copy-start"):
        return "copy"
    if instruction.opcode == "custom-call":
        return "gemm" if "__cublas" in instruction.rest else "kernel"
    if instruction.opcode == "dot":
        return "gemm"
    if instruction.opcode != "fusion":
        return None
    fused = computations.get(instruction.attribute("calls") or "", [])
    inside = [_kind(one, computations) for one in fused if one.opcode in ("custom-call", "dot")]
    if inside:  # a call that reads its operands as slices in place
        return "gemm" if "gemm" in inside else "kernel"
    if any(one.root and one.opcode in _MOVES for one in _behind_bitcasts(fused)):
        return "copy"
    return None


def _behind_bitcasts(fused: list[_Instruction]) -> list[_Instruction]:
    """A fusion's instructions, with what a bitcast at its root reads as the root."""
    by_name = {one.name: one for one in fused}
    root = next((one for one in fused if one.root), None)
    while root is not None and root.opcode == "bitcast":
        root = by_name.get(root.operands.partition(",")[0].split("%")[-1].strip())
    return [] if root is None else [replace(root, root=True)]


def _nbytes(shape: str) -> int:
    kind, dims = _ARRAY.match(shape).groups()
    bits = _BITS.get(kind) or int(re.search(r"\d+", kind).group())
    return prod(int(size) for size in dims.split(",") if size) * bits // 8


def _largest(type_: str) -> tuple[str, int]:
    """The largest array of a type, which may be a tuple, and its bytes."""
    shapes = [f"{kind}[{dims}]" for kind, dims in _ARRAY.findall(type_) if kind != "token"]
    best = max(shapes, key=_nbytes, default="")
    return best, _nbytes(best) if best else 0


def _result(instruction: _Instruction) -> str:
    """The result of a collective; that of a start is ``(operands, results, ...)``."""
    if not instruction.opcode.endswith("-start") or instruction.opcode == "all-reduce-start":
        return instruction.type
    parts, depth, part = [], 0, ""
    for sign in re.sub(r"/\*.*?\*/|\{[^}]*\}", "", instruction.type)[1:-1]:
        depth += (sign == "(" or sign == "[") - (sign == ")" or sign == "]")
        if sign == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += sign
    return [*parts, part][1]


def _group_size(rest: str) -> int:
    """Devices that a collective joins, in each of HLO's ways to write replica groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(found.group(1).split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found.group(1))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found.group(1)))
        return prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found.group(2)))
    raise ValueError(f"no replica groups in {rest[:200]!r}")


def _crossing(rest: str) -> int:
    """Devices that a permutation brings something from another one."""
    found = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
    if found is None:
        raise ValueError(f"no source_target_pairs in {rest[:200]!r}")
    pairs = re.findall(r"(\d+),(\d+)", found.group(1))
    return sum(source != target for source, target in pairs)


def _received(sort: str, result_bytes: int, devices: int) -> float:
    """Bytes that a device receives, at least, averaged over the devices.

    A device's own part does not cross the link; the root of a broadcast receives nothing.
    """
    if sort == "reduce-scatter":
        return float(result_bytes * (devices - 1))
    share = result_bytes * (devices - 1) / devices
    return 2 * share if sort == "all-reduce" else share
