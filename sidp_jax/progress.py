"""How a run gets on: a bar on a terminal, a log line every ten seconds elsewhere (no jax)."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sidp_jax.modes.policy import Switch

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
_BAR_SECONDS = 0.5


def log_to(handler: logging.Handler) -> None:
    """Sends all that this package logs, from INFO on, to one handler and nowhere else."""
    package = logging.getLogger("sidp_jax")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False


@dataclass
class EngineStats:
    """What an engine has done so far.

    Attributes:
        prompt_tokens: Prompt tokens of the finished requests, once per request.
        output_tokens: Tokens generated, those of unfinished requests included.
        steps: Steps per mode.
        switches: Every change of mode, with its cause.
    """

    prompt_tokens: int = 0
    output_tokens: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    switches: list[Switch] = field(default_factory=list)


@runtime_checkable
class Watched(Protocol):
    """What a report reads off the engine."""

    stats: Any  # prompt_tokens, output_tokens, steps
    scheduler: Any  # num_running, num_waiting, num_preemptions, kv_usage, prefix_hit_rate
    mode: str | None
    compilations: int


class ProgressReport:
    """Reports while it is open as a context manager.

    Args:
        engine: The engine at work: its counters are read.
        total: Requests of the whole run.
        done: Requests that were finished before.
        console: Where the bar goes; the error stream by default.
        enabled: Whether to report at all.
    """

    def __init__(
        self,
        engine: Watched,
        total: int,
        *,
        done: int = 0,
        console: Console | None = None,
        enabled: bool = True,
    ):
        self._engine, self._total, self._done = engine, total, done
        console = console or Console(stderr=True)
        self._enabled = enabled
        self._bar: Progress | None = None
        if enabled and console.is_terminal:
            self._bar = Progress(
                TextColumn("requests"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rates]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=done, rates="")
        self._period = LOG_SECONDS if self._bar is None else _BAR_SECONDS
        self._remember(time.monotonic())

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            self._bar.stop()

    def update(self, done: int) -> None:
        """Takes the number of finished requests, and reports if it is time."""
        self._done = done
        now = time.monotonic()
        if not self._enabled or now - self._time < self._period:
            return
        seconds, stats = now - self._time, self._engine.stats
        prompt = (stats.prompt_tokens - self._prompt_tokens) / seconds
        output = (stats.output_tokens - self._output_tokens) / seconds
        if self._bar is None:
            logger.info("%s", self._line(prompt, output))
        else:
            rates = f"{prompt:,.0f} prompt + {output:,.0f} output tokens/s"
            self._bar.update(self._task, completed=done, rates=rates)
        self._remember(now)

    def _line(self, prompt: float, output: float) -> str:
        engine, scheduler = self._engine, self._engine.scheduler
        steps = Counter(engine.stats.steps) - self._steps
        modes = ", ".join(f"{mode} {count}" for mode, count in sorted(steps.items())) or "none"
        return (
            f"requests: {self._done}/{self._total}, running: {scheduler.num_running}, "
            f"waiting: {scheduler.num_waiting}, "
            f"preempted: {scheduler.num_preemptions - self._preemptions}, "
            f"KV cache usage: {scheduler.kv_usage:.1%}, "
            f"prefix cache hit rate: {scheduler.prefix_hit_rate:.1%}, "
            f"prompt throughput: {prompt:.1f} tokens/s, "
            f"generation throughput: {output:.1f} tokens/s, "
            f"mode: {engine.mode} (steps: {modes}), "
            f"compilations: {engine.compilations - self._compilations}"
        )

    def _remember(self, now: float) -> None:
        engine = self._engine
        self._time = now
        self._prompt_tokens = engine.stats.prompt_tokens
        self._output_tokens = engine.stats.output_tokens
        self._steps = Counter(engine.stats.steps)
        self._preemptions = engine.scheduler.num_preemptions
        self._compilations = engine.compilations
