"""Hardware profiles: what one GPU of a node achieves, from data files with their sources."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import yaml

_FOLDER = resources.files("sidp_jax") / "configs" / "hardware"


@dataclass(frozen=True)
class Hardware:
    """What one GPU of a node achieves.

    Attributes:
        name: Name of the profile.
        flops: Dense matrix throughput in the model's type, FLOP/s.
        memory_bandwidth: Bytes/s read from device memory.
        link_bandwidth: Bytes/s into one GPU from its peers, one way.
        hop_latency: Seconds that one collective takes beyond its bytes.
        memory_bytes: Bytes of memory, all that a process could use; 0 where it is not known.
        source: Where the figures are from.
    """

    name: str
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    hop_latency: float
    memory_bytes: float
    source: str

    def __post_init__(self) -> None:
        for field in ("flops", "memory_bandwidth", "link_bandwidth"):
            if getattr(self, field) <= 0:
                raise ValueError(f"hardware profile {self.name!r}: {field} must be positive")
        for field in ("hop_latency", "memory_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"hardware profile {self.name!r}: {field} must not be negative")


def profile_names() -> list[str]:
    """The profiles that ship with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _FOLDER.iterdir())


def load_profile(name: str) -> Hardware:
    """Reads a profile by name.

    Raises:
        ValueError: There is no such profile.
    """
    if name not in profile_names():
        raise ValueError(f"hardware={name!r} is unknown; known: {', '.join(profile_names())}")
    values = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text())
    numbers = {key: float(value) for key, value in values.items() if key != "source"}
    return Hardware(name=name, source=values["source"], **numbers)


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
        f"no hardware profile for {device_kind!r}; set hardware to one of {profile_names()}"
    )
