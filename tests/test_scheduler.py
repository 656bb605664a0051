"""The scheduler against a brute-force device, one step ahead as the engine runs it."""

import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_jax.batch import BatchLayout, build_batch, unpack
from sidp_jax.pace import StepCosts
from sidp_jax.pages import pages_for
from sidp_jax.request import RequestError, SamplingParams, Sequence
from sidp_jax.scheduler import Scheduler, SchedulerConfig, StepPlan

EOS = 0


def next_token(seed: int, context: list[int]) -> int:
    """A model: the next token depends on all the tokens so far and on the sequence's seed."""
    return zlib.crc32(np.array([seed, *context], np.int64).tobytes()) % 20


def undisturbed(sequence: Sequence) -> list[int]:
    """What the model generates for a sequence that runs alone."""
    output = []
    while len(output) < sequence.max_tokens and (not output or output[-1] != EOS):
        output.append(next_token(sequence.seed, sequence.prompt + output))
    return output


class Device:
    """What a step does on the devices, token by token, from nothing but the batch."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.layout = BatchLayout(
            tokens=config.max_num_batched_tokens,
            seqs=config.max_num_seqs,
            pages=pages_for(config.max_model_len, config.page_size),
            stop_ids=1,
        )
        shape = (config.pool_size, config.num_kv_pages * config.page_size)
        self.kv = np.full(shape, -1)  # the "K and V" of a token is the token
        self.last_tokens = np.full((config.pool_size, config.max_num_seqs), -1)
        self.lengths = np.zeros((config.pool_size, config.max_num_seqs), int)  # computed, by slot
        self.owners: dict[tuple[int, int], Sequence] = {}  # by replica and slot

    def run(self, plan: StepPlan) -> np.ndarray:
        buffers = build_batch(plan, self.layout, self.config.page_size)
        tokens = np.full((self.config.pool_size, self.layout.seqs), -1)
        for replica, buffer in enumerate(buffers):
            batch = unpack(buffer, self.layout)
            written = batch.kv_slots[batch.kv_slots >= 0]
            assert len(written) == len(set(written.tolist())), "two tokens in one place"
            rows = np.flatnonzero(batch.context_lens)
            for row in rows:
                self._begin_row(replica, batch, row, plan.replicas[replica][row].sequence)
                self._write_row(replica, batch, row)
            for row in rows:  # in every layer all is written before anybody attends
                tokens[replica, row] = self._sample_row(replica, batch, row)
        return tokens

    def _begin_row(self, replica: int, batch, row: int, sequence: Sequence) -> None:
        """A slot's new sequence begins at position 0, or where the cached part of it ends."""
        key = replica, batch.slots[row]
        first = batch.positions[batch.query_starts[row]]
        starts = first == 0 or self.owners.get(key) is not sequence
        if starts:
            assert first == 0 or not sequence.params.counts_tokens, "a token that is not counted"
            self.owners[key], self.lengths[key] = sequence, first

    def _write_row(self, replica: int, batch, row: int) -> None:
        slot = batch.slots[row]
        for t in range(batch.query_starts[row], batch.query_starts[row + 1]):
            position = batch.positions[t]
            assert position == self.lengths[replica, slot], "a token left out, or computed twice"
            self.lengths[replica, slot] += 1
            token = batch.tokens[t] if batch.tokens[t] >= 0 else self.last_tokens[replica, slot]
            assert batch.kv_slots[t] == self._kv_slot(batch, row, position), "not in its own pages"
            self.kv[replica, batch.kv_slots[t]] = token
        assert batch.context_lens[row] == self.lengths[replica, slot]

    def _sample_row(self, replica: int, batch, row: int) -> int:
        if not batch.samples[row]:
            return -1
        places = [self._kv_slot(batch, row, p) for p in range(batch.context_lens[row])]
        token = next_token(int(batch.seeds[row]), self.kv[replica, places].tolist())
        self.last_tokens[replica, batch.slots[row]] = token
        return token

    def _kv_slot(self, batch, row: int, position: int) -> int:
        page_size = self.config.page_size
        return batch.block_tables[row, position // page_size] * page_size + position % page_size


def check_budgets(scheduler: Scheduler, plan: StepPlan) -> None:
    config = scheduler.config
    assert plan.max_tokens <= config.max_num_batched_tokens
    assert plan.max_seqs <= config.max_num_seqs
    assert len(plan.replicas) == config.pool_size
    sequences = [chunk.sequence for chunks in plan.replicas for chunk in chunks]
    assert len(sequences) == len(set(sequences)), "two chunks of one sequence"
    for chunks in plan.replicas:
        lengths = [chunk.length for chunk in chunks]
        assert all(length >= 1 for length in lengths)
        decodes = lengths.count(1)
        assert lengths[:decodes] == [1] * decodes, "decode does not come first"


@dataclass
class Arrival:
    """A sequence with the step in which it arrives and, maybe, that in which it is aborted."""

    sequence: Sequence
    step: int
    abort_at: int | None


def run(scheduler: Scheduler, arrivals: list[Arrival]) -> None:
    """Run all to the end as the engine does: step n+1 is launched before step n is looked at."""
    device = Device(scheduler.config)
    # Proof of the bound: as long as the oldest sequence waits, some replica's oldest advances and
    # is not preempted; once it runs, it advances itself. So every sequence's length counts twice.
    work = sum(len(a.sequence.prompt) + a.sequence.max_tokens + 4 for a in arrivals)
    bound = 2 * work + max(a.step for a in arrivals)
    in_flight, step = None, 0
    while any(a.sequence.finish_reason is None for a in arrivals) or in_flight:
        assert step <= bound, "starvation"
        for arrival in arrivals:
            if arrival.step == step:
                scheduler.add(arrival.sequence)
        oldest = [replica.running[:1] for replica in scheduler.replicas]
        plan = scheduler.schedule()
        scheduler.check_integrity()
        assert all(s.slot is not None for running in oldest for s in running), "oldest preempted"
        launched = None
        if plan is not None:
            check_budgets(scheduler, plan)
            launched = plan, device.run(plan)
        if in_flight is not None:
            collect(scheduler, *in_flight)
        for arrival in arrivals:
            if arrival.abort_at is not None and step >= max(arrival.abort_at, arrival.step):
                arrival.abort_at = None
                unfinished = arrival.sequence.finish_reason is None
                aborted = scheduler.abort(arrival.sequence.request_id)
                assert aborted == [arrival.sequence] * unfinished
        scheduler.check_integrity()
        in_flight, step = launched, step + 1


def collect(scheduler: Scheduler, plan: StepPlan, tokens: np.ndarray) -> None:
    for replica, chunks in enumerate(plan.replicas):
        for row, chunk in enumerate(chunks):
            sequence, token = chunk.sequence, int(tokens[replica, row])
            if chunk.samples and scheduler.record_token(sequence, token):
                if token == EOS:
                    scheduler.finish(sequence, "stop")
                elif len(sequence.output) == sequence.max_tokens:
                    scheduler.finish(sequence, "length")


def make_sequence(seq_id: int, prompt_len: int, max_tokens: int) -> Sequence:
    prompt = [1 + (seq_id % 3 + i) % 19 for i in range(prompt_len)]  # some begin alike
    penalty = float(seq_id % 4 == 3)  # some count their tokens
    params = SamplingParams(max_tokens=max_tokens, presence_penalty=penalty)
    return Sequence(seq_id, str(seq_id), 0, prompt, params, seed=seq_id, max_tokens=max_tokens)


@st.composite
def workloads(draw):
    """Plain values: the checked constructors use `random`, which hypothesis forbids in here."""
    max_num_seqs = draw(st.integers(1, 5))
    page_size = draw(st.sampled_from([1, 2, 3, 8]))
    max_model_len = draw(st.integers(2, 24))
    least_pages = -(-max_model_len // page_size)
    config = {
        "pool_size": draw(st.integers(1, 3)),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_seqs + draw(st.integers(0, 12)),
        "max_model_len": max_model_len,
        "page_size": page_size,
        "num_kv_pages": least_pages + draw(st.integers(0, 2 * least_pages)),
        "prefix_caching": draw(st.booleans()),
    }
    if draw(st.booleans()):
        most = config["max_num_batched_tokens"]
        sizes = sorted(draw(st.sets(st.integers(1, most), max_size=3)) | {most})
        seconds = [draw(st.integers(1, 4)) + size for size in sizes]
        config["step_costs"] = (tuple(sizes), tuple(map(float, seconds)))
    arrivals, step = [], 0
    for _ in range(draw(st.integers(1, 16))):
        prompt_len = draw(st.integers(1, max_model_len - 1))
        max_tokens = draw(st.integers(1, max_model_len - prompt_len))
        step += draw(st.integers(0, 3))
        abort_at = draw(st.none() | st.none() | st.integers(0, 40))
        arrivals.append((prompt_len, max_tokens, step, abort_at))
    return config, arrivals


@settings(max_examples=80)
@given(workloads())
def test_random_workloads_against_the_brute_force_device(workload):
    values = workload[0]
    costs = StepCosts(*values.pop("step_costs")) if "step_costs" in values else None
    config = SchedulerConfig(**values, step_costs=costs)
    arrivals = [
        Arrival(make_sequence(seq_id, prompt_len, max_tokens), step, abort_at)
        for seq_id, (prompt_len, max_tokens, step, abort_at) in enumerate(workload[1])
    ]
    scheduler = Scheduler(config)
    run(scheduler, arrivals)
    for sequence in (arrival.sequence for arrival in arrivals):
        alone = undisturbed(sequence)
        if sequence.finish_reason == "abort":
            assert sequence.output == alone[: len(sequence.output)]
        else:
            assert sequence.output == alone
            assert sequence.finish_reason == ("stop" if alone[-1] == EOS else "length")
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.kv_usage) == (0, 0, 0)
    assert all(r.allocator.num_free == config.num_kv_pages for r in scheduler.replicas)


def test_preemption_and_chunking_happen_in_such_workloads():
    config = SchedulerConfig(
        pool_size=2,
        max_num_seqs=4,
        max_num_batched_tokens=6,
        max_model_len=40,
        page_size=2,
        num_kv_pages=20,
    )
    scheduler = Scheduler(config)
    arrivals = [Arrival(make_sequence(i, 9, 31), step=0, abort_at=None) for i in range(30)]
    run(scheduler, arrivals)
    assert scheduler.num_preemptions > 0
    assert all(a.sequence.output == undisturbed(a.sequence) for a in arrivals)


def scheduler_of(**changes) -> Scheduler:
    sizes = {
        "pool_size": 1,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "max_model_len": 32,
        "page_size": 4,
        "num_kv_pages": 8,
    }
    return Scheduler(SchedulerConfig(**(sizes | changes)))


def add(scheduler: Scheduler, *sizes: tuple[int, int]) -> list[Sequence]:
    sequences = [make_sequence(i, *size) for i, size in enumerate(sizes)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def shapes(plan: StepPlan) -> list[list[tuple[int, int, int, bool]]]:
    return [[(c.sequence.seq_id, c.start, c.length, c.samples) for c in r] for r in plan.replicas]


def record_all(scheduler: Scheduler, plan: StepPlan, token: int = 7) -> None:
    for chunks in plan.replicas:
        for chunk in chunks:
            if chunk.samples:
                scheduler.record_token(chunk.sequence, token)


def test_decode_comes_first_and_prefill_fills_the_budget():
    scheduler = scheduler_of(max_num_batched_tokens=6, num_kv_pages=16)
    add(scheduler, (3, 9), (9, 9), (4, 9))
    assert shapes(scheduler.schedule()) == [[(0, 0, 3, True), (1, 0, 3, False)]]
    assert shapes(scheduler.schedule()) == [[(0, 3, 1, True), (1, 3, 5, False)]]
    assert shapes(scheduler.schedule()) == [[(0, 4, 1, True), (1, 8, 1, True), (2, 0, 4, True)]]
    assert shapes(scheduler.schedule()) == [[(0, 5, 1, True), (1, 9, 1, True), (2, 4, 1, True)]]


def test_sequences_go_to_the_replica_with_most_room_in_order_of_arrival():
    scheduler = scheduler_of(pool_size=2, max_num_batched_tokens=32)
    add(scheduler, (16, 4), (4, 4), (4, 4), (4, 4), (28, 4), (1, 1))
    plan = scheduler.schedule()
    # 4 fits in neither replica, and 5 does not overtake it.
    assert [[seq_id for seq_id, *_ in chunks] for chunks in shapes(plan)] == [[0], [1, 2, 3]]
    assert (scheduler.num_running, scheduler.num_waiting) == (4, 2)
    assert scheduler.kv_usage == (5 + 3 * 2) / 16


def test_no_chunk_is_planned_beyond_the_last_token():
    scheduler = scheduler_of()
    (sequence,) = add(scheduler, (3, 2))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert shapes(second) == [[(0, 3, 1, True)]]
    assert scheduler.schedule() is None
    record_all(scheduler, first)
    assert scheduler.schedule() is None
    record_all(scheduler, second)
    scheduler.finish(sequence, "length")
    assert scheduler.schedule() is None
    assert sequence.output == [7, 7]


def test_the_newest_is_preempted_and_keeps_its_pending_token():
    scheduler = scheduler_of(num_kv_pages=5, max_model_len=20)
    old, new, waiting = add(scheduler, (7, 13), (7, 13), (1, 1))
    first = scheduler.schedule()  # 2 pages each for old and new, and 1 for the third
    assert [c.sequence for c in first.replicas[0]] == [waiting, old, new]
    second = scheduler.schedule()  # position 7 is still on the second page
    record_all(scheduler, first)
    scheduler.finish(waiting, "length")
    third = scheduler.schedule()  # position 8: old gets the free page, new has to go
    assert shapes(third) == [[(0, 8, 1, True)]]
    assert (new.slot, new.num_pending, scheduler.num_preemptions) == (None, 1, 1)
    late = make_sequence(9, 1, 1)
    scheduler.add(late)
    scheduler.schedule()
    assert late.slot is None  # does not overtake new, whose pending token is not known yet
    assert new.slot is None
    record_all(scheduler, second, token=8)
    assert (new.output, new.num_pending) == ([7, 8], 0)
    scheduler.finish(old, "stop")
    fifth = scheduler.schedule()
    assert shapes(fifth) == [[(9, 0, 1, True), (1, 0, 9, True)]]
    assert scheduler.record_token(old, 9) is False  # of a step under way when it finished
    assert old.output == [7, 8]


def test_nothing_is_admitted_where_a_sequence_was_just_preempted():
    scheduler = scheduler_of(num_kv_pages=4, max_model_len=16)
    old, new, small = make_sequence(0, 7, 9), make_sequence(2, 7, 9), make_sequence(1, 1, 1)
    scheduler.add(old)
    scheduler.add(new)
    for _ in range(2):
        record_all(scheduler, scheduler.schedule())
    scheduler.add(small)
    assert shapes(scheduler.schedule()) == [[(0, 8, 1, True)]]
    assert (new.slot, small.slot) == (None, None)
    assert scheduler.replicas[0].allocator.num_free == 1  # there would have been a page
    assert old.slot is not None


def test_a_pending_token_must_be_known_before_its_sequence_starts_again():
    scheduler = scheduler_of(pool_size=2, num_kv_pages=4, max_model_len=16)
    old, other, new = add(scheduler, (7, 9), (7, 9), (7, 9))
    first, second = scheduler.schedule(), scheduler.schedule()
    record_all(scheduler, first)
    scheduler.finish(other, "stop")
    third = scheduler.schedule()  # old takes a page from new, and the other replica is empty
    assert shapes(third) == [[(0, 8, 1, True)], []]
    assert new.num_pending == 1
    record_all(scheduler, second, token=8)
    assert shapes(scheduler.schedule()) == [[(0, 9, 1, True)], [(2, 0, 9, True)]]
    assert new.tokens_between(7, 9) == [7, 8]
    assert old.slot is not None


def test_a_preempted_sequence_can_end_in_the_queue():
    scheduler = scheduler_of(num_kv_pages=4, max_model_len=16)
    old, new = add(scheduler, (7, 9), (7, 9))
    record_all(scheduler, scheduler.schedule())
    before = scheduler.schedule()
    scheduler.schedule()
    assert new.slot is None
    record_all(scheduler, before, token=EOS)
    scheduler.finish(new, "stop")
    scheduler.check_integrity()
    assert (scheduler.num_waiting, scheduler.num_running) == (0, 1)
    assert old.finish_reason is None


def test_prompts_that_begin_alike_meet_where_their_beginning_is_unless_load_is_uneven():
    scheduler = scheduler_of(pool_size=2, num_kv_pages=16, prefix_caching=True)
    first, other = (make_sequence(i, 13, 2) for i in (0, 1))  # pages of 4; they begin differently
    scheduler.add(first)
    scheduler.add(other)
    plan = scheduler.schedule()
    assert [len(chunks) for chunks in plan.replicas] == [1, 1]
    record_all(scheduler, plan)
    for sequence in (first, other):
        scheduler.finish(sequence, "stop")
    again = [make_sequence(i, 13, 2) for i in (10, 13, 12, 18)]  # like other, and then like first
    for sequence in again[:2]:
        scheduler.add(sequence)
    assert shapes(scheduler.schedule()) == [[], [(10, 12, 1, True), (13, 12, 1, True)]]
    for sequence in again[2:]:
        scheduler.add(sequence)
    assert shapes(scheduler.schedule())[0] == [(12, 12, 1, True), (18, 12, 1, True)]
    assert scheduler.num_cached_tokens == 4 * 12
    crowd = [make_sequence(i, 13, 2) for i in range(22, 22 + 3 * 12, 3) if i % 4 != 3]
    # All like other: its replica fills, until to compute it again is worth it.
    for sequence in crowd:
        scheduler.add(sequence)
    scheduler.schedule()
    assert {sequence.replica for sequence in crowd if sequence.slot is not None} == {0, 1}
    scheduler.check_integrity()


def test_a_prompt_that_is_being_computed_is_waited_for_and_others_go_first():
    scheduler = scheduler_of(
        pool_size=2, max_num_batched_tokens=8, num_kv_pages=16, prefix_caching=True
    )
    long = [make_sequence(i, 24, 2) for i in (0, 6, 12)]  # alike, three steps of one replica
    others = [make_sequence(i, 5, 2) for i in (13, 16)]
    for sequence in (*long, *others):
        scheduler.add(sequence)
    first = scheduler.schedule()
    assert shapes(first) == [[(0, 0, 8, False)], [(16, 4, 1, True), (13, 0, 5, True)]]
    record_all(scheduler, first)
    for sequence in others:
        scheduler.finish(sequence, "stop")
    assert [shapes(scheduler.schedule())[0] for _ in range(2)] == [
        [(0, 8, 8, False)],
        [(0, 16, 8, True)],
    ]
    assert scheduler.num_waiting == 2
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert {c.sequence.seq_id: c.start for r in plan.replicas for c in r} == {0: 24, 6: 20, 12: 20}


def test_the_last_token_of_a_prompt_is_always_computed():
    scheduler = scheduler_of(prefix_caching=True)
    for seq_id in (0, 6):
        scheduler.add(make_sequence(seq_id, 8, 4))
    plan = scheduler.schedule()
    assert shapes(plan) == [[(0, 0, 8, True), (6, 4, 4, True)]], "the second of two whole pages"


def test_abort_drops_all_samples_of_a_request():
    scheduler = scheduler_of(max_num_seqs=1)
    sequences = add(scheduler, (3, 3), (3, 3), (3, 3))
    sequences[1].request_id = sequences[0].request_id
    scheduler.schedule()
    assert scheduler.abort(sequences[0].request_id) == sequences[:2]
    assert [s.finish_reason for s in sequences] == ["abort", "abort", None]
    assert scheduler.abort("unknown") == []
    scheduler.check_integrity()
    assert shapes(scheduler.schedule()) == [[(2, 0, 3, True)]]


def test_the_queue_stays_in_order_when_its_head_is_dropped():
    scheduler = scheduler_of()
    for seq_id in (1, 5, 2, 4, 3):
        scheduler.add(make_sequence(seq_id, 1, 1))
    scheduler.abort("1")
    assert [seq_id for seq_id, *_ in shapes(scheduler.schedule())[0]] == [2, 3, 4, 5]


def test_a_sequence_can_fill_the_whole_cache():
    scheduler = scheduler_of()
    (sequence,) = add(scheduler, (20, 12))
    run_alone = undisturbed(sequence)
    device = Device(scheduler.config)
    while sequence.finish_reason is None:
        plan = scheduler.schedule()
        collect(scheduler, plan, device.run(plan))
    assert sequence.output == run_alone


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, (0, 4), "both must be at least 1"),
        ({}, (4, 0), "both must be at least 1"),
        ({}, (30, 3), "are 33 tokens, more than max_model_len=32: shorten the prompt"),
        ({"max_model_len": 64}, (30, 3), r"8 pages of 4 tokens.*raise num_kv_pages"),
    ],
)
def test_what_can_never_run_is_refused(changes, size, message):
    scheduler = scheduler_of(**changes)
    sequence = make_sequence(0, 1, 1)
    sequence.prompt, sequence.max_tokens = [1] * size[0], size[1]
    with pytest.raises(RequestError, match=message):
        scheduler.add(sequence)
    assert scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool_size": 0}, "pool_size=0 must be at least 1"),
        ({"num_kv_pages": -1}, "num_kv_pages=-1 must be at least 1"),
        ({"max_num_seqs": 17}, "max_num_batched_tokens=16 must be at least max_num_seqs=17"),
    ],
)
def test_the_config_is_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        scheduler_of(**changes)


def test_the_integrity_check_finds_a_shared_page():
    scheduler = scheduler_of()
    first, second = add(scheduler, (3, 3), (3, 3))
    scheduler.schedule()
    second.pages[0] = first.pages[0]
    with pytest.raises(AssertionError, match="two sequences"):
        scheduler.check_integrity()
