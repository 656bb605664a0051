"""How many tokens prefill may fill a step to, so that a job ends soonest (no jax).

Where prefill takes all that decode leaves of the token budget, a job runs in waves: long steps
until the KV cache is full, then thin ones of decode alone, in which matrix products are short of
rows. Spread over more steps, prefill keeps all of them at one size, and sequences end one by one,
each making room for the next; but the last ones start later. Which of it is faster depends on the
work, so the rest of the job is followed in coarse strides for each size that a step can have.
"""

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import exp, inf
from operator import mul

from sidp_jax.request import Sequence

STRIDES = 16
"""Strides that an output is cut into."""
# Of a long queue so many times what runs at once is looked at: a job's end weighs little there.
_MOST_WAVES = 8
_LEAST_GAIN = 0.04
# The choice is made anew when the queue has changed by this share, and by so many sequences.
_CHANGE, _LEAST_CHANGE = 0.2, 8
# Finished sequences from which it is believed how much of its limit an output uses.
_ENOUGH_FINISHED = 32


@dataclass(frozen=True)
class StepCosts:
    """What steps cost, apart from attention, which costs the same in whichever steps it is done.

    Attributes:
        sizes: The numbers of tokens that steps are padded to, ascending.
        seconds: Time of a step of each size.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def padded(self, tokens: float | int) -> int:
        """The size that a step of so many tokens is padded to."""
        return self.sizes[self._place(tokens)]

    def of(self, tokens: float | int) -> float:
        """Time of a step of so many tokens."""
        return self.seconds[self._place(tokens)]

    def _place(self, tokens: float | int) -> int:
        return min(bisect_left(self.sizes, tokens), len(self.sizes) - 1)


@dataclass(frozen=True)
class Work:
    """One replica's share of the work that is left.

    Attributes:
        waiting: Sequences in the queue.
        prompt: Their mean prompt, in tokens.
        output: Their mean output, in tokens.
        progress: How far each running sequence is with its output, 0 to 1.
        slots: Most sequences that run at a time.
        kv_tokens: Tokens that the cache holds.
    """

    waiting: float | int
    prompt: float | int
    output: float | int
    progress: tuple[float, ...]
    slots: int
    kv_tokens: int


def best_size(costs: StepCosts, work: Work, now: int) -> int:
    """The size up to which prefill fills steps so that the work ends soonest.

    That is the size of ``now``, unless another gains more than the errors of such an estimate.
    """
    least = costs.sizes[-1] // 16  # nothing is won by thinner steps
    seconds = {size: seconds_left(costs, work, size) for size in costs.sizes if size >= least}
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < (1 - _LEAST_GAIN) * seconds[now] else now


def seconds_left(costs: StepCosts, work: Work, size: int) -> float:
    """About how long the work takes if prefill fills each step to ``size`` tokens.

    Sequences are a fluid here, in groups by age. Where they outgrow the cache, the youngest stop,
    and go on later after their tokens are computed again, as in the scheduler. Infinite where there
    is no end in sight.
    """
    stride = max(work.output / STRIDES, 1.0)
    held = [work.prompt + age * stride for age in range(STRIDES + 1)]
    concurrency = min(work.slots, work.kv_tokens / (work.prompt + work.output / 2))
    waiting = min(work.waiting, _MOST_WAVES * concurrency)
    running, stopped = [0.0] * STRIDES, [0.0] * STRIDES
    for progress in work.progress:
        running[min(int(progress * STRIDES), STRIDES - 1)] += 1
    total = 0.0
    for _ in range(4 * STRIDES * (_MOST_WAVES + 2)):
        decodes = sum(running)
        if waiting + decodes + sum(stopped) < 0.5:
            return total
        filled = max(size, costs.padded(decodes))
        budget = max(filled - decodes, 1e-9)
        most = budget * stride
        left = most
        for age in reversed(range(STRIDES)):
            queue = stopped[age] + (waiting if age == 0 else 0)
            if not queue:
                continue
            free = work.kv_tokens - _tokens(running, held[1:])
            room = min(work.slots - sum(running), free / held[age + 1])
            # Each sequence that starts takes a token of every further step's budget.
            starts = left / stride * (1 - exp(-stride / held[age]))
            starts = max(0.0, min(queue, room, starts))
            left -= starts * held[age]
            running[age] += starts
            again = min(starts, stopped[age])
            stopped[age] -= again
            waiting -= starts - again
        steps = min((most - left) / budget, stride)
        total += steps * costs.of(filled) + (stride - steps) * costs.of(sum(running))
        _stop_youngest(running, stopped, held, work.kv_tokens)
        running, stopped = [0.0, *running[:-1]], [0.0, *stopped[:-1]]
    return inf


def _tokens(groups: Seq[float], held: Seq[float | int]) -> float:
    return sum(map(mul, groups, held))


def _stop_youngest(
    running: list[float], stopped: list[float], held: list[float | int], kv_tokens: int
) -> None:
    """Stops the youngest of those that will not fit when all but the oldest are a stride older."""
    over = _tokens(running[:-1], held[2:]) - kv_tokens
    for age in range(STRIDES - 1):
        if over <= 0:
            return
        out = min(running[age], over / held[age + 2])
        running[age] -= out
        stopped[age] += out
        over -= out * held[age + 2]


class Pace:
    """Follows the queue, and says what size steps should have now.

    Args:
        costs: What steps cost; None if prefill is to take all that decode leaves of the budget.
    """

    def __init__(self, costs: StepCosts | None):
        self.costs = costs
        self.waiting = self.prompt_tokens = self.output_tokens = 0
        self._ended = self._produced = self._limits = 0
        self._size = costs.sizes[-1] if costs else 0
        self._chosen_at = 0  # sequences that waited when the size was chosen

    def queue(self, sequence: Sequence, sign: int = 1) -> None:
        """Counts a sequence that enters the queue; with ``sign=-1`` one that leaves it."""
        self.waiting += sign
        self.prompt_tokens += sign * sequence.num_known
        self.output_tokens += sign * (sequence.max_tokens - len(sequence.output))

    def end(self, sequence: Sequence) -> None:
        """Counts a sequence that has ended, by itself or at its limit."""
        self._ended += 1
        self._produced += len(sequence.output)
        self._limits += sequence.max_tokens

    def step_size(
        self,
        running: Seq[Sequence],
        pool_size: int,
        slots: int,
        kv_tokens: int,
        computed: float | int = 1,
    ) -> int:
        """Tokens that prefill may fill a replica's step to.

        Args:
            running: The running sequences of all replicas.
            pool_size: Replicas.
            slots: Most sequences that a replica runs at a time.
            kv_tokens: Tokens that a replica's cache holds.
            computed: Share of the prompts' tokens that no other sequence has computed: they alone
                take time, and room of their own.
        """
        if not self.waiting:
            return self._size
        change = abs(self.waiting - self._chosen_at)
        if change > max(_LEAST_CHANGE, _CHANGE * self._chosen_at):
            used = self._produced / self._limits if self._ended >= _ENOUGH_FINISHED else 1.0
            work = Work(
                waiting=self.waiting / pool_size,
                prompt=computed * self.prompt_tokens / self.waiting,
                output=max(1.0, used * self.output_tokens / self.waiting),
                progress=tuple(
                    min(1.0, len(sequence.output) / (used * sequence.max_tokens))
                    for sequence in running[::pool_size]
                ),
                slots=slots,
                kv_tokens=kv_tokens,
            )
            self._size, self._chosen_at = best_size(self.costs, work, self._size), self.waiting
        return self._size
