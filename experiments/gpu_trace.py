"""What a GPU did in a trace of jax's profiler: the share of time it was busy, and with what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Interval = tuple[float, float]


@dataclass(frozen=True)
class Activity:
    """One GPU in one trace.

    Attributes:
        window_s: From the start of the first kernel to the end of the last, seconds.
        busy_s: How much of it at least one kernel ran.
        kernels: Seconds by name of the kernel, most first.
    """

    window_s: float
    busy_s: float
    kernels: dict[str, float]

    @property
    def idle_share(self) -> float:
        """Share of the window in which no kernel ran."""
        return 1 - self.busy_s / self.window_s

    def table(self, most: int = 12) -> str:
        """The kernels that take the most time, a line each."""
        lines = [f"{'ms':>9} {'share':>6}  kernel"]
        for name, seconds in list(self.kernels.items())[:most]:
            lines.append(f"{seconds * 1e3:9.2f} {seconds / self.window_s:6.1%}  {name[:90]}")
        return "\n".join([*lines, f"{self.window_s * 1e3:9.2f} {self.idle_share:6.1%}  idle"])


def read_activity(folder: Path) -> Activity:
    """The first GPU's activity in the newest trace below a folder.

    Raises:
        ValueError: There is no trace, or none of a GPU.
    """
    from jax.profiler import ProfileData

    files = sorted(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise ValueError(f"no *.xplane.pb below {folder}; was a trace taken?")
    planes = {plane.name: plane for plane in ProfileData.from_file(str(files[-1])).planes}
    gpu = next((planes[name] for name in sorted(planes) if name.startswith("/device:GPU")), None)
    if gpu is None:
        raise ValueError(f"{files[-1]} shows no GPU, only {', '.join(planes)}")
    events = [
        (event.name, event.start_ns, event.start_ns + event.duration_ns)
        for line in gpu.lines
        if line.name.startswith("Stream") and "Compute" in line.name
        for event in line.events
    ]
    if not events:
        lines = ", ".join(line.name for line in gpu.lines)
        raise ValueError(f"{files[-1]} shows no kernels on a compute stream; its lines: {lines}")
    kernels: Counter[str] = Counter()
    for name, start, end in events:
        kernels[name] += (end - start) / 1e9
    intervals = [(start, end) for _, start, end in events]
    window = max(end for _, end in intervals) - min(start for start, _ in intervals)
    return Activity(window / 1e9, covered(intervals) / 1e9, dict(kernels.most_common()))


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
