"""Close calls between configurations, settled by replaying a job. No jax.

The estimate of throughput knows a steady state. It counts neither preemption nor that all sequences
of a job start together, and the steps that the scheduler really makes are not quite those that it
assumes: of two configurations that it rates nearly alike it may prefer the slower one. So those
that come close to the best are replayed (``replay.py``): the real scheduler, page allocator and
policy do a job of the stated workload, in the same step times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sidp_jax.estimate import Setting, Workload
from sidp_jax.plan_search import Option
from sidp_jax.replay import Job, Simulated, simulate

WORTHWHILE = 1.05
"""A pool must promise this much over the best plain configuration: the figures that speak for it
are no better known."""

CLOSE = 0.85
"""Share of the best estimate from which a configuration is replayed: estimates of the same kind of
step differ from its replay by up to a tenth."""

ROUNDS, MOST_ROUNDS = 2, 8
"""Requests of the replayed job, as a multiple of the sequences that run at a time: at least, and
where that costs little. A job that is known to be shorter is replayed as it is."""

SHORT = 1.5
"""Of a job of known size, up to so many times the replayed one, the time of all of it counts. Of a
longer one the steady state does."""

WORK = 1 << 20
"""What costs little: so many times that a sequence is planned in a step."""

_PLANNED_STEPS = 8
"""Steps that are planned one by one for each sequence that ends; those between are skipped."""

PROMPT_SPREAD, OUTPUT_SPREAD = 0.5, 0.75
"""Prompts and outputs of the replayed job are uniform within these shares of their means, as far as
``max_model_len`` has room. The more outputs vary the worse does what is short of cache, as those in
the cache are the longer ones: what is best may hang on it."""

FEWEST = 128
"""Requests that every pool gets at least, unless it is known that there are fewer."""


@dataclass(frozen=True)
class Replay:
    """A configuration beside what it did in a job; ``job`` is None if it was not replayed."""

    option: Option
    job: Simulated | None

    def rate(self, whole: bool) -> float:
        """Output tokens/s: of the whole job, of its steady state, or as estimated."""
        if self.job is None:
            return self.option.rate
        if whole:
            return self.job.output_tokens_per_second
        return self.job.steady_output_tokens_per_second


@dataclass(frozen=True)
class Choice:
    """What to run.

    Attributes:
        plain: The best plain configuration; None where none fits.
        pooled: The best pool; None where none fits.
        pool: Whether the pool is worth it.
        whole: Whether whole jobs were compared, and not the steady state.
    """

    plain: Replay | None
    pooled: Replay | None
    pool: bool
    whole: bool

    @property
    def best(self) -> Replay | None:
        """What is recommended; None where nothing fits."""
        return self.pooled if self.pool else self.plain


def replay_close(
    setting: Setting, options: Iterable[Option | None], workload: Workload
) -> list[Replay]:
    """Replays those configurations that are estimated to be nearly as good as the best.

    A pool must come as near to what would make it worth its while. Where only one configuration is
    left, there is nothing to settle, and none is replayed.

    Args:
        setting: What they share.
        options: Configurations; those that do not fit are left out.
        workload: Mean lengths, and how many requests if that is known.
    """
    fitting = [option for option in options if option is not None and option.speed is not None]
    least = CLOSE * max((option.rate for option in fitting), default=0.0)
    plain = [option.rate for option in fitting if not option.is_pool]
    least_pool = max(least, CLOSE * WORTHWHILE * max(plain, default=0.0))
    close = [o for o in fitting if o.rate >= (least_pool if o.is_pool else least)]
    if len(close) < 2:
        return [Replay(option, None) for option in fitting]
    job = _job(setting, close, workload)
    return [Replay(o, replay(setting, o, job) if o in close else None) for o in fitting]


@lru_cache(maxsize=64)
def replay(setting: Setting, option: Option, job: Job) -> Simulated:
    """A job on a configuration, with as many pages as its memory is estimated to hold."""
    pages = option.held.kv_tokens // setting.page_size
    return simulate(setting, option.candidate, pages, job)


def rounds(options: Sequence[Option], output: int) -> int:
    """Requests of a job that shows a steady state, for configurations to be compared in it.

    Where few sequences run at a time all of them start and end together for some rounds, and a job
    of more rounds is needed, and is quick to replay.

    Args:
        options: The configurations; the widest decides.
        output: Mean tokens of an output.
    """
    widest = _widest(options)
    planned = min(output, _PLANNED_STEPS * widest)
    count = max(ROUNDS * widest, min(MOST_ROUNDS * widest, WORK // planned))
    return max(count, FEWEST * max(option.candidate.pools for option in options))


def _widest(options: Sequence[Option]) -> int:
    """Most sequences that one of some configurations runs at a time."""
    return max(option.candidate.num_replicas * option.speed.running for option in options)


def _job(setting: Setting, options: Sequence[Option], workload: Workload) -> Job:
    """A job of the workload's mean lengths; of a long one only the first rounds."""
    count, known = rounds(options, workload.output), workload.requests
    if 0 < known < count:
        count = known
    prompt, output, limit = workload.prompt, workload.output, setting.max_model_len
    spreads = (
        min(PROMPT_SPREAD, (limit - output) / prompt - 1),
        min(OUTPUT_SPREAD, (limit - prompt) / output - 1),
    )
    return Job(prompt, output, count, *spreads, "plan", limit)


def choose(replays: Sequence[Replay], workload: Workload) -> Choice:
    """The best plain configuration, the best pool, and which of them to run.

    A replayed one is never given up for one whose estimate was too far behind to be replayed. Of a
    job that is known to be short, the time of all of it decides (``SHORT``), otherwise the steady
    state.

    Args:
        replays: What ``replay_close`` found.
        workload: The same as there.
    """
    played = [replay for replay in replays if replay.job is not None] or list(replays)
    replayed = [replay.job.requests for replay in played if replay.job is not None]
    whole = 0 < workload.requests <= SHORT * max(replayed, default=0)

    def best(pooled: bool) -> Replay | None:
        for among in (played, replays):
            kind = [r for r in among if r.option.is_pool == pooled]
            if kind:
                return max(kind, key=lambda r: r.rate(whole))
        return None

    plain, pooled = best(pooled=False), best(pooled=True)
    if plain is None or pooled is None:
        return Choice(plain, pooled, pooled is not None, whole)
    if (plain.job is None) != (pooled.job is None):
        pool = pooled.job is not None
    else:
        pool = pooled.rate(whole) > WORTHWHILE * plain.rate(whole)
    return Choice(plain, pooled, pool, whole)
