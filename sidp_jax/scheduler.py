"""Continuous batching: which tokens of which sequences every replica computes in the next step.

One global queue feeds all the replicas of a pool. Decode comes first, prefill fills what is left of
the step in chunks (how large a step, `pace` says), and where pages run out the newest sequence
starts again later (preemption by recomputation). The host plans one step ahead: step n+1 is planned
before it knows the tokens of step n: counters run ahead of token values (`Sequence.num_pending`).

Prompts that begin alike share the pages of what they have in common (prefix cache). A page may be
shared from the step on that computes it: in every layer K and V are written before anybody attends.

No jax here. Scheduling as in Orca (iteration level), Sarathi-Serve (chunked prefill beside decode)
and vLLM (paged cache, preemption of the newest).
"""

import heapq
from array import array
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from typing import NamedTuple

from sidp_jax.pace import Pace, StepCosts
from sidp_jax.pages import PageAllocator, leading, page_keys, pages_for
from sidp_jax.request import RequestError, Sequence

_LATER = object()  # a sequence is better off in the queue for now
# Sequences that wait for others' prompts, past which the queue is looked at in one step.
_MOST_HELD = 128


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes of the pool; all but the first are per replica.

    Attributes:
        pool_size: replicas.
        max_num_seqs: most sequences that run at a time.
        max_num_batched_tokens: the token budget of a step.
        max_model_len: most tokens of a sequence, prompt and output together.
        page_size: tokens per page of the KV cache.
        num_kv_pages: pages of the KV cache.
        step_costs: what steps of each size cost, up to the token budget: prefill is spread over
            steps of the best one. If None, prefill takes all that decode leaves of the budget.
        prefix_caching: whether prompts that begin alike share pages.
    """

    pool_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_kv_pages: int
    step_costs: StepCosts | None = None
    prefix_caching: bool = False

    def __post_init__(self):
        for name, value in vars(self).items():
            if name not in ("step_costs", "prefix_caching") and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every running sequence can decode in "
                "every step: raise the one or lower the other"
            )
        if self.step_costs and self.step_costs.sizes[-1] != self.max_num_batched_tokens:
            raise ValueError(
                f"the largest of the step sizes {self.step_costs.sizes} must be "
                f"max_num_batched_tokens={self.max_num_batched_tokens}"
            )


class Chunk(NamedTuple):
    """A run of one sequence's tokens, computed in one step."""

    sequence: Sequence
    start: int  # position of the first token
    length: int
    samples: bool  # whether the last token's logits give the sequence its next token


@dataclass(frozen=True)
class StepPlan:
    """One step: for every replica its chunks, those of one token (decode) first.

    Build the batch from it before anything else changes the sequences.
    """

    replicas: list[list[Chunk]]

    @property
    def max_tokens(self) -> int:
        """Most tokens that a replica has."""
        return max(sum(chunk.length for chunk in chunks) for chunks in self.replicas)

    @property
    def max_seqs(self) -> int:
        """Most sequences that a replica has."""
        return max(len(chunks) for chunks in self.replicas)


@dataclass
class Replica:
    """The host's view of one replica."""

    index: int
    allocator: PageAllocator
    free_slots: list[int]
    running: list[Sequence] = field(default_factory=list)  # oldest first
    coming: Counter[bytes] = field(default_factory=Counter)  # keys of their prompts' pages

    def about_to_come(self, keys: tuple[bytes, ...]) -> int:
        """`PageAllocator.about`, once those that run now have computed their prompts."""
        return leading(keys, lambda key: key in self.coming or self.allocator.knows(key))


@dataclass
class Draft:
    """One replica's part of the step that is being planned."""

    replica: Replica
    budget: int  # tokens left for prefill
    decodes: list[Chunk] = field(default_factory=list)
    prefills: list[Chunk] = field(default_factory=list)
    preempted: bool = False

    def append(self, sequence: Sequence, length: int, remaining: int) -> None:
        """Plan the next `length` of the `remaining` tokens; from here on they count as computed."""
        samples = length == remaining
        chunk = Chunk(sequence, sequence.num_computed, length, samples)
        (self.decodes if length == 1 else self.prefills).append(chunk)
        sequence.num_computed += length
        sequence.num_pending += samples


class Scheduler:
    """The queue, the replicas' running sequences and their pages."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.replicas = [
            Replica(
                index,
                PageAllocator(config.num_kv_pages, config.page_size),
                free_slots=list(range(config.max_num_seqs - 1, -1, -1)),
            )
            for index in range(config.pool_size)
        ]
        self.num_preemptions = 0
        self.num_cached_tokens = 0  # that sequences found in the prefix cache when they started
        self._keyed: tuple[list[int], tuple[bytes, ...]] = ([], ())  # the last prompt, its keys
        self._num_started_tokens = 0
        self._waiting: list[tuple[int, Sequence]] = []  # a heap by seq_id: order of arrival
        self._pace = Pace(config.step_costs)

    # Statistics

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot and pages."""
        return sum(len(replica.running) for replica in self.replicas)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._waiting)

    def untouched(self) -> Iterator[Sequence]:
        """Waiting sequences that have no output yet."""
        for _, sequence in self._waiting:
            if not sequence.output and not sequence.num_pending:
                yield sequence

    @property
    def kv_usage(self) -> float:
        """Share of all pages that is allocated, 0 to 1."""
        allocated = sum(replica.allocator.num_allocated for replica in self.replicas)
        return allocated / (self.config.pool_size * self.config.num_kv_pages)

    @property
    def prefix_hit_rate(self) -> float:
        """Share of the tokens of all started sequences that the prefix cache held, 0 to 1."""
        return self.num_cached_tokens / max(self._num_started_tokens, 1)

    # What the engine calls

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            RequestError: it could never run to its `max_tokens`.
        """
        config = self.config
        size = len(sequence.prompt) + sequence.max_tokens
        what = f"{len(sequence.prompt)} prompt tokens and max_tokens={sequence.max_tokens}"
        if not sequence.prompt or sequence.max_tokens < 1:
            raise RequestError(f"{what}: both must be at least 1")
        if size > config.max_model_len:
            raise RequestError(
                f"{what} are {size} tokens, more than max_model_len={config.max_model_len}: "
                "shorten the prompt or lower max_tokens"
            )
        if pages_for(size, config.page_size) > config.num_kv_pages:
            raise RequestError(
                f"{what} are {size} tokens, more than the KV cache of a replica holds "
                f"({config.num_kv_pages} pages of {config.page_size} tokens): "
                "shorten the prompt, lower max_tokens or raise num_kv_pages"
            )
        self._enqueue(sequence)

    def schedule(self) -> StepPlan | None:
        """Plan the next step.

        Returns:
            The plan, or None where there is nothing to compute: no work at all, or none before the
            tokens of the launched steps are recorded.
        """
        size = self._step_size()
        drafts = [self._plan_running(replica, size) for replica in self.replicas]
        self._admit(drafts)
        plan = StepPlan([draft.decodes + draft.prefills for draft in drafts])
        return plan if plan.max_seqs else None

    def record_token(self, sequence: Sequence, token: int) -> bool:
        """Take the value of a sequence's oldest pending token.

        Returns:
            Whether the token counts: not if the sequence finished while its step was under way.
        """
        if sequence.finish_reason is not None:
            return False
        queued = sequence.slot is None  # preempted since
        if queued:
            self._pace.queue(sequence, -1)
        sequence.num_pending -= 1
        sequence.output.append(token)
        if queued:
            self._pace.queue(sequence)
        return True

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; its slot and pages are free at once.

        A launched step may still write to those pages. That is safe: steps run in order, and
        whoever gets a page next writes each of its slots before reading it.
        """
        self._end([sequence], reason)

    def abort(self, request_id: str) -> list[Sequence]:
        """Drop all sequences of a request, with finish reason "abort"; returns them."""
        dropped = [s for s in self._unfinished() if s.request_id == request_id]
        self._end(dropped, "abort")
        return dropped

    # The policy, piece by piece

    def _step_size(self) -> int:
        """Tokens that prefill fills the step of each replica to."""
        config = self.config
        if config.step_costs is None:
            return config.max_num_batched_tokens
        running = [sequence for replica in self.replicas for sequence in replica.running]
        kv_tokens = config.num_kv_pages * config.page_size
        computed = 1 - self.prefix_hit_rate
        return self._pace.step_size(
            running, config.pool_size, config.max_num_seqs, kv_tokens, computed
        )

    def _plan_running(self, replica: Replica, size: int) -> Draft:
        """Go on with a replica's running sequences, oldest first, in a step of `size` tokens."""
        work = [sequence.num_remaining for sequence in replica.running]
        draft = Draft(replica, budget=self._prefill_budget(size, num_decodes=work.count(1)))
        page_size, decodes = self.config.page_size, draft.decodes
        for sequence, remaining in zip(tuple(replica.running), work, strict=True):
            if sequence.slot is None:
                break  # preempted for an older one, and so are all that are newer
            start = sequence.num_computed
            if remaining == 1 and start < len(sequence.pages) * page_size:
                # What most sequences do in most steps, without the calls that do it below.
                decodes.append(Chunk(sequence, start, 1, True))
                sequence.num_computed = start + 1
                sequence.num_pending += 1
                continue
            length = 1 if remaining == 1 else min(remaining, draft.budget)
            if length == 0 or not self._make_room(draft, sequence, length):
                continue
            draft.append(sequence, length, remaining)
            self._register(sequence)
            if remaining > 1:
                draft.budget -= length
        return draft

    def _prefill_budget(self, size: int, num_decodes: int) -> int:
        """How many tokens prefill may add to a replica's decodes: none of them makes a step longer.

        Where decode alone exceeds `size`, prefill takes the place of the padding.
        """
        if self.config.step_costs and num_decodes > size:
            size = self.config.step_costs.padded(num_decodes)
        return size - num_decodes

    def _make_room(self, draft: Draft, sequence: Sequence, length: int) -> bool:
        """Give a running sequence pages for `length` more tokens, taken from the newest if need be.

        Returns:
            False if the sequence was itself the newest, and had to go.
        """
        page_size = self.config.page_size
        num_tokens = sequence.num_computed + length
        if num_tokens <= len(sequence.pages) * page_size:
            return True
        replica = draft.replica
        needed = pages_for(num_tokens, page_size) - len(sequence.pages)
        while not replica.allocator.can_allocate(needed):
            newest = replica.running[-1]
            self._preempt(newest)
            draft.preempted = True
            if newest is sequence:
                return False
        sequence.pages.extend(replica.allocator.allocate(needed))
        return True

    def _admit(self, drafts: list[Draft]) -> None:
        """Start waiting sequences, in order of arrival, while there is room for the first one.

        Those that are better off later are passed over, and stay first in the queue.
        """
        held: list[tuple[int, Sequence]] = []
        while self._waiting and len(held) < _MOST_HELD:
            sequence = self._waiting[0][1]
            if sequence.num_pending:
                break  # its value is not on the device any more, nor yet here
            place = self._place_of(sequence, drafts)
            if place is None:
                break
            entry = heapq.heappop(self._waiting)
            if place is _LATER:
                held.append(entry)
                continue
            draft, shared, needed = place
            self._pace.queue(sequence, -1)
            self._start(sequence, draft.replica, shared, needed)
            remaining = sequence.num_remaining
            length = min(remaining, draft.budget)
            draft.append(sequence, length, remaining)
            self._register(sequence)
            draft.budget -= length
        for entry in held:
            heapq.heappush(self._waiting, entry)

    def _place_of(
        self, sequence: Sequence, drafts: list[Draft]
    ) -> tuple[Draft, list[int], int] | object | None:
        """Where a waiting sequence can start now, with the pages that it shares and lacks there.

        That is the replica with the fewest pages in use; those that the sequence lacks there count
        twice, as they take room and time. So load is even, and prompts that begin alike meet where
        their beginning is. While most of a sequence is being computed somewhere for another one,
        it waits for that (`_LATER`), and those behind it go first.
        """
        whole = pages_for(sequence.num_tokens + 1, self.config.page_size)
        keys = self._shareable_keys(sequence)
        options, later = [], []
        for place, draft in enumerate(drafts):
            replica = draft.replica
            if not replica.free_slots or draft.preempted:
                continue
            in_use = replica.allocator.num_allocated
            if draft.budget > 0:
                found = replica.allocator.about(keys)
                options.append((in_use + 2 * (whole - found), place, found))
            else:
                coming = replica.about_to_come(keys)
                later.append((in_use + 2 * (whole - coming), coming))
        options.sort()
        least, _, found = options[0] if options else (inf, 0, 0)
        if any(cost < least and coming - found > whole / 2 for cost, coming in later):
            return _LATER
        for _, place, _ in options:
            allocator = drafts[place].replica.allocator
            shared = allocator.match(keys)
            if allocator.can_allocate(whole - len(shared), shared):
                return drafts[place], shared, whole - len(shared)
        return None

    def _shareable_keys(self, sequence: Sequence) -> tuple[bytes, ...]:
        """Keys of the pages that a waiting sequence may share; its last token is computed anew.

        What counts tokens has to see them all.
        """
        page_size = self.config.page_size
        if not self.config.prefix_caching or sequence.params.counts_tokens:
            return ()
        if sequence.page_keys is None:
            if self._keyed[0] is not sequence.prompt:  # which the samples of a request share
                self._keyed = sequence.prompt, tuple(page_keys(sequence.prompt, page_size))
            sequence.page_keys = self._keyed[1]
        return sequence.page_keys[: (sequence.num_tokens - 1) // page_size]

    def _register(self, sequence: Sequence) -> None:
        """Let others find the pages of the prompt that are computed with the steps planned."""
        if sequence.page_keys is None:
            return
        allocator = self.replicas[sequence.replica].allocator
        whole = min(len(sequence.page_keys), sequence.num_computed // self.config.page_size)
        for place in range(sequence.num_registered, whole):
            allocator.register(sequence.pages[place], sequence.page_keys[place])
        sequence.num_registered = max(sequence.num_registered, whole)

    def _start(
        self, sequence: Sequence, replica: Replica, shared: list[int], num_pages: int
    ) -> None:
        """Take a sequence out of the queue into a replica, with all the pages its prefill needs."""
        sequence.replica = replica.index
        sequence.slot = replica.free_slots.pop()
        replica.allocator.share(shared)
        sequence.pages.extend(shared)
        sequence.pages.extend(replica.allocator.allocate(num_pages))
        sequence.num_registered = len(shared)
        sequence.num_computed = len(shared) * self.config.page_size
        if not sequence.output:
            sequence.num_cached = sequence.num_computed
        self.num_cached_tokens += sequence.num_computed
        self._num_started_tokens += sequence.num_tokens
        replica.coming.update(sequence.page_keys or ())
        insort(replica.running, sequence, key=attrgetter("seq_id"))

    def _preempt(self, sequence: Sequence) -> None:
        """Put a running sequence back into the queue; it computes all its tokens again."""
        assert sequence is not self.replicas[sequence.replica].running[0], (
            "the oldest sequence of a replica fits its cache, so it is never preempted"
        )
        self._release(sequence)
        self._enqueue(sequence)
        self.num_preemptions += 1

    def _enqueue(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.seq_id, sequence))
        self._pace.queue(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take a running sequence's slot and pages."""
        replica = self.replicas[sequence.replica]
        replica.running.remove(sequence)
        replica.free_slots.append(sequence.slot)
        replica.allocator.free(sequence.pages)
        sequence.pages = array("i")
        for key in sequence.page_keys or ():
            replica.coming[key] -= 1
            if not replica.coming[key]:
                del replica.coming[key]
        sequence.replica = sequence.slot = None
        sequence.num_computed = sequence.num_registered = 0

    def _end(self, sequences: list[Sequence], reason: str) -> None:
        """Take sequences out of wherever they are, running or waiting."""
        waiting = False
        for sequence in sequences:
            assert sequence.finish_reason is None, f"finished twice: {sequence}"
            sequence.finish_reason = reason
            if reason != "abort":
                self._pace.end(sequence)
            if sequence.slot is None:
                waiting = True
                self._pace.queue(sequence, -1)
            else:
                self._release(sequence)
        if waiting:
            self._waiting = [entry for entry in self._waiting if entry[1].finish_reason is None]
            heapq.heapify(self._waiting)

    # Invariants

    def _unfinished(self) -> Iterator[Sequence]:
        for replica in self.replicas:
            yield from replica.running
        for _, sequence in self._waiting:
            yield sequence

    def check_integrity(self) -> None:
        """Assert that pages and slots are conserved and every sequence is in one place."""
        for replica in self.replicas:
            owned = [page for sequence in replica.running for page in sequence.pages]
            if not self.config.prefix_caching:
                assert len(owned) == len(set(owned)), "a page in two sequences"
            replica.allocator.check_integrity(owned)
            slots = [sequence.slot for sequence in replica.running] + replica.free_slots
            assert sorted(slots) == list(range(self.config.max_num_seqs)), f"slots: {slots}"
            assert all(sequence.replica == replica.index for sequence in replica.running)
            keys = Counter(key for s in replica.running for key in s.page_keys or ())
            assert replica.coming == keys, "keys of sequences that do not run"
            order = [sequence.seq_id for sequence in replica.running]
            assert order == sorted(order), f"not oldest first: {order}"
        seq_ids = [sequence.seq_id for sequence in self._unfinished()]
        assert len(seq_ids) == len(set(seq_ids)), "a sequence in two places"
        assert all(sequence.finish_reason is None for sequence in self._unfinished())
        counted = Pace(None)
        for _, sequence in self._waiting:
            counted.queue(sequence)
        sums = ("waiting", "prompt_tokens", "output_tokens")
        assert all(getattr(self._pace, name) == getattr(counted, name) for name in sums)
        for _, sequence in self._waiting:
            held = (sequence.replica, sequence.slot, list(sequence.pages), sequence.num_computed)
            assert held == (None, None, [], 0), f"a waiting sequence holds {held}"
