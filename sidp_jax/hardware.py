"""Hardware profiles: what one GPU of a node achieves, from data files with their sources.

A profile has a few plain figures and, where somebody has measured them, curves: how long a layer
took at some numbers of tokens, how fast attention ran at some lengths. The measured layer times
stand in the file as they were measured; ``Hardware.dense_seconds`` carries them over to layers of
another shape by their ratio to the roofline of the plain figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from importlib import resources
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import yaml

_FOLDER = resources.files("sidp_jax") / "configs" / "hardware"
MEASURE = "measure"
"""The value of ``hardware`` that times this machine instead of reading a profile."""

Number = int | float
Curve = tuple[tuple[float, float], ...]
"""Measured points ``(x, value)``, ascending in x."""


def value_at(curve: Curve, x: Number) -> float:
    """A curve's value: linear in the logarithm of x between its points, constant beyond them."""
    if x <= curve[0][0]:
        return curve[0][1]
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x <= x1:
            return y0 + (y1 - y0) * log(x / x0) / log(x1 / x0)
    return curve[-1][1]


@dataclass(frozen=True)
class LayerTimes:
    """Measured times of the dense part of one decoder layer, on one device.

    Attributes:
        weight_bytes: Bytes of the layer's parameters.
        flops_per_token: Dense FLOPs per token.
        milliseconds: By tokens.
    """

    weight_bytes: float
    flops_per_token: float
    milliseconds: Curve


@dataclass(frozen=True)
class Hardware:
    """What one GPU of a node achieves.

    Attributes:
        name: Name of the profile.
        flops: Dense matrix throughput in the model's type, FLOP/s.
        memory_bandwidth: Bytes/s read from device memory.
        link_bandwidth: Bytes/s into one GPU from its peers, one way, of a broadcast or a gather.
        hop_latency: Seconds that one collective takes beyond its bytes.
        memory_bytes: Bytes of memory, all that a process could use; 0 where it is not known.
        source: Where the figures are from.
        assumptions: Which of them nobody has measured; empty if all are.
        permute_bandwidth: Bytes/s of a permutation, one way; 0 is ``link_bandwidth``.
        permute_latency: Seconds that one takes in a step beyond its bytes; 0 is ``hop_latency``.
        copy_bandwidth: Bytes/s into one GPU of copies from a peer by the copy engines, while it
            sends as much; 0 where they are not known, and WaS fetches by collectives.
        decode_bandwidth: Bytes/s at which decode attention reads its cache; 0 is
            ``memory_bandwidth``.
        prefill_flops: FLOP/s of causal prefill attention, by tokens of context; empty is ``flops``.
        kv_update: Seconds that writing keys and values takes per layer, by tokens; empty is 0.
        layer_ms: Measured times of layers, ascending in bytes; empty is the roofline.
        indexed_matmul_ratio: Time of the GEMMs that pick their slab row on the device, by tokens,
            relative to those that need not; empty where there is no such kernel.
        host_bandwidth: Bytes/s of a copy from the host's pinned memory into one GPU; 0 where it is
            not known.
        step_overhead: Seconds of a step beyond its layers, head and sampling.
        fetch_interference: How much longer compute and a fetch beneath it take together than the
            longer one alone, as a share of the shorter one: a collective takes cores and memory
            bandwidth from the GEMMs.
        copy_interference: The same of a fetch by the copy engines.
    """

    name: str
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    hop_latency: float
    memory_bytes: float
    source: str
    assumptions: str = ""
    permute_bandwidth: float = 0.0
    permute_latency: float = 0.0
    copy_bandwidth: float = 0.0
    decode_bandwidth: float = 0.0
    prefill_flops: Curve = ()
    kv_update: Curve = ()
    layer_ms: tuple[LayerTimes, ...] = ()
    indexed_matmul_ratio: Curve = ()
    host_bandwidth: float = 0.0
    step_overhead: float = 0.0
    fetch_interference: float = 0.0
    copy_interference: float = 0.0

    def __post_init__(self) -> None:
        for field in ("flops", "memory_bandwidth", "link_bandwidth"):
            if getattr(self, field) <= 0:
                raise ValueError(f"hardware profile {self.name!r}: {field} must be positive")
        for field in (
            "hop_latency",
            "memory_bytes",
            "permute_bandwidth",
            "permute_latency",
            "copy_bandwidth",
            "decode_bandwidth",
            "host_bandwidth",
            "step_overhead",
            "fetch_interference",
            "copy_interference",
        ):
            if getattr(self, field) < 0:
                raise ValueError(f"hardware profile {self.name!r}: {field} must not be negative")
        curves = {name: getattr(self, name) for name in _CURVES}
        curves |= {f"layer_ms of {t.weight_bytes:.4g} B": t.milliseconds for t in self.layer_ms}
        for name, curve in curves.items():
            _check_curve(f"hardware profile {self.name!r}: {name}", curve)
        if any(not times.milliseconds for times in self.layer_ms):
            raise ValueError(f"hardware profile {self.name!r}: layer_ms has a layer without times")

    def roofline_seconds(
        self, tokens: Number, weight_bytes: Number, flops_per_token: Number
    ) -> float:
        """The longer of the products and one read of the weights, by the plain figures."""
        return max(tokens * flops_per_token / self.flops, weight_bytes / self.memory_bandwidth)

    def dense_seconds(self, tokens: Number, weight_bytes: Number, flops_per_token: Number) -> float:
        """Seconds of the dense part of a layer: the roofline, times what was measured above it.

        The ratio of measured time to roofline is taken at as many tokens, of the measured layers
        next in size. Beyond the last point of a layer its ratio goes over to that of the measured
        layer next in size that has points there: what is above the roofline in small steps gets
        less in large ones, and the last ratio would be kept for all of them.
        """
        roofline = self.roofline_seconds(tokens, weight_bytes, flops_per_token)
        if not self._slowdowns:
            return roofline
        sizes = tuple((size, value_at(curve, tokens)) for size, curve in self._slowdowns)
        return roofline * value_at(sizes, weight_bytes)

    def hop_seconds(self, nbytes: Number) -> float:
        """Seconds of one permutation in which so many bytes enter and leave each device."""
        bandwidth = self.permute_bandwidth or self.link_bandwidth
        return nbytes / bandwidth + (self.permute_latency or self.hop_latency)

    def attention_seconds(
        self, read_bytes: Number, products: Iterable[tuple[Number, int]]
    ) -> float:
        """Seconds of one layer's attention.

        Args:
            read_bytes: Keys and values that decodes read.
            products: FLOPs of each prefilled chunk, with the context's tokens at its end.
        """
        seconds = read_bytes / (self.decode_bandwidth or self.memory_bandwidth)
        for flops, context in products:
            seconds += flops / self.prefill_rate(context)
        return seconds

    def prefill_rate(self, context: Number) -> float:
        """FLOP/s of causal prefill attention up to so many tokens of context."""
        return value_at(self.prefill_flops, context) if self.prefill_flops else self.flops

    def kv_update_seconds(self, tokens: Number) -> float:
        """Seconds that writing the keys and values of so many tokens takes, per layer."""
        return value_at(self.kv_update, tokens) if self.kv_update else 0.0

    @cached_property
    def _slowdowns(self) -> tuple[tuple[float, Curve], ...]:
        """Measured time over roofline by tokens, for each measured layer by its bytes."""
        curves = [
            (
                times.weight_bytes,
                tuple(
                    (tokens, ms / 1e3 / self.roofline_seconds(tokens, *_size(times)))
                    for tokens, ms in times.milliseconds
                ),
            )
            for times in self.layer_ms
        ]
        return tuple((size, curve + _beyond(size, curve, curves)) for size, curve in curves)


def _beyond(size: float, curve: Curve, curves: list[tuple[float, Curve]]) -> Curve:
    """Points beyond a curve's last, of the curve next in size that has such points."""
    last = curve[-1][0]
    further = [(abs(log(other / size)), points) for other, points in curves if points[-1][0] > last]
    _, points = min(further, default=(0.0, ()))
    return tuple((tokens, ratio) for tokens, ratio in points if tokens > last)


_CURVES = ("prefill_flops", "kv_update", "indexed_matmul_ratio")
_TEXTS = ("name", "source", "assumptions")
_LAYER_KEYS = {"weight_bytes", "flops_per_token", "milliseconds"}


def _size(times: LayerTimes) -> tuple[float, float]:
    return times.weight_bytes, times.flops_per_token


def _check_curve(what: str, curve: Curve) -> None:
    if any(x <= 0 or y <= 0 for x, y in curve) or any(a >= b for (a, _), (b, _) in pairwise(curve)):
        raise ValueError(f"{what} must hold positive points with ascending x, got {curve}")


def profile_names() -> list[str]:
    """The profiles that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir())


def is_profile_file(name: str) -> bool:
    """Whether a value of ``hardware`` is the path of a file, as ``save_profile`` writes it."""
    return name.endswith((".yaml", ".yml"))


def load_profile(name: str) -> Hardware:
    """Reads a profile: one that ships with the package by its name, any other by its path.

    Raises:
        ValueError: There is no such profile, or the file does not hold one.
    """
    if is_profile_file(name):
        path = Path(name).expanduser()
        if not path.is_file():
            raise ValueError(f"hardware={name!r}: there is no file {path.absolute()}")
        return parse_profile(path.stem, yaml.safe_load(path.read_text(encoding="utf-8")))
    if name not in profile_names():
        raise ValueError(
            f"hardware={name!r} is unknown; known: {', '.join(profile_names())}, or a path that "
            "ends in .yaml"
        )
    return parse_profile(name, yaml.safe_load((_FOLDER / f"{name}.yaml").read_text()))


def parse_profile(name: str, values: Any) -> Hardware:
    """A profile from the contents of its file.

    Raises:
        ValueError: A key is unknown or missing, or a value is not what it has to be.
    """
    known = [field.name for field in fields(Hardware) if field.name != "name"]
    if not isinstance(values, Mapping):
        raise ValueError(f"hardware profile {name!r} must hold lines `key: value`")
    for key in values:
        if key not in known:
            raise ValueError(
                f"hardware profile {name!r}: unknown key {key!r}; known: {', '.join(known)}"
            )
    parsed = {key: _parse(name, key, value) for key, value in values.items()}
    try:
        return Hardware(name=name, **parsed)
    except TypeError as error:
        raise ValueError(f"hardware profile {name!r}: {error}") from None


def _parse(name: str, key: str, value: Any) -> Any:
    if key in _TEXTS:
        return str(value)
    try:
        if key == "layer_ms":
            return tuple(sorted(map(_layer_times, value), key=lambda times: times.weight_bytes))
        if key in _CURVES:
            return _curve(value)
        return float(value)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"hardware profile {name!r}: {key}={value!r}: {error!r}") from None


def _layer_times(value: Mapping[str, Any]) -> LayerTimes:
    if set(value) != _LAYER_KEYS:
        raise ValueError(f"a measured layer has the keys {sorted(_LAYER_KEYS)}")
    sizes = float(value["weight_bytes"]), float(value["flops_per_token"])
    return LayerTimes(*sizes, _curve(value["milliseconds"]))


def _curve(value: Any) -> Curve:
    """Points from a mapping, or one number for all."""
    if not isinstance(value, Mapping):
        return ((1.0, float(value)),)
    return tuple(sorted((float(x), float(y)) for x, y in value.items()))


def as_values(hardware: Hardware) -> dict[str, Any]:
    """A profile as plain values, for JSON and YAML; curves are mappings. Inverse of parsing."""
    values = {key: value for key, value in asdict(hardware).items() if value not in ((), "")}
    values |= {key: _points(values[key]) for key in _CURVES if key in values}
    if hardware.layer_ms:
        values["layer_ms"] = [
            asdict(times) | {"milliseconds": _points(times.milliseconds)}
            for times in hardware.layer_ms
        ]
    return values


def _points(curve: Curve) -> dict[Number, float]:
    return {int(x) if x == int(x) else x: y for x, y in curve}


def save_profile(hardware: Hardware, path: Path) -> None:
    """Writes a profile where ``hardware=PATH`` finds it; the file's name becomes the profile's.

    Raises:
        ValueError: The path does not end in ``.yaml``.
    """
    if not is_profile_file(path.name):
        raise ValueError(f"a profile is saved as a .yaml file, got {path}; change the ending")
    values = as_values(hardware)
    del values["name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False, width=110), encoding="utf-8")


def profile_for(device_kind: str, platform: str) -> str:
    """The name of the profile that fits a device.

    Args:
        device_kind: jax's name of the device, for example ``NVIDIA H200``.
        platform: ``cpu`` or ``gpu``.

    Raises:
        ValueError: No profile fits; the user has to choose one.
    """
    if platform == "cpu":
        return "cpu"
    for name in profile_names():
        if name != "cpu" and name.upper() in device_kind.upper().split():
            return name
    raise ValueError(
        f"no hardware profile for {device_kind!r}; set hardware to one of {profile_names()}, or "
        f"to {MEASURE} to time this machine"
    )
