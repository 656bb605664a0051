"""What a GPU did in a trace of jax's profiler: how long it was busy, with what, and step by step.

A GPU waits in two ways, with different remedies. Between the programs of a step, and between steps,
it waits for the host, or for the launch of a program. Inside a program no host is needed: the gaps
there are what a kernel's start costs, so that fewer kernels leave less of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from statistics import median
from typing import Any

Interval = tuple[float, float]

FORWARD, SAMPLER = "jit__forward", "jit__sample"
"""The programs of a step, as the profiler names them."""


@dataclass(frozen=True)
class Kernel:
    """One kernel in a trace.

    Attributes:
        name: As the profiler gives it.
        start: Nanoseconds.
        end: Nanoseconds.
        module: The program that it belongs to; empty if the trace does not say.
    """

    name: str
    start: float
    end: float
    module: str = ""


@dataclass(frozen=True)
class Run:
    """One execution of one program: its kernels, in the order of their starts."""

    module: str
    kernels: tuple[Kernel, ...]

    @property
    def span_s(self) -> float:
        """From the start of the first kernel to the end of the last, seconds."""
        return (max(k.end for k in self.kernels) - self.kernels[0].start) / 1e9

    @property
    def busy_s(self) -> float:
        """How much of it at least one kernel ran, seconds."""
        return covered((k.start, k.end) for k in self.kernels) / 1e9


@dataclass(frozen=True)
class StepFigures:
    """A step of the middle of a trace: medians over its steps, whose number is ``steps``.

    Attributes:
        steps: Steps that the trace holds from their first kernel to their last.
        period_s: From the first kernel of a step to that of the next, seconds.
        kernels: Kernels of a step.
        programs_s: Seconds of its programs, each from its first kernel to the end of its last.
        gaps_s: What of them no kernel runs, seconds.
        sampler_s: Seconds of the kernels of the sampling program.
        sampler_kernels: How many they are.
    """

    steps: int
    period_s: float
    kernels: float
    programs_s: float
    gaps_s: float
    sampler_s: float
    sampler_kernels: float

    def figures(self) -> dict[str, float]:
        """Where the time of a traced step goes, in milliseconds and as shares.

        The profiler slows the host, which shows as waits between programs: these are at most as
        long without it. Programs that run as one command buffer have no gaps of the profiler's.
        """
        between, busy = self.period_s - self.programs_s, self.programs_s - self.gaps_s
        return {
            "traced_step_ms": self.period_s * 1e3,
            "gpu_busy_ms": busy * 1e3,
            "gpu_idle_share": 1 - busy / self.period_s,
            "kernels_per_step": self.kernels,
            "gaps_in_programs_ms": self.gaps_s * 1e3,
            "gaps_in_programs_share": self.gaps_s / self.period_s,
            "between_programs_ms": between * 1e3,
            "between_programs_share": between / self.period_s,
            "sampler_ms": self.sampler_s * 1e3,
            "sampler_share": self.sampler_s / self.period_s,
            "sampler_kernels": self.sampler_kernels,
        }


@dataclass(frozen=True)
class Activity:
    """One GPU in one trace.

    Attributes:
        kernels: All kernels, in the order of their starts.
        known: What the trace says of its first kernel besides its name: names of statistics.
    """

    kernels: tuple[Kernel, ...]
    known: tuple[str, ...] = ()

    @property
    def window_s(self) -> float:
        """From the start of the first kernel to the end of the last, seconds."""
        return Run("", self.kernels).span_s

    @property
    def busy_s(self) -> float:
        """How much of it at least one kernel ran, seconds."""
        return Run("", self.kernels).busy_s

    @property
    def idle_share(self) -> float:
        """Share of the window in which no kernel ran."""
        return 1 - self.busy_s / self.window_s

    def runs(self) -> list[Run]:
        """The executions of programs, in order; kernels of unknown origin go with those before."""
        named, module = [], ""
        for kernel in self.kernels:
            module = kernel.module or module
            named.append((module, kernel))
        return [
            Run(module, tuple(kernel for _, kernel in run))
            for module, run in groupby(named, key=lambda pair: pair[0])
        ]

    def steps(self) -> StepFigures:
        """The steps that lie wholly in the trace; a step is a forward program and what follows it.

        Raises:
            ValueError: The trace does not say which program a kernel belongs to, or holds too few
                steps: those at its ends are cut off.
        """
        steps: list[list[Run]] = []
        for run in self.runs():
            if run.module.startswith(FORWARD):
                steps.append([])
            if steps:
                steps[-1].append(run)
        whole = steps[1:-1]
        if not whole:
            modules = sorted({kernel.module for kernel in self.kernels})
            raise ValueError(
                f"{len(steps)} steps, too few, begin in the trace; its kernels belong to the "
                f"programs {modules}, of which a step's begin with {FORWARD!r} and {SAMPLER!r}; "
                f"a kernel's statistics are {list(self.known)}"
            )
        starts = [step[0].kernels[0].start for step in steps[1:]]
        samplers = [[r for r in step if r.module.startswith(SAMPLER)] for step in whole]
        return StepFigures(
            steps=len(whole),
            period_s=median(after - start for start, after in pairwise(starts)) / 1e9,
            kernels=median(sum(len(run.kernels) for run in step) for step in whole),
            programs_s=median(sum(run.span_s for run in step) for step in whole),
            gaps_s=median(sum(run.span_s - run.busy_s for run in step) for step in whole),
            sampler_s=median(sum(run.busy_s for run in runs) for runs in samplers),
            sampler_kernels=median(sum(len(run.kernels) for run in runs) for runs in samplers),
        )

    def table(self, most: int = 12) -> str:
        """The kernels that take the most time, a line each."""
        seconds: Counter[str] = Counter()
        for kernel in self.kernels:
            seconds[kernel.name] += (kernel.end - kernel.start) / 1e9
        calls = Counter(kernel.name for kernel in self.kernels)
        lines = [f"{'ms':>9} {'share':>6} {'calls':>6}  kernel"]
        for name, took in seconds.most_common(most):
            share = took / self.window_s
            lines.append(f"{took * 1e3:9.2f} {share:6.1%} {calls[name]:6d}  {name[:90]}")
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
    return activity_of(ProfileData.from_file(str(files[-1])), str(files[-1]))


def activity_of(profile: Any, source: str) -> Activity:
    """The first GPU's activity in a profile.

    Args:
        profile: A ``jax.profiler.ProfileData``.
        source: Where it is from, for messages.

    Raises:
        ValueError: It shows no kernels of a GPU.
    """
    named = {plane.name: plane for plane in profile.planes}
    gpu = next((named[name] for name in sorted(named) if name.startswith("/device:GPU")), None)
    if gpu is None:
        raise ValueError(f"{source} shows no GPU, only {', '.join(named)}")
    kernels, known = [], ()
    for line in gpu.lines:
        if not (line.name.startswith("Stream") and "Compute" in line.name):
            continue
        for event in line.events:
            # Kernels of a command buffer carry the program that launched it, as others do.
            stats = {name: value for name, value in event.stats if name is not None}
            known = known or tuple(sorted(stats))
            module = str(stats.get("hlo_module", ""))
            end = event.start_ns + event.duration_ns
            kernels.append(Kernel(event.name, event.start_ns, end, module))
    if not kernels:
        lines = ", ".join(line.name for line in gpu.lines)
        raise ValueError(f"{source} shows no kernels on a compute stream; its lines: {lines}")
    return Activity(tuple(sorted(kernels, key=lambda kernel: kernel.start)), known)


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
