import random

import pytest
from test_scheduler import make_sequence

from sidp_jax.pace import Pace, StepCosts, Work, best_size, seconds_left
from sidp_jax.scheduler import Scheduler, SchedulerConfig

# A layer as on a GPU: as long as its weights take to read up to 16 tokens, then in proportion.
SIZES = (4, 8, 16, 24, 32, 48, 64, 96, 128)
COSTS = StepCosts(SIZES, tuple(float(max(16, size)) for size in SIZES))


def run_job(
    requests: list[tuple[int, int]], costs: StepCosts | None, slots: int = 16, pages: int = 64
) -> list[int]:
    """Tokens of every step of requests with (prompt, output) tokens, through the scheduler."""
    scheduler = Scheduler(SchedulerConfig(1, slots, 128, 512, 4, pages, costs))
    for index, (prompt, output) in enumerate(requests):
        scheduler.add(make_sequence(index, prompt, output))
    tokens = []
    while plan := scheduler.schedule():
        tokens.append(plan.max_tokens)
        for sequence, _, _, samples in plan.replicas[0]:
            counts = samples and scheduler.record_token(sequence, 1)
            if counts and len(sequence.output) == sequence.max_tokens:
                scheduler.finish(sequence, "length")
        scheduler.check_integrity()
    return tokens


def seconds(steps: list[int]) -> float:
    return sum(COSTS.of(tokens) for tokens in steps)


def test_costs_of_sizes_in_between():
    assert [COSTS.padded(n) for n in (1, 4, 4.1, 128, 999)] == [4, 4, 8, 128, 128]
    assert COSTS.of(33) == 48.0


def test_spread_prefill_keeps_steps_at_one_size_instead_of_waves():
    requests = [(48, 12)] * 200
    first, spread = run_job(requests, None), run_job(requests, COSTS)
    assert seconds(spread) < 0.93 * seconds(first)
    in_the_middle = spread[len(spread) // 4 : -len(spread) // 4]
    assert len({COSTS.padded(tokens) for tokens in in_the_middle}) == 1
    assert min(first[len(first) // 4 : -len(first) // 4]) <= 16, "thin steps between the waves"


@pytest.mark.parametrize("seed", range(8))
def test_never_much_slower_than_prefill_first(seed):
    rng = random.Random(seed)
    prompt, output = rng.choice([4, 16, 64, 200]), rng.choice([1, 4, 16, 64, 200])
    count = rng.choice([3, 16, 80])
    requests = [
        (rng.randint(prompt // 2, prompt), rng.randint(max(1, output // 2), output))
        for _ in range(count)
    ]
    first, spread = (run_job(requests, costs, pages=200) for costs in (None, COSTS))
    assert seconds(spread) <= 1.05 * seconds(first)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize(("prompt", "output"), [(48, 12), (8, 60), (30, 30)])
def test_the_estimate_agrees_with_the_scheduler(prompt, output, size):
    work = Work(100, prompt, output, (), slots=16, kv_tokens=1200)
    fixed = StepCosts(tuple(s for s in SIZES if s <= size), COSTS.seconds[: SIZES.index(size) + 1])
    scheduler = SchedulerConfig(1, 16, size, 512, 4, 300, None)
    tokens = []
    job = Scheduler(scheduler)
    for index in range(100):
        job.add(make_sequence(index, prompt, output))
    while plan := job.schedule():
        tokens.append(plan.max_tokens)
        for sequence, _, _, samples in plan.replicas[0]:
            counts = samples and job.record_token(sequence, 1)
            if counts and len(sequence.output) == sequence.max_tokens:
                job.finish(sequence, "length")
    assert seconds_left(fixed, work, size) == pytest.approx(seconds(tokens), rel=0.12)


def test_a_size_is_kept_unless_another_gains():
    work = Work(400, 48, 12, (), slots=16, kv_tokens=256)
    best = best_size(COSTS, work, SIZES[-1])
    assert best < SIZES[-1]
    gain = seconds_left(COSTS, work, SIZES[-1]) / seconds_left(COSTS, work, best)
    assert gain > 1.04
    near = SIZES[SIZES.index(best) + 1]
    if seconds_left(COSTS, work, near) < 1.04 * seconds_left(COSTS, work, best):
        assert best_size(COSTS, work, near) == near


def test_outputs_that_end_early_are_expected_to():
    def size_after(produced: int) -> int:
        pace = Pace(COSTS)
        for index in range(400):
            pace.queue(make_sequence(index, 48, 300))
        for index in range(40):
            ended = make_sequence(index, 48, 300)
            ended.output += [1] * produced
            pace.end(ended)
        return pace.step_size([], 1, 16, 256)

    assert size_after(12) < size_after(300) == SIZES[-1]


def test_no_end_in_sight():
    work = Work(400, 5000, 2, (), slots=16, kv_tokens=10**6)
    assert seconds_left(COSTS, work, 4) == float("inf")
    assert best_size(COSTS, work, 128) == 128
