"""The engine over a small random model: the same tokens, however a request is run."""

import numpy as np
import pytest
from helpers import Alternating, make_engine, run_requests, small_config

from sidp_jax import SamplingParams
from sidp_jax.modes.policy import Policy
from sidp_jax.request import RequestError


def prompts(count=9, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest, count)
    return {f"r{i}": rng.integers(2, 90, n).tolist() for i, n in enumerate(lengths)}


def greedy(max_tokens=12, **changes):
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **changes)


def tokens(outputs):
    return {name: [o.token_ids for o in output.outputs] for name, output in outputs.items()}


@pytest.fixture(scope="module")
def was_engine():
    return make_engine()


@pytest.fixture(scope="module")
def greedy_tokens():
    """The oracle: ``replicated``, one request at a time, each prompt in one chunk."""
    engine = make_engine(modes=("replicated",), max_num_batched_tokens=32, prefix_caching=False)
    return {
        name: tokens(run_requests(engine, {name: (prompt, greedy())}))[name]
        for name, prompt in prompts().items()
    }


def run_greedy(engine):
    return tokens(run_requests(engine, {n: (p, greedy()) for n, p in prompts().items()}))


@pytest.mark.parametrize(
    "changes",
    [
        {"modes": ("replicated",)},
        {"modes": ("cas",), "layer_loop": "unrolled"},
        {"modes": ("was", "cas"), "policy_type": Alternating},
        {"pool_size": 4, "resident_layers": 1, "modes": ("was", "cas"), "policy_type": Alternating},
        {"modes": ("cas_staggered", "was"), "policy_type": Alternating, "pool_size": 3},
        {
            **{"modes": ("was", "cas"), "policy_type": Alternating, "pool_size": 3},
            **{"resident_layers": 1, "layer_loop": "unrolled", "was_fetch": "copies"},
        },
        {"pool_size": 1},
    ],
    ids=["replicated", "cas", "switching", "resident", "staggered", "copies", "pool-of-one"],
)
def test_greedy_tokens_are_the_same_in_every_mode(greedy_tokens, changes):
    engine = make_engine(**changes)
    assert run_greedy(engine) == greedy_tokens
    assert set(engine.stats.steps) == set(changes.get("modes", ("was",)))


def test_every_switch_is_kept_and_logged_with_its_numbers(caplog):
    class Eager(Policy):
        """Prefers CaS in small steps, as no profile of a CPU would."""

        def seconds(self, mode, tokens):
            return {"cas": tokens, "was": 30}[mode] * 1e-6

    engine = make_engine(modes=("was", "cas"), policy_type=Eager, max_num_batched_tokens=64)
    with caplog.at_level("INFO", logger="sidp_jax.engine"):
        run_greedy(engine)
    switches = engine.stats.switches
    assert (switches[0].old, switches[0].new, switches[0].tokens) == ("was", "cas", 16)
    assert all(s.new_seconds < s.old_seconds for s in switches)
    assert [r.getMessage() for r in caplog.records if "->" in r.getMessage()] == list(
        map(str, switches)
    )
    assert set(engine.stats.steps) == {"was", "cas"}


def test_chunked_prefill_and_many_at_once_change_nothing(was_engine, greedy_tokens):
    assert run_greedy(was_engine) == greedy_tokens


def test_preemption_changes_nothing(greedy_tokens):
    engine = make_engine(num_kv_pages=12, pool_size=1)
    assert run_greedy(engine) == greedy_tokens
    assert engine.scheduler.num_preemptions > 0


def shared_prompts(count=9, common=14):
    """Prompts that begin alike; every third has a beginning of its own."""
    rng = np.random.default_rng(5)
    begin = rng.integers(2, 90, common).tolist()
    return {
        f"s{i}": (begin if i % 3 else begin[::-1]) + rng.integers(2, 90, 1 + i % 7).tolist()
        for i in range(count)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modes": ("replicated",), "pool_size": 1},
        {"modes": ("cas_staggered", "was"), "policy_type": Alternating, "pool_size": 3},
        {"pool_size": 1, "num_kv_pages": 14},
    ],
    ids=["was", "pool-of-one", "switching", "few-pages"],
)
def test_prompts_that_begin_alike_share_pages_and_tokens_stay_the_same(changes):
    requests = {name: (prompt, greedy()) for name, prompt in shared_prompts().items()}
    alone = make_engine(modes=("replicated",), pool_size=1, prefix_caching=False)
    expected = {}
    for name, request in requests.items():
        expected |= tokens(run_requests(alone, {name: request}))
    engine = make_engine(**changes)
    outputs = run_requests(engine, requests)
    assert tokens(outputs) == expected
    cached = sum(output.num_cached_tokens for output in outputs.values())
    assert 0 < cached <= engine.scheduler.num_cached_tokens
    assert alone.scheduler.num_cached_tokens == 0
    # A second time around every prompt is there, but for its last page.
    again = run_requests(engine, requests)
    assert tokens(again) == expected
    if "num_kv_pages" not in changes:
        pages = {name: (len(prompt) - 1) // 4 * 4 for name, (prompt, _) in requests.items()}
        if engine.runner.program.layout.pool_size == 1:
            assert {name: o.num_cached_tokens for name, o in again.items()} == pages


def test_samples_of_a_request_share_its_prompt():
    engine = make_engine(pool_size=1)
    params = SamplingParams(n=4, temperature=1.0, max_tokens=6, seed=3, ignore_eos=True)
    prompt = shared_prompts()["s6"]
    (output,) = run_requests(engine, {"x": (prompt, params)}).values()
    without = make_engine(pool_size=1, prefix_caching=False)
    (expected,) = run_requests(without, {"x": (prompt, params)}).values()
    assert [o.token_ids for o in output.outputs] == [o.token_ids for o in expected.outputs]
    assert (output.num_cached_tokens, expected.num_cached_tokens) == (3 * 20, 0)


def test_what_counts_tokens_computes_its_whole_prompt(was_engine):
    params = SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.5, ignore_eos=True)
    prompt = shared_prompts()["s1"]
    run_requests(was_engine, {"before": (prompt, greedy())})
    (output,) = run_requests(was_engine, {"x": (prompt, params)}).values()
    without = make_engine(prefix_caching=False)
    (expected,) = run_requests(without, {"x": (prompt, params)}).values()
    assert output.outputs[0].token_ids == expected.outputs[0].token_ids
    assert output.num_cached_tokens == 0


def test_nothing_compiles_after_warm_up(was_engine):
    before = was_engine.compilations
    mixed = {
        "greedy": (prompts()["r0"], greedy()),
        "random": (prompts()["r1"], SamplingParams(max_tokens=5)),
        "full": (prompts()["r2"], SamplingParams(max_tokens=5, logprobs=3, presence_penalty=1)),
    }
    run_requests(was_engine, mixed)
    run_requests(was_engine, mixed)
    assert was_engine.compilations == before


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(was_engine):
    params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=10, seed=7, ignore_eos=True)
    prompt = prompts()["r3"]
    alone = tokens(run_requests(was_engine, {"x": (prompt, params)}))["x"]
    others = {n: (p, SamplingParams(max_tokens=9)) for n, p in prompts(seed=4).items()}
    crowd = tokens(run_requests(was_engine, {**others, "y": (prompt, params)}))["y"]
    assert alone == crowd
    other_seed = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=10, seed=8, ignore_eos=True)
    assert tokens(run_requests(was_engine, {"x": (prompt, other_seed)}))["x"] != alone


def test_n_samples_differ_and_repeat(was_engine):
    params = SamplingParams(n=3, temperature=1.0, max_tokens=8, seed=3, ignore_eos=True)
    first, again = (
        tokens(run_requests(was_engine, {"x": (prompts()["r1"], params)}))["x"] for _ in range(2)
    )
    assert first == again
    assert len({tuple(sample) for sample in first}) == 3


def test_stop_tokens_min_tokens_and_length(was_engine, greedy_tokens):
    prompt, ((*whole,),) = prompts()["r0"], greedy_tokens["r0"]
    stop = whole[4]
    first = whole.index(stop)
    run = lambda params: run_requests(was_engine, {"x": (prompt, params)})["x"].outputs[0]  # noqa: E731
    stopped = run(greedy(stop_token_ids=(stop,)))
    assert stopped.token_ids == whole[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    longer = run(greedy(stop_token_ids=(stop,), min_tokens=first + 2))
    assert stop not in longer.token_ids[: first + 2]
    assert longer.token_ids[:first] == whole[:first]
    cut = run(greedy(max_tokens=3))
    assert (cut.token_ids, cut.finish_reason, cut.stop_reason) == (whole[:3], "length", None)


def test_the_models_end_token_ends_unless_ignored(greedy_tokens):
    end = greedy_tokens["r0"][0][2]
    engine = make_engine(config=small_config(5, eos_token_id=end))
    once = SamplingParams(temperature=0, max_tokens=12)
    output = run_requests(engine, {"x": (prompts()["r0"], once)})["x"].outputs[0]
    assert output.token_ids == greedy_tokens["r0"][0][: greedy_tokens["r0"][0].index(end) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)
    on = run_requests(engine, {"x": (prompts()["r0"], greedy())})["x"].outputs[0]
    assert on.token_ids == greedy_tokens["r0"][0]


def test_logprobs(was_engine, greedy_tokens):
    params = greedy(logprobs=3)
    output = run_requests(was_engine, {"x": (prompts()["r2"], params)})["x"].outputs[0]
    assert output.token_ids == greedy_tokens["r2"][0]
    for token, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert len(entries) == 3
        assert entries[token].rank == 1
        values = [entry.logprob for entry in entries.values()]
        assert values == sorted(values, reverse=True)
        assert np.exp(values).sum() <= 1 + 1e-5
    total = sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True))
    assert output.cumulative_logprob == pytest.approx(total)


def test_repetition_penalty_survives_preemption():
    params = greedy(repetition_penalty=1.5, frequency_penalty=0.5)
    requests = {n: (p, params) for n, p in prompts().items()}
    roomy = make_engine(pool_size=1)
    tight = make_engine(num_kv_pages=12, pool_size=1)
    expected = tokens(run_requests(roomy, requests))
    assert tokens(run_requests(tight, requests)) == expected
    assert tight.scheduler.num_preemptions > 0
    assert expected != tokens(run_requests(roomy, {n: (p, greedy()) for n, p in prompts().items()}))


def test_a_request_that_cannot_run_is_refused_and_others_go_on(was_engine, greedy_tokens):
    bad = {
        "no tokens": ([], greedy()),
        r"48 tokens.*max_model_len=48": ([2] * 48, greedy()),
        "prompt token 90 is not in the vocabulary": ([2, 90], greedy()),
        "need a tokenizer": ([2], greedy(stop=["x"])),
    }
    was_engine.add_request("good", prompts()["r0"], greedy())
    for message, (prompt, params) in bad.items():
        with pytest.raises(RequestError, match=message):
            was_engine.add_request("bad", prompt, params)
    with pytest.raises(RequestError, match="'good' is already in use"):
        was_engine.add_request("good", [2], greedy())
    assert was_engine.num_unfinished == 1
    assert tokens(run_requests(was_engine, {})) == {"good": greedy_tokens["r0"]}


def test_what_nothing_was_computed_of_is_given_back_the_newest_first(was_engine):
    requests = {f"w{i}": ([i + 2] * 5, greedy(n=1 + i % 2)) for i in range(20)}
    for name, (prompt, params) in requests.items():
        was_engine.add_request(name, prompt, params)
    for _ in range(2):
        was_engine.step()
    waiting = {s.request_id for s in was_engine.scheduler.untouched()}
    assert 5 < len(waiting) < len(requests)
    given = was_engine.recall(3)
    assert given == ["w19", "w18", "w17"]
    was_engine.scheduler.check_integrity()
    rest = set(was_engine.recall(100))
    started = requests.keys() - rest - set(given)
    assert rest < waiting
    finished = set()
    while was_engine.has_work:
        finished |= {output.request_id for output in was_engine.step()}
        was_engine.scheduler.check_integrity()
    assert finished == started
    assert was_engine.scheduler.kv_usage == 0
    assert was_engine.recall(1) == []


def test_abort_frees_everything(was_engine):
    for name, prompt in prompts().items():
        was_engine.add_request(name, prompt, greedy())
    was_engine.step()
    was_engine.step()
    for name in prompts():
        was_engine.abort(name)
    was_engine.abort("unknown")
    assert run_requests(was_engine, {}) == {}
    assert was_engine.num_unfinished == 0


def test_max_tokens_none_fills_the_model_length(was_engine):
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    output = run_requests(was_engine, {"x": ([2] * 40, params)})["x"].outputs[0]
    assert len(output.token_ids) == 8
    assert output.finish_reason == "length"
