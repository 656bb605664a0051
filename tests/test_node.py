"""A node of pools: one queue before several engines, each in a process, here mostly a thread."""

import json
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe

import pytest
from fakes import FakeEngine, FakeTokenizer, read_results

from sidp_jax import node
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.node import Facts, Node, Report
from sidp_jax.node_worker import serve
from sidp_jax.request import RequestError, SamplingParams

PARAMS = SamplingParams(temperature=0)


class Thread:
    """Stands for the process of a pool."""

    def __init__(self, engine, connection, answer):
        self.engine, self._connection, self._answer = engine, connection, answer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        try:
            self.config = self._connection.recv()[1]
            self._connection.send(self._answer)
            serve(self.engine, self._connection)
        except (EOFError, OSError, RuntimeError):
            pass
        finally:
            self._connection.close()

    def kill(self):
        raise AssertionError("it ends by itself")

    def wait(self, timeout=None):
        self._thread.join(timeout)
        return 1 if self.engine.fail_at_step else 0


@pytest.fixture
def make_node(monkeypatch):
    """Makes a node of given engines, which run in threads; ``answer`` is the last one's."""
    nodes = []

    def make(*engines, answer=None, **keys):
        threads, left = [], list(engines)

        def launch(number, environment):
            ours, theirs = Pipe()
            engine = left.pop(0)
            facts = Facts(engine.max_concurrency, engine.kv_tokens, engine.max_model_len, 1 << 16)
            said = answer if answer and not left else ("ready", (facts, Report(compilations=3)))
            threads.append(Thread(engine, theirs, said))
            return node._Pool(number, threads[-1], ours)

        monkeypatch.setattr(node, "_launch", launch)
        monkeypatch.setattr(node, "load_tokenizer", lambda path: FakeTokenizer())
        config = EngineConfig(model="m", platform="cpu", num_pools=len(engines), **keys)
        nodes.append(Node(config))
        assert {thread.config.num_pools for thread in threads} == {1}
        return nodes[-1]

    yield make
    for each in nodes:
        each.close()


def run(engine, limit=30):
    """Steps until nothing is left; the outputs by their ids."""
    outputs, end = {}, time.monotonic() + limit
    while engine.has_work:
        assert time.monotonic() < end
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def test_every_request_comes_back_from_some_pool(make_node):
    engines = [FakeEngine(), FakeEngine(), FakeEngine()]
    pools = make_node(*engines)
    assert pools.compilations == 3 * 3  # what the pools compiled before they were ready
    prompts = {f"r{i}": [i + 1, i + 2, i + 3] for i in range(60)}
    for name, prompt in prompts.items():
        pools.add_request(name, prompt, PARAMS, prompt=f"text of {name}")
    outputs = run(pools)
    assert outputs.keys() == prompts.keys()
    for name, output in outputs.items():
        assert output.outputs[0].token_ids == prompts[name][::-1]
        assert (output.prompt_token_ids, output.prompt) == (prompts[name], f"text of {name}")
    assert all(len(engine.seen) >= 8 for engine in engines)  # what each is given at first
    assert pools.stats.output_tokens == pools.stats.prompt_tokens == 180
    assert pools.stats.steps["was"] == sum(engine.stats.steps["was"] for engine in engines)
    assert (pools.kv_tokens, pools.max_concurrency, pools.mode) == (3 * 4096, 12, "was")


def test_a_pool_is_given_so_many_sequences_and_no_more(make_node):
    engines = [FakeEngine(max_concurrency=4, step_seconds=0.001) for _ in range(2)]
    pools = make_node(*engines)
    for i in range(100):
        pools.add_request(str(i), [1, 2], SamplingParams(n=1 + i % 3))
    most = 0
    while pools.has_work:
        pools.step()
        most = max(most, *(pool.num_sequences for pool in pools._pools))
        assert all(
            pool.num_sequences == sum(r.params.n for r in pool.requests.values())
            for pool in pools._pools
        )
    assert 8 <= most <= 8 + 2  # one sequence of room is enough for a request of three


def test_prompts_that_begin_alike_go_to_one_pool_as_far_as_load_is_even(make_node):
    def shares(**keys):
        engines = [FakeEngine(max_concurrency=16, max_model_len=999) for _ in range(2)]
        pools = make_node(*engines, **keys)
        for i in range(24):  # two groups, by turns, which halve evenly
            pools.add_request(f"{i % 2}-{i}", [i % 2 + 1] * 300 + [i + 1], PARAMS)
        run(pools)
        return [{name[0] for name in engine.seen} for engine in engines]

    assert sorted(map(sorted, shares())) == [["0"], ["1"]]
    engines = [FakeEngine(max_concurrency=16, max_model_len=999) for _ in range(2)]
    pools = make_node(*engines)
    for i in range(40):  # one group: more than its pool may be ahead
        pools.add_request(str(i), [7] * 300 + [i + 1], PARAMS)
    run(pools)
    assert min(len(engine.seen) for engine in engines) >= 10


def test_what_waits_comes_back_when_another_pool_runs_out(make_node):
    slow, quick = FakeEngine(step_seconds=0.05), FakeEngine(step_seconds=0.001)
    pools = make_node(slow, quick)
    for i in range(16):
        pools.add_request(str(i), [1] * ((i % 2 and 2) or 20), PARAMS)
    outputs = run(pools)
    assert len(outputs) == 16
    assert len(slow.seen) + len(quick.seen) > 16  # some were given out twice
    finished = [slow.stats.prompt_tokens, quick.stats.prompt_tokens]
    assert sum(finished) == sum(len(o.prompt_token_ids) for o in outputs.values())


def test_aborted_requests_are_gone_wherever_they_are(make_node):
    engine = FakeEngine(max_concurrency=1, step_seconds=0.01, max_model_len=9999)
    pools = make_node(engine)
    for name in "abcde":
        pools.add_request(name, [1] * (1000 if name != "e" else 2), PARAMS)
    pools.step()
    for name in ("a", "b", "c", "d", "unknown"):
        pools.abort(name)
    assert run(pools).keys() == {"e"}
    assert not engine.has_work


def test_a_request_that_can_never_run_is_refused_at_once(make_node):
    pools = make_node(FakeEngine(), FakeEngine())
    pools.add_request("a", [1], PARAMS)
    for name, prompt, message in (
        ("a", [1], "already in use"),
        ("b", [], "no tokens"),
        ("b", [1] * 64, "max_model_len=64"),
        ("b", [1 << 16], "vocabulary"),
    ):
        with pytest.raises(RequestError, match=message):
            pools.add_request(name, prompt, PARAMS)
    assert run(pools).keys() == {"a"}


def test_a_pool_that_ends_is_an_error_that_names_it(make_node):
    pools = make_node(FakeEngine(), FakeEngine(fail_at_step=3))
    for i in range(50):
        pools.add_request(str(i), [1] * 30, PARAMS)
    with pytest.raises(RuntimeError, match="pool 1 ended with exit code 1"):
        run(pools)


def test_a_configuration_that_a_pool_refuses_is_an_error_that_says_which(make_node):
    with pytest.raises(ConfigError, match="pool 1: too little memory"):
        make_node(FakeEngine(), FakeEngine(), answer=("refused", "too little memory"))


def test_each_pool_sees_its_own_gpus(monkeypatch):
    monkeypatch.setattr(node, "visible_gpus", lambda: ["7", "6", "5", "4", "3"])
    config = EngineConfig(
        model="m", platform="gpu", num_pools=2, pool_size=1, tensor_parallel_size=2
    )
    seen = [each["CUDA_VISIBLE_DEVICES"] for each in node._environments(config)]
    assert seen == ["7,6", "5,4"]


def command(tmp_path, count, pools):
    """The command line of a job of sums on the CPU, and its output."""
    rows = tmp_path / f"in{count}.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"{i}+{7 * i}=", "expected": str(8 * i)}) + "\n"
            for i in range(1, count + 1)
        )
    )
    output = tmp_path / f"out{pools}.jsonl"
    arguments = f"input={rows} output={output} pool_size=2 num_pools={pools} max_num_seqs=8"
    return [
        sys.executable,
        "-m",
        "sidp_jax.run",
        "--config",
        "tiny.yaml",
        *arguments.split(),
    ], output


def test_a_job_over_two_processes_gives_what_one_gives(tmp_path):
    run_two, two = command(tmp_path, 60, 2)
    done = subprocess.run(run_two, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"pool {number} is ready" in done.stderr for number in range(2))
    run_one, one = command(tmp_path, 60, 1)
    assert subprocess.run(run_one, capture_output=True).returncode == 0

    def answers(path):
        rows = {row["id"]: row["response"]["body"]["choices"] for row in read_results(path)}
        return rows

    assert answers(two) == answers(one)
    assert len(answers(two)) == 60
