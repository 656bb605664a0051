"""A job on a node that is not there: the real scheduler and policy, with estimated step times.

One pool is replayed: every step is planned by ``sidp_jax.scheduler``, its mode picked by
``sidp_jax.modes.policy``, and it lasts as long as ``sidp_jax.estimate`` says, with the attention of
the replica that takes longest. Plans run one step ahead of results, as in ``sidp_jax.engine``. The
pools of a node work on equal shares of the job, so one stands for all of them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sidp_jax.estimate import (
    Candidate,
    Setting,
    attention_seconds,
    bucket,
    buckets,
    policy_of,
    step_seconds,
)
from sidp_jax.modes.policy import PolicyState, Switch
from sidp_jax.pages import PageAllocator
from sidp_jax.request import SamplingParams, Sequence
from sidp_jax.scheduler import Chunk, Scheduler, SchedulerConfig, StepPlan
from sidp_jax.settle import step_costs

_POINTS = 9
_MANY = 1 << 20
_ENDS = np.linspace(-0.15, 0.15, 61)
_EVEN = 16
"""Requests in a row of a random job that are spread evenly over the range of lengths."""

Lengths = Seq[tuple[int, int]]
"""Prompt and output tokens of each request."""


@dataclass(frozen=True)
class Job:
    """Random requests about a mean.

    Attributes:
        prompt: Mean tokens of a prompt.
        output: Mean tokens of an output.
        requests: How many.
        prompt_spread: Prompts are uniform within this share of their mean.
        output_spread: The same of outputs.
        seed: Another one gives other requests.
        limit: Most tokens of a request; longer outputs end there. None is no limit.
    """

    prompt: int
    output: int
    requests: int
    prompt_spread: float
    output_spread: float
    seed: str
    limit: int | None = None

    @property
    def longest(self) -> int:
        """Tokens that no request exceeds."""
        reach = int(self.prompt * self.prompt_spread) + int(self.output * self.output_spread)
        longest = self.prompt + self.output + reach
        return longest if self.limit is None else min(longest, self.limit)

    def share(self, pools: int) -> list[tuple[int, int]]:
        """The requests of one of so many pools, in random order.

        Among any few requests in a row, prompts and outputs are spread evenly over their ranges. So
        a share of few requests means as much work as any other, and so does every part of it: what
        is compared are configurations, not their luck.
        """
        rng = random.Random(f"{self.seed},{pools}")
        count = -(-self.requests // pools)

        def drawn(mean: int, spread: float) -> list[int]:
            low, high = mean - int(mean * spread), mean + int(mean * spread)
            places: list[float] = []
            while len(places) < count:
                size = min(_EVEN, count - len(places))
                block = [(index + rng.random()) / size for index in range(size)]
                rng.shuffle(block)
                places += block
            return [max(1, low + int(place * (high + 1 - low))) for place in places]

        prompts = drawn(self.prompt, self.prompt_spread)
        outputs = drawn(self.output, self.output_spread)
        longest = self.longest
        return [(p, min(o, longest - p)) for p, o in zip(prompts, outputs, strict=True)]


@dataclass
class Simulated:
    """What a job did.

    Attributes:
        requests: Requests of the node.
        seconds: From the first step to the last token.
        prompt_tokens: Of the node.
        output_tokens: Of the node.
        steady_output_tokens_per_second: Of the node, while the job went from a quarter to three
            quarters of its output: without ramp and tail.
        steps: Of one pool, by mode.
        switches: Of one pool.
        preemptions: Of one pool.
        peak_running: Most sequences of one replica, on average over the replicas.
        planned: Steps that the scheduler planned one by one; the others repeat one of these.
    """

    requests: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    steady_output_tokens_per_second: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)
    switches: list[Switch] = field(default_factory=list)
    preemptions: int = 0
    peak_running: float = 0.0
    planned: int = 0

    @property
    def output_tokens_per_second(self) -> float:
        """Over the whole job."""
        return self.output_tokens / self.seconds


class SharedPrefix(NamedTuple):
    """What prompts begin with alike, for the prefix cache to find.

    Attributes:
        tokens: How many tokens.
        requests: How many requests, one after the other, share one beginning; None is all.
    """

    tokens: int
    requests: int | None = None

    @classmethod
    def parse(cls, text: str) -> SharedPrefix:
        """From ``TOKENS`` or ``TOKENS,REQUESTS``.

        Raises:
            ValueError: It is neither, or a number is below 1.
        """
        parts = text.split(",")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(
                f"shared prefix {text!r} must be TOKENS or TOKENS,REQUESTS, both at least 1"
            )
        return cls(*map(int, parts))

    def group(self, index: int) -> int:
        """Which of the beginnings the prompt of request ``index`` has."""
        return 0 if self.requests is None else index // self.requests


class PoolSimulator:
    """Replays one pool's share of a job.

    Args:
        setting: Model and hardware.
        candidate: The configuration; the share is that of one of its pools.
        num_kv_pages: Pages of one replica.
        lengths: The share's requests.
        skip: Whether runs of steps in which the same sequences decode and prefill, and nobody is
            admitted or ends, are taken in one go. The result is the same; without it every step is
            planned.
        spread: Whether prefill is spread over steps of the best size, as ``prefill: spread`` says.
        shared_prefix: What prompts begin with alike; without it there is no prefix cache.
    """

    def __init__(
        self,
        setting: Setting,
        candidate: Candidate,
        num_kv_pages: int,
        lengths: Lengths,
        *,
        skip: bool = True,
        spread: bool = True,
        shared_prefix: SharedPrefix | None = None,
    ):
        self.setting, self.candidate = setting, candidate
        # With shared pages the first of the queue may get in while nobody ends.
        self.skip = skip and shared_prefix is None
        self.lengths = lengths
        self.policy = policy_of(setting, candidate)
        self.result = Simulated(requests=len(lengths))
        self._decision = PolicyState()
        self._produced = [(0.0, 0)]  # (seconds, output tokens) after each run of steps
        self.scheduler = Scheduler(
            SchedulerConfig(
                candidate.pool_size,
                candidate.max_num_seqs,
                candidate.max_num_batched_tokens,
                setting.max_model_len,
                setting.page_size,
                num_kv_pages,
                step_costs(self.policy, buckets(candidate)) if spread else None,
                prefix_caching=shared_prefix is not None,
            )
        )
        prompts: dict[int, list[int]] = {}
        params = SamplingParams(temperature=0, ignore_eos=True)
        for index, (prompt, output) in enumerate(lengths):
            if shared_prefix is not None:
                alike = min(prompt, shared_prefix.tokens)
                tokens = [-1 - shared_prefix.group(index)] * alike + [index] * (prompt - alike)
            else:
                tokens = prompts.setdefault(prompt, [0] * prompt)
            self.scheduler.add(Sequence(index, str(index), 0, tokens, params, 0, output))
            self.result.prompt_tokens += prompt
            self.result.output_tokens += output

    def run(self) -> Simulated:
        """Runs the share to its end."""
        scheduler, result = self.scheduler, self.result
        in_flight: StepPlan | None = None
        while True:
            before = scheduler.num_preemptions, scheduler.num_running
            plan = scheduler.schedule()
            ended = self._collect(in_flight) if in_flight is not None else 0
            if plan is None and in_flight is None:
                break
            if plan is not None:
                self._step(plan)
                quiet = before == (scheduler.num_preemptions, scheduler.num_running)
                if self.skip and quiet and not ended:
                    self._repeat(plan)
            in_flight = plan
        assert not scheduler.num_waiting, "nothing runs, and the first in the queue does not fit"
        result.preemptions = scheduler.num_preemptions
        result.steady_output_tokens_per_second = self._steady()
        return result

    def _collect(self, plan: StepPlan) -> int:
        """Hands the scheduler a step's tokens, as the engine does; returns how many ended."""
        record, ended = self.scheduler.record_token, 0
        for chunks in plan.replicas:
            for sequence, _, _, samples in chunks:
                if not samples:
                    continue
                if sequence.slot is None:
                    record(sequence, 0)
                else:  # what that does for a running sequence
                    sequence.num_pending -= 1
                    sequence.output.append(0)
                if len(sequence.output) >= sequence.max_tokens:
                    self.scheduler.finish(sequence, "length")
                    ended += 1
        return ended

    def _step(self, plan: StepPlan) -> None:
        """Lets one step pass."""
        tokens = bucket(self.candidate, plan.max_tokens)
        self._decision, switch = self.policy.decide(self._decision, tokens)
        if switch is not None:
            self.result.switches.append(switch)
        attention, sampled = 0.0, 0
        for chunks in plan.replicas:
            sampled += [chunk[3] for chunk in chunks].count(True)
            decodes, prefills = _split(chunks)
            read = sum([chunk[1] for chunk in decodes]) + len(decodes)
            attention = max(attention, self._attention(tokens, read, prefills))
        running = self.scheduler.num_running / self.candidate.pool_size
        self.result.peak_running = max(self.result.peak_running, running)
        self.result.planned += 1
        self._pass(self._seconds(tokens, attention), 1, sampled)

    def _attention(self, tokens: int, read: int, prefills: Seq[Chunk], later: int = 0) -> float:
        """Seconds of one layer's attention, the prefills so many steps of their length further."""
        products = [
            (n * (start + later * n) + n * (n + 1) // 2, start + later * n + n)
            for _, start, n, _ in prefills
        ]
        return attention_seconds(self.setting, self.candidate, tokens, read, products)

    def _seconds(self, tokens: int, attention: float) -> float:
        mode = self._decision.mode
        return step_seconds(self.setting, self.candidate, self.policy, mode, tokens, attention)

    def _pass(self, seconds: float, steps: int, sampled: int) -> None:
        result = self.result
        result.seconds += seconds
        result.steps[self._decision.mode] += steps
        self._produced.append((result.seconds, self._produced[-1][1] + sampled))

    def _repeat(self, plan: StepPlan) -> None:
        """Takes the steps in one go that would be ``plan`` again, each a step further on.

        That is so while who decodes goes on decoding, who prefills has more than its chunk to go,
        none ends, none needs a page that is not there, and the first of the queue cannot be
        admitted: since the last plan neither admitted nor preempted anyone, budgets stay what they
        are and pages only get fewer, it cannot be until a sequence ends or has prefilled.
        """
        parts = [_split(chunks) for chunks in plan.replicas]
        count = None
        for _, prefills in parts:
            for sequence, _, length, samples in prefills:
                if samples:
                    return
                left = (sequence.num_remaining - 1) // length
                count = left if count is None else min(count, left)
        for decodes, _ in parts:
            if count == 0 or not all(chunk[3] for chunk in decodes):
                return
            if decodes:
                left = min([s.max_tokens - len(s.output) - s.num_pending for s, *_ in decodes])
                count = left if count is None else min(count, left)
        for replica, (decodes, _) in zip(self.scheduler.replicas, parts, strict=True):
            count = min(count, self._steps_of_pages(replica.allocator, decodes, count))
        if count < 1:
            return
        for replica, (decodes, prefills) in zip(self.scheduler.replicas, parts, strict=True):
            for sequence, *_ in decodes:
                sequence.num_computed += count
                sequence.output.extend([0] * count)
                needed = -(-sequence.num_computed // self.setting.page_size) - len(sequence.pages)
                if needed > 0:
                    sequence.pages.extend(replica.allocator.allocate(needed))
            for sequence, _, length, _ in prefills:
                sequence.num_computed += count * length
        self._pass_repeated(bucket(self.candidate, plan.max_tokens), parts, count)

    def _steps_of_pages(self, allocator: PageAllocator, decodes: list[Chunk], most: int) -> int:
        """Of ``most`` steps, how many a replica's free pages suffice for."""
        page_size, free = self.setting.page_size, allocator.num_free
        room = np.array([len(s.pages) * page_size - s.num_computed for s, *_ in decodes])

        def needed(steps: int) -> int:
            return int(np.maximum(-(-(steps - room) // page_size), 0).sum())

        if not room.size or needed(most) <= free:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= free else (low, middle)
        return low

    def _pass_repeated(
        self, tokens: int, parts: list[tuple[list[Chunk], list[Chunk]]], count: int
    ) -> None:
        """Lets ``count`` steps pass, in each of which every context is a step longer."""
        steps = np.arange(1, count + 1)
        least = self._attention(tokens, 0, [])
        per_token = (self._attention(tokens, _MANY, []) - least) / _MANY
        attention = np.zeros(count)
        for decodes, prefills in parts:
            read = sum([chunk[1] for chunk in decodes]) + len(decodes) * (1 + steps)
            seconds = least + per_token * read
            if prefills:
                added = [self._attention(tokens, 0, prefills, later) for later in steps.tolist()]
                seconds += np.array(added) - least
            attention = np.maximum(attention, seconds)
        # A step's time is linear in its attention, so few points do.
        points = np.unique(np.linspace(attention.min(), attention.max(), _POINTS))
        seconds = [self._seconds(tokens, point) for point in points.tolist()]
        sampled = sum(len(decodes) for decodes, _ in parts)
        total = float(np.interp(attention, points, seconds).sum())
        self._pass(total, count, count * sampled)

    def _steady(self) -> float:
        """Output tokens per second of this pool between a quarter and three quarters of them.

        Either end is averaged over its neighbourhood: a few long outputs there would count as
        speed where most of the time goes into prompts.
        """
        seconds, tokens = np.array(self._produced).T
        lower, upper = (
            np.interp((share + _ENDS) * tokens[-1], tokens, seconds).mean()
            for share in (0.25, 0.75)
        )
        return float(0.5 * tokens[-1] / (upper - lower))


def _split(chunks: list[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """A replica's chunks of one token, which come first, and the others."""
    end = len(chunks)
    while end and chunks[end - 1][2] > 1:
        end -= 1
    return chunks[:end], chunks[end:]


def simulate(
    setting: Setting,
    candidate: Candidate,
    num_kv_pages: int,
    job: Lengths | Job,
    *,
    skip: bool = True,
    spread: bool = True,
    shared_prefix: SharedPrefix | None = None,
) -> Simulated:
    """Replays a job on all pools of a node.

    Args:
        setting: Model and hardware.
        candidate: The configuration.
        num_kv_pages: Pages of one replica.
        job: Its requests; each pool gets an equal share, and the first the largest.
        skip: See ``PoolSimulator``.
        spread: See ``PoolSimulator``.
        shared_prefix: See ``PoolSimulator``.
    """
    pools = candidate.pools
    share = job.share(pools) if isinstance(job, Job) else job[::pools]
    options = {"skip": skip, "spread": spread, "shared_prefix": shared_prefix}
    result = PoolSimulator(setting, candidate, num_kv_pages, share, **options).run()
    result.steady_output_tokens_per_second *= pools
    if isinstance(job, Job):
        result.requests *= pools
        result.prompt_tokens *= pools
        result.output_tokens *= pools
    else:
        result.requests = len(job)
        result.prompt_tokens = sum(prompt for prompt, _ in job)
        result.output_tokens = sum(output for _, output in job)
    return result
