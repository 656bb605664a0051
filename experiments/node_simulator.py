"""A job on a node that is not there: the real scheduler and policy, with estimated step times.

One pool is replayed: every step is planned by ``sidp_jax.scheduler``, its mode picked by
``sidp_jax.modes.policy``, and it lasts as long as ``sidp_jax.estimate`` says, with the attention of
the replica that takes longest. Plans run one step ahead of results, as in ``sidp_jax.engine``. The
pools of a node work on equal shares of the job, so one stands for all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

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
from sidp_jax.request import SamplingParams, Sequence
from sidp_jax.scheduler import Scheduler, SchedulerConfig, StepPlan
from sidp_jax.settle import step_costs

_POINTS = 9

Lengths = Seq[tuple[int, int]]
"""Prompt and output tokens of each request."""


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
        planned: Steps that the scheduler planned one by one; the others only repeat decodes.
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


class PoolSimulator:
    """Replays one pool's share of a job.

    Args:
        setting: Model and hardware.
        candidate: The configuration; the share is that of one of its pools.
        num_kv_pages: Pages of one replica.
        lengths: The share's requests.
        skip: Whether runs of steps that only decode, admit nobody and end nobody are taken in one
            go. The result is the same; without it every step is planned.
    """

    def __init__(
        self,
        setting: Setting,
        candidate: Candidate,
        num_kv_pages: int,
        lengths: Lengths,
        *,
        skip: bool = True,
    ):
        self.setting, self.candidate, self.skip = setting, candidate, skip
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
                step_costs(self.policy, buckets(candidate)),
            )
        )
        prompts: dict[int, list[int]] = {}
        params = SamplingParams(temperature=0, ignore_eos=True)
        for index, (prompt, output) in enumerate(lengths):
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
                record(sequence, 0)
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
            sampled += sum([chunk.samples for chunk in chunks])
            read = sum([chunk.start + 1 for chunk in chunks if chunk.length == 1])
            prefills = [
                (n * start + n * (n + 1) // 2, start + n) for _, start, n, _ in chunks if n > 1
            ]
            seconds = attention_seconds(self.setting, self.candidate, tokens, read, prefills)
            attention = max(attention, seconds)
        running = self.scheduler.num_running / self.candidate.pool_size
        self.result.peak_running = max(self.result.peak_running, running)
        self.result.planned += 1
        self._pass(self._seconds(tokens, attention), 1, sampled)

    def _seconds(self, tokens: int, attention: float) -> float:
        mode = self._decision.mode
        return step_seconds(self.setting, self.candidate, self.policy, mode, tokens, attention)

    def _pass(self, seconds: float, steps: int, sampled: int) -> None:
        result = self.result
        result.seconds += seconds
        result.steps[self._decision.mode] += steps
        self._produced.append((result.seconds, self._produced[-1][1] + sampled))

    def _repeat(self, plan: StepPlan) -> None:
        """Takes the steps in one go that would be ``plan`` again, each a token further on.

        That is so while all sequences decode, none ends, none needs a page that is not there, and
        the first of the queue cannot be admitted: since the last plan neither admitted nor
        preempted anyone and pages only get fewer, it cannot be until a sequence ends.
        """
        chunks = [chunk for chunks in plan.replicas for chunk in chunks]
        if len(chunks) != self.scheduler.num_running or not all(
            chunk.length == 1 and chunk.samples for chunk in chunks
        ):
            return
        count = min(
            c.sequence.max_tokens - len(c.sequence.output) - c.sequence.num_pending for c in chunks
        )
        for replica in self.scheduler.replicas:
            count = min(count, self._steps_of_pages(replica, count))
        if count < 1:
            return
        page_size = self.setting.page_size
        for replica in self.scheduler.replicas:
            for sequence in replica.running:
                sequence.num_computed += count
                sequence.output.extend([0] * count)
                needed = -(-sequence.num_computed // page_size) - len(sequence.pages)
                if needed > 0:
                    sequence.pages.extend(replica.allocator.allocate(needed))
        self._pass_repeated(plan, count, len(chunks))

    def _steps_of_pages(self, replica, most: int) -> int:
        """Of ``most`` steps, how many a replica's free pages suffice for."""
        page_size, free = self.setting.page_size, replica.allocator.num_free
        room = np.array([len(s.pages) * page_size - s.num_computed for s in replica.running])

        def needed(steps: int) -> int:
            return int(np.maximum(-(-(steps - room) // page_size), 0).sum())

        if not room.size or needed(most) <= free:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if needed(middle) <= free else (low, middle)
        return low

    def _pass_repeated(self, plan: StepPlan, count: int, sampled: int) -> None:
        """Lets ``count`` steps pass, in which every context of ``plan`` grows by one a step."""
        tokens = bucket(self.candidate, plan.max_tokens)
        steps = np.arange(1, count + 1)
        reads = [
            sum(chunk.start + 1 for chunk in chunks) + len(chunks) * steps
            for chunks in plan.replicas
        ]
        longest = np.max(reads, axis=0)
        # A step's time is linear in its attention, and attention in what it reads: few points do.
        points = np.unique(np.linspace(longest[0], longest[-1], _POINTS).astype(int))
        seconds = [
            self._seconds(tokens, attention_seconds(self.setting, self.candidate, tokens, end, []))
            for end in points.tolist()
        ]
        total = float(np.interp(longest, points, seconds).sum())
        self._pass(total, count, count * sampled)

    def _steady(self) -> float:
        """Output tokens per second of this pool between a quarter and three quarters of them."""
        seconds, tokens = np.array(self._produced).T
        lower, upper = (np.interp(share * tokens[-1], tokens, seconds) for share in (0.25, 0.75))
        return 0.5 * tokens[-1] / (upper - lower)


def simulate(
    setting: Setting,
    candidate: Candidate,
    num_kv_pages: int,
    lengths: Lengths,
    *,
    skip: bool = True,
) -> Simulated:
    """Replays a job on all pools of a node.

    Args:
        setting: Model and hardware.
        candidate: The configuration.
        num_kv_pages: Pages of one replica.
        lengths: Requests of the job; each pool gets an equal share, and the first the largest.
        skip: See ``PoolSimulator``.
    """
    share = lengths[:: candidate.pools]
    result = PoolSimulator(setting, candidate, num_kv_pages, share, skip=skip).run()
    scale = candidate.pools
    result.requests = len(lengths)
    result.prompt_tokens = sum(prompt for prompt, _ in lengths)
    result.output_tokens = sum(output for _, output in lengths)
    result.steady_output_tokens_per_second *= scale
    return result
