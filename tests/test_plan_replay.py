from pathlib import Path

import pytest

from sidp_jax import plan_replay
from sidp_jax.estimate import Candidate, Memory, Setting, Throughput, Workload
from sidp_jax.hardware import load_profile
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import REPLICATED, WAS
from sidp_jax.plan_replay import WORTHWHILE, Replay, choose, replay_close, rounds
from sidp_jax.plan_search import Option, evaluate
from sidp_jax.replay import Simulated

SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"


def setting(longest=4096):
    model = ModelConfig.from_pretrained(SHAPES / "qwen3_32b")
    return Setting(model, load_profile("h200"), 2, 64, longest, 0.92)


def option(rate, pool=1, pools=8, seqs=64):
    """A configuration that is estimated to make so many tokens/s."""
    held = Memory(0, 0, 0, 0, 0, 0, 64 * 1000, fits=True)
    speed = Throughput(seqs, seqs, "max_num_seqs", (), 1.0, rate, rate / 100)
    modes = (REPLICATED,) if pool == 1 else (WAS,)
    candidate = Candidate(pool, 1, pools, 64 if pool == 1 else 0, modes, seqs, 2048)
    return Option(candidate, held, speed)


def played(made, steady, whole, requests=500):
    job = Simulated(requests=requests, seconds=1.0, output_tokens=whole)
    job.steady_output_tokens_per_second = steady
    return Replay(made, job)


WORK = Workload(100, 50)


def close(monkeypatch, options, workload=WORK):
    """Which of them are replayed, and the job."""
    jobs = []
    monkeypatch.setattr(
        plan_replay, "replay", lambda _, o, job: jobs.append(job) or Simulated(requests=1)
    )
    done = replay_close(setting(), options, workload)
    assert [replay.option for replay in done] == [o for o in options if o and o.speed]
    assert len(set(jobs)) <= 1
    return [replay.job is not None for replay in done], jobs


def test_what_comes_close_is_replayed(monkeypatch):
    options = [option(100.0), option(99.0, seqs=8), option(80.0), None]
    assert close(monkeypatch, options)[0] == [True, True, False]
    assert close(monkeypatch, [option(100.0), option(80.0)])[0] == [False, False]
    assert close(monkeypatch, [option(100.0)])[0] == [False]
    assert close(monkeypatch, []) == ([], [])


def test_a_pool_is_replayed_if_it_may_be_worth_it(monkeypatch):
    least = 0.85 * WORTHWHILE * 100
    options = [option(100.0), option(99.0), option(least - 1, pool=8), option(least + 1, pool=8)]
    assert close(monkeypatch, options)[0] == [True, True, False, True]
    assert close(monkeypatch, [option(100.0, pool=8), option(90.0, pool=4)])[0] == [True, True]


def test_the_job_has_as_many_requests_as_are_known(monkeypatch):
    options = [option(100.0), option(99.0, seqs=1000)]
    for known, used in ((0, 16_000), (500, 500), (15_999, 15_999), (20_000, 16_000)):
        _, (job, _) = close(monkeypatch, options, Workload(100, 100, known))
        assert job.requests == used
    _, (job, _) = close(monkeypatch, options, Workload(3000, 1000))
    assert job.longest == 4096
    assert (job.prompt_spread, job.output_spread) == (
        pytest.approx(96 / 3000),
        pytest.approx(0.096),
    )
    _, (job, _) = close(monkeypatch, options, Workload(3000, 1096))
    assert (job.prompt_spread, job.output_spread) == (0, 0)


def test_a_job_has_more_rounds_where_they_are_cheap():
    assert rounds([option(1.0, seqs=1000), option(1.0)], 100) == 2 * 8000
    assert rounds([option(1.0, seqs=1000)], 50) == (1 << 20) // 50
    assert rounds([option(1.0, pools=1, seqs=40)], 10_000) == 8 * 40
    assert rounds([option(1.0, seqs=64)], 10**6) == 2 * 512, "much of it is skipped, not all"
    assert rounds([option(1.0, seqs=1)], 10_000) == 128 * 8, "a share of few says little"


def test_the_replay_decides_what_is_close():
    plain, other = option(100.0), option(95.0)
    replays = [played(plain, 90.0, 80), played(other, 95.0, 70)]
    assert choose(replays, WORK).best == replays[1], "the steady state"
    assert choose(replays, Workload(100, 50, 500)).best == replays[0], "a job of 500 requests"
    assert choose(replays, Workload(100, 50, 750)).best == replays[0], "or of about as many"
    assert choose(replays, Workload(100, 50, 751)).best == replays[1]
    late = Replay(option(99.0), None)
    assert choose([*replays, late], WORK).best == replays[1]


@pytest.mark.parametrize("replayed", [True, False])
def test_a_pool_must_be_worth_it(replayed):
    def rated(made, rate):
        return (
            played(made, rate, 1)
            if replayed
            else Replay(option(rate, made.candidate.pool_size), None)
        )

    plain = rated(option(100.0), 100.0)
    for rate, worth in ((WORTHWHILE * 100 - 0.1, False), (WORTHWHILE * 100 + 0.1, True)):
        pooled = rated(option(100.0, pool=8), rate)
        choice = choose([plain, pooled], WORK)
        assert choice.pool == worth
        assert choice.best == (pooled if worth else plain)
    assert choose([pooled], Workload(1, 1)).pool
    assert not choose([plain], Workload(1, 1)).pool
    assert choose([], Workload(1, 1)).best is None


def test_only_the_replayed_kind_is_chosen():
    plain = [played(option(100.0), 80.0, 80), played(option(99.0), 81.0, 81)]
    pooled = Replay(option(85.0, pool=8), None)
    assert choose([*plain, pooled], Workload(1, 1)).best == plain[1]
    pools = [played(option(100.0, pool=8), 80.0, 80), played(option(99.0, pool=4), 70.0, 70)]
    assert choose([*pools, Replay(option(80.0), None)], Workload(1, 1)).best == pools[0]


def test_a_real_replay_is_of_the_given_lengths():
    work = Workload(200, 20)
    sizes = ((64, 512), (96, 512))
    options = [
        evaluate(setting(), Candidate(1, 1, 8, 64, (REPLICATED,), *size), work) for size in sizes
    ]
    first, second = replay_close(setting(), options, work)
    assert first.job.requests == second.job.requests == rounds(options, 20)
    assert first.job.prompt_tokens == pytest.approx(200 * first.job.requests, rel=0.02)
    assert first.job.output_tokens == pytest.approx(20 * first.job.requests, rel=0.04)
    assert first.rate(whole=False) == first.job.steady_output_tokens_per_second
    assert first.rate(whole=True) == first.job.output_tokens_per_second
