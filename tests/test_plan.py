import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import groupby, pairwise, product
from math import prod
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from checkpoints import LAYOUTS
from helpers import small_config

from sidp_jax import plan, plan_replay, plan_search
from sidp_jax.batch import token_buckets
from sidp_jax.estimate import (
    FORMULA,
    Candidate,
    Setting,
    Workload,
    _concurrency,
    _imbalance,
    _shares,
    activation_bytes,
    attention_seconds,
    bucket,
    layer_parameters,
    layer_shape,
    memory,
    policy_of,
    step_seconds,
)
from sidp_jax.hardware import load_profile, profile_names, save_profile, value_at
from sidp_jax.kv_cache import kv_cache_spec
from sidp_jax.mesh import PARAMETER_AXES, make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.modes.policy import CAS, CAS_STAGGERED, REPLICATED, WAS, fetch_seconds
from sidp_jax.plan_replay import CLOSE
from sidp_jax.plan_search import (
    best,
    evaluate,
    fetch_hidden_from,
    mode_ranges,
    plain_candidates,
    pooled_candidates,
    tensor_sizes,
)
from sidp_jax.pool import PoolLayout
from sidp_jax.settle import is_plain, modes_of
from sidp_jax.weights import nbytes_per_device, weights_spec

SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"
ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LARGE = ("qwen2.5_72b", "qwen3_32b", "llama3.1_70b")


def shape(name):
    return ModelConfig.from_pretrained(SHAPES / name)


def setting(model="qwen2.5_72b", hardware="h200", **changes):
    model = shape(model) if isinstance(model, str) else model
    values = {"dtype_bytes": 2, "page_size": 64, "max_model_len": 8192} | changes
    return Setting(model, load_profile(hardware), gpu_memory_utilization=0.92, **values)


def candidate(pool_size=8, tensor_size=1, resident=0, modes=(WAS, CAS), **changes):
    values = {"pools": 1, "max_num_seqs": 256, "max_num_batched_tokens": 4096} | changes
    return Candidate(pool_size, tensor_size, resident_layers=resident, modes=modes, **values)


def arguments(*more, model="qwen2.5_72b", hardware="h200"):
    chosen = [f"model={SHAPES / model}", f"hardware={hardware}"]
    return ["--config", "qwen72b.yaml", *chosen, *more]


def make(*more, **choice):
    """The plan of a command line."""
    parsed = plan._parse(arguments(*more, **choice))
    workload, overrides = plan.split_workload(parsed.overrides)
    config = plan.load_config(parsed.config, overrides)
    return plan.make_plan(config, workload, parsed.gpus)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Plans by the whole search, in a process without the type checks that make it slow here.

    The second is for GPUs whose link is wide and slow to start: good for fetches, bad for TP.
    """
    code = (
        "import sys, json; from sidp_jax import plan\n"
        "for line in json.loads(sys.argv[1]): plan.main(line)\n"
        "sys.exit('jax' in sys.modules)"
    )
    profile = tmp_path_factory.mktemp("profiles") / "linked.yaml"
    faster = {"link_bandwidth": 900e9, "hop_latency": 100e-6, "fetch_interference": 0.0}
    save_profile(replace(load_profile("h100"), **faster), profile)
    pays = arguments("--json", "workload=1024,64,7000", model="llama3.1_70b", hardware=str(profile))
    lines = [arguments("--json", "workload=2048,1024"), pays]
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"planning must not import jax; {done.stderr}"
    first, second = done.stdout.split("\n}\n{\n")
    return json.loads(first + "}"), json.loads("{" + second)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A search of few configurations, and replays of short jobs."""
    monkeypatch.setattr(plan_replay, "rounds", lambda options, output: 48)
    monkeypatch.setattr(plan_search, "SEQS_LADDER", (256, 512))
    monkeypatch.setattr(plan_search, "BUDGET_LADDER", (2048,))
    monkeypatch.setattr(plan_search, "RESIDENT_STEPS", 1)


# ---- the arithmetic is that of the engine


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layer_parameters_are_those_of_the_layer(architecture):
    config = small_config(architecture=architecture)
    spec = layer_spec(config)
    got = layer_parameters(config)
    assert {name: p.shape for name, p in got.items()} == {n: s.shape for n, s in spec.items()}
    sharded = {name: any(a in PARAMETER_AXES for a in s.axes) for name, s in spec.items()}
    assert {name: p.sharded for name, p in got.items()} == sharded


@pytest.mark.parametrize(("architecture", "size"), [*product(ARCHITECTURES, (1, 2))])
def test_a_layer_weighs_what_its_arrays_weigh(architecture, size):
    model = small_config(architecture=architecture)
    spec = weights_spec(
        model, PoolLayout(6, 1), make_mesh(1, size), layer_loop="unrolled", dtype=np.dtype("f4")
    )
    arrays = spec.pooled[0].values()
    nbytes = sum(4 * prod(array.sharding.shard_shape(array.shape)) for array in arrays)
    assert layer_shape(model, size, 4).weight_bytes == nbytes


@pytest.mark.parametrize(("pool", "tensor", "resident"), LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_of_the_arrays(pool, tensor, resident, tied):
    model = small_config(5, tie_word_embeddings=tied)
    mesh = make_mesh(pool, tensor)
    held = memory(
        setting(model, dtype_bytes=4, page_size=16, max_model_len=64),
        candidate(pool, tensor, resident, num_kv_pages=7),
    )
    layout = PoolLayout(5, pool, resident)
    weights = weights_spec(model, layout, mesh, layer_loop="unrolled", dtype=np.dtype("float32"))
    assert held.weights == nbytes_per_device(weights)
    cache = kv_cache_spec(model, mesh, num_pages=7, page_size=16, dtype=np.dtype("float32"))
    assert held.kv_cache == 4 * sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) for leaf in jax.tree.leaves(cache)
    )
    assert held.kv_tokens == 7 * 16


def test_memory_of_qwen72b():
    held = memory(setting(), candidate())
    layer = layer_shape(shape("qwen2.5_72b"), 1, 2).weight_bytes
    assert layer == pytest.approx(1.755e9, rel=1e-3)
    down = 2 * 8192 * 29568
    assert held.layer_buffers == pytest.approx(layer + down, rel=1e-3)
    parts = held.weights, held.layer_buffers, held.activations, held.sampling
    page = 64 * 327680
    assert 0 <= held.usable - sum(parts) - held.kv_cache < page
    assert held.fits
    plain = memory(setting(), candidate(1, 1, 80, (REPLICATED,)))
    assert plain.weights > plain.usable
    assert not plain.fits


def test_a_mode_needs_memory_for_the_steps_that_it_may_run():
    where = setting()
    both = activation_bytes(where, candidate())
    lockstep = policy_of(where, candidate())
    most = max(t for t in token_buckets(4096) if lockstep.may_run(CAS, t))
    assert most < 4096
    assert both[CAS] == activation_bytes(where, candidate(max_num_batched_tokens=most))[CAS]
    alone = activation_bytes(where, candidate(modes=(CAS,)))[CAS]
    plain = activation_bytes(where, candidate(1, 1, 80, (REPLICATED,)))[REPLICATED]
    assert both[WAS] < plain, "a down projection's buffer is free till then"
    assert 7 < alone / plain <= 8, "lockstep cas holds everyone's tokens"
    staggered = activation_bytes(where, candidate(modes=(CAS_STAGGERED,)))[CAS_STAGGERED]
    assert 1 < staggered / plain < 2, "a guest's beside its own"


def test_a_configuration_fits_if_one_sequence_does():
    one = 8192 // 64
    assert memory(setting(), candidate(num_kv_pages=one)).fits
    assert not memory(setting(), candidate(num_kv_pages=one - 1)).fits
    assert not memory(setting(), candidate(num_kv_pages=10**6)).fits, "more than the memory"


def fetched(spans, layer, fetch, interference):
    """A step of WaS, event by event: a fetch starts with the layers that are computed before it."""
    now = 0.0
    for number, count in enumerate(spans):
        fetches = number + 1 < len(spans)
        arrives = now + fetch if fetches else now
        disturbed = interference * min(fetch, count * layer) if fetches else 0.0
        for _ in range(count):
            now += layer
        now = max(now, arrives) + disturbed
    return now


@pytest.mark.parametrize(("resident", "tokens"), [*product((0, 7, 40, 80), (16, 1024, 4096))])
@pytest.mark.parametrize("attention", [0.0, 5e-4])
def test_was_is_as_long_as_its_events(resident, tokens, attention):
    policy = policy_of(setting(), candidate(resident=resident))
    pooled = PoolLayout(80, 8, resident).pooled
    spans = [end - start for start, end in pairwise([0, *pooled, 80])]
    dense = policy.seconds(REPLICATED, tokens)
    fetch = fetch_seconds(policy.shape, policy.hardware)
    layers = fetched(spans, dense, fetch, policy.hardware.fetch_interference) + 80 * attention
    assert policy.step_seconds(WAS, tokens, attention) == pytest.approx(layers)


def stages(pool, layers, stage):
    """Staggered CaS, event by event: replica g is done a stage after its owner served it."""
    done = [0.0] * pool
    free = [0.0] * pool  # when each owner has served whom it serves
    for layer in range(layers):
        for g in range(pool):
            owner = layer % pool
            start = max(done[g], free[owner], 0.0 if layer else g * stage)
            done[g] = free[owner] = start + stage
    return max(done)


@pytest.mark.parametrize(("pool", "layers"), [(2, 7), (8, 80), (6, 80)])
def test_staggered_cas_is_as_long_as_its_events(pool, layers):
    model = small_config(layers)
    policy = policy_of(setting(model), candidate(pool, modes=(CAS_STAGGERED,)))
    shape, hardware, attention = policy.shape, policy.hardware, 1e-5
    ratio = value_at(hardware.indexed_matmul_ratio, 64)
    stage = ratio * hardware.dense_seconds(64, shape.weight_bytes, shape.flops_per_token)
    moved = 64 * (shape.qkv_bytes + shape.attended_bytes + shape.activation_bytes)
    stage += attention + moved / hardware.link_bandwidth + 3 * hardware.permute_latency
    got = policy.step_seconds(CAS_STAGGERED, 64, attention)
    assert got == pytest.approx(stages(pool, layers, stage))


def test_a_step_costs_what_its_parts_cost():
    where = setting("qwen3_32b")
    link, latency = where.hardware.link_bandwidth, where.hardware.hop_latency
    plain = candidate(1, 1, 64, (REPLICATED,))
    policy = policy_of(where, plain)
    kv_update = value_at(where.hardware.kv_update, 512)
    attention = attention_seconds(where, plain, 512, 100 * 1152, [(400 * 512, 1024)])
    reads = 100 * 1152 * 2 * 8 * 128 * 2 / 4.05e12
    prefill = 400 * 512 * 4 * 64 * 128 / 409e12
    assert attention == pytest.approx(reads + prefill + kv_update)
    seconds = step_seconds(where, plain, policy, REPLICATED, 512, attention)
    table = 151936 * 5120
    head = where.hardware.dense_seconds(256, 2 * table, 2 * table)
    logits = 4 * 256 * 151936 * 4 / where.hardware.memory_bandwidth
    layers = 64 * (policy.seconds(REPLICATED, 512) + attention)
    assert seconds == pytest.approx(layers + head + logits)
    halves = candidate(1, 2, 64, (REPLICATED,))
    policy = policy_of(where, halves)
    shape = policy.shape
    dense = where.hardware.dense_seconds(512, shape.weight_bytes, shape.flops_per_token)
    reduced = 2 * (2 * 0.5 * 512 * 5120 * 2 / link + latency)
    exchanged = 256 * 151936 * 4 / 2 / link
    halved = attention_seconds(where, halves, 512, 100 * 1152, [(400 * 512, 1024)])
    assert halved == pytest.approx((reads + prefill) / 2 + kv_update)
    expected = 64 * (dense + reduced + halved) + exchanged + logits
    expected += where.hardware.dense_seconds(256, table, table)
    got = step_seconds(where, halves, policy, REPLICATED, 512, halved)
    assert got == pytest.approx(expected)


def test_lockstep_cas_costs_what_its_parts_cost():
    where, ours = setting(), candidate()
    policy = policy_of(where, ours)
    moved = 7 * 100 * 2 * (8192 + 8192 + 10240 + 8192)
    everyone = where.hardware.dense_seconds(
        800, policy.shape.weight_bytes, policy.shape.flops_per_token
    )
    link, latency = where.hardware.link_bandwidth, where.hardware.hop_latency
    expected = everyone + moved / link + 4 * latency
    assert policy.seconds(CAS, 100) == pytest.approx(expected)


# ---- modes and configurations


@pytest.mark.parametrize(("hardware", "model"), [*product(profile_names(), LARGE)])
def test_mode_ranges_name_the_cheapest_mode(hardware, model):
    policy = policy_of(setting(model, hardware), candidate(modes=(WAS, CAS, CAS_STAGGERED)))
    ranges = mode_ranges(policy)
    assert ranges[0][0] == 1
    ends = [first for first, _ in ranges[1:]]
    for tokens in {*range(1, 8192, 311), *ends, *(end - 1 for end in ends)}:
        mode = next(mode for first, mode in reversed(ranges) if first <= tokens)
        costs = {mode: policy.seconds(mode, tokens) for mode in policy.modes}
        assert costs[mode] == min(costs.values())


@pytest.mark.parametrize("hardware", ["h20", "h200", "b200"])
def test_compute_hides_the_fetch_from_there_on(hardware):
    policy = policy_of(setting(hardware=hardware), candidate())
    hidden = fetch_hidden_from(policy)
    fetch = fetch_seconds(policy.shape, policy.hardware)
    assert policy.seconds(REPLICATED, hidden - 1) < fetch <= policy.seconds(REPLICATED, hidden)


def test_throughput_names_what_bounds_it():
    where, work = setting(), Workload(1024, 256)

    def limit(**changes):
        return evaluate(where, candidate(**changes), work).speed

    assert limit().limit == "max_num_seqs"
    assert limit().running == 256
    assert limit(max_num_seqs=1024).limit == "KV cache"
    full = limit(max_num_batched_tokens=512)
    assert full.limit == "max_num_batched_tokens"
    assert [(shape.tokens, shape.share) for shape in full.shapes] == [(512, 1.0)]
    tail = evaluate(where, candidate(max_num_seqs=4), Workload(1, 8000)).speed
    assert {shape.mode for shape in tail.shapes} == {CAS}, "as the policy would"
    assert tail.requests_per_second * 8000 == pytest.approx(tail.output_tokens_per_second)


def test_throughput_is_that_of_the_steps_it_is_made_of():
    where, ours, work = setting(), candidate(), Workload(1024, 256)
    speed = evaluate(where, ours, work).speed
    policy = policy_of(where, ours)
    mean = 0.0
    for step in speed.shapes:
        assert step.mode == policy.best(step.tokens)
        pairs = 256 * 1024 / 256 * 512 * _imbalance(ours, 256, work)
        attention = attention_seconds(where, ours, step.tokens, 256 * 1152, [(pairs, 1024)])
        seconds = step_seconds(where, ours, policy, step.mode, step.tokens, attention)
        assert step.seconds == pytest.approx(seconds)
        mean += step.share * seconds
    assert speed.output_tokens_per_second == pytest.approx(8 * 256 / mean)
    assert bucket(ours, 257) == next(size for size in token_buckets(4096) if size >= 257)


@pytest.mark.parametrize(
    ("prompt", "output", "running", "pool", "budget"),
    [
        (1024, 256, 256, 8, 4096),
        (128, 1024, 256, 4, 4096),
        (9000, 300, 64, 1, 4096),
        (2048, 64, 64, 2, 2176),
        (128, 64, 512, 2, 2048),
    ],
)
def test_steps_have_the_shapes_of_a_queue_of_prompts(prompt, output, running, pool, budget):
    ours = candidate(pool, max_num_seqs=running, max_num_batched_tokens=budget)
    shares = _shares(ours, running, Workload(prompt, output))
    rng, waiting, room = np.random.default_rng(0), np.zeros(pool), budget - running
    tokens = []
    for _ in range(5000):
        waiting += rng.poisson(running / output, pool) * prompt
        prefilled = np.minimum(waiting, room)
        waiting -= prefilled
        tokens.append(bucket(ours, running + int(prefilled.max())))
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    estimated = sum(size * share for size, share in shares.items())
    assert estimated == pytest.approx(np.mean(tokens), rel=0.05)
    most = max(shares, key=shares.get)
    assert shares[most] == pytest.approx(np.mean(np.array(tokens) == most), abs=0.08)


@pytest.mark.parametrize(("pool", "prompt"), [(1, 32768), (8, 32768), (4, 8192), (8, 100)])
def test_a_pool_waits_for_the_replica_that_is_furthest_in_its_prompt(pool, prompt):
    ours = candidate(pool, max_num_seqs=16, max_num_batched_tokens=528)
    chunks = max(1, prompt // 512)
    rng = np.random.default_rng(0)
    places = (rng.integers(0, chunks, (20000, pool)) + 0.5) / chunks
    drawn = places.max(1).mean() / 0.5
    assert _imbalance(ours, 16, Workload(prompt, 64)) == pytest.approx(drawn, rel=0.03)


def test_the_cache_holds_its_sequences_with_some_to_spare():
    held, work = 300_000, Workload(1024, 1024)
    running = _concurrency(setting(), held, work)
    rng = np.random.default_rng(0)
    needed = (1024 + rng.random((2000, running)) * 1024).sum(1)
    assert 0.9 < (needed < held).mean() < 1
    assert _concurrency(setting(), held, Workload(30_000, 1)) == 9, "their lengths hardly vary"


def test_the_search_admits_no_more_than_the_cache_holds():
    work = Workload(1024, 8000)
    wide = candidate(max_num_seqs=2048, modes=(WAS,))
    assert evaluate(setting(max_model_len=9024), wide, work).speed.limit == "KV cache"
    found = best(setting(max_model_len=9024), [wide], work)
    assert found.candidate.max_num_seqs == found.speed.running < 2048


def test_the_search_tries_every_way_to_use_the_node():
    model = shape("qwen2.5_72b")
    assert tensor_sizes(model, 8) == [1, 2, 4, 8]
    assert tensor_sizes(model, 6) == [1, 2], "3 divides neither the heads"
    ways = {
        (c.pools, c.pool_size, c.tensor_size)
        for c in pooled_candidates(model, 8, (WAS, CAS), load_profile("h200"))
        if c.pools * c.pool_size * c.tensor_size == 8
    }
    assert ways == {(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4)}
    assert all(c.max_num_seqs <= c.max_num_batched_tokens for c in plain_candidates(model, 8, 2))
    assert best(setting(), plain_candidates(model, 8, 1), Workload(1024, 256)) is None


def test_estimates_know_only_modes_that_they_know():
    with pytest.raises(ValueError, match="can be estimated for replicated, was, cas, cas_stag"):
        candidate(modes=(WAS, "dp"))


def test_resident_layers_rule_out_the_staggered_schedule(monkeypatch):
    monkeypatch.setattr(plan_search, "RESIDENT_STEPS", 2)
    node = shape("qwen2.5_72b"), 8
    ways = [*pooled_candidates(*node, (WAS, CAS_STAGGERED), load_profile("h200"))]
    assert {c.modes for c in ways if c.resident_layers} == {(WAS,)}
    assert {c.modes for c in ways if not c.resident_layers} == {(WAS, CAS_STAGGERED)}
    ways = [*pooled_candidates(*node, (CAS_STAGGERED,), load_profile("h200"))]
    assert all(not c.resident_layers for c in ways)


# ---- the plan


def test_plan_of_qwen72b_on_eight_h200(full):
    made, _ = full
    assert made["devices"] == 8
    assert made["owners"][3] == list(range(3, 80, 8))
    options = made["configurations"]
    assert list(options) == ["as configured", "plain DP", "best DP x TP", "best pooled"]
    assert options["plain DP"]["throughput"] is None
    tensor_size = options["best DP x TP"]["configuration"]["tensor_size"]
    assert tensor_size in (2, 4), "which of them is better is a close call"
    modes = [step["best"] for step in made["steps"]]
    assert [mode for mode, _ in groupby(modes)] == ["cas_staggered", "was"]
    assert [mode for _, mode in made["mode_ranges"]] == ["cas_staggered", "was"]
    assert 1650 < made["fetch_hidden_from"] < 1800
    assert made["recommendation"]["pool"] is False
    assert made["recommendation"]["set"]["tensor_parallel_size"] == tensor_size
    assert made["recommendation"]["set"]["num_pools"] == 8 // tensor_size
    assert made["hardware"]["source"]


def test_pooling_holds_more_kv_than_the_same_tensor_parallelism():
    def tokens(**changes):
        work = candidate(tensor_size=2, max_num_batched_tokens=2048, **changes)
        return memory(setting(), work).kv_tokens

    pooled = tokens(pool_size=4, modes=(WAS,))
    assert 1.8 < pooled / tokens(pool_size=1, resident=80, modes=(REPLICATED,)) < 1.95


def test_a_pool_is_recommended_where_it_pays(full):
    _, made = full
    assert made["recommendation"]["pool"] is True
    assert made["recommendation"]["set"]["pool_size"] > 1
    options = made["configurations"]
    assert options["plain DP"]["throughput"] is None, "one GPU holds no copy"
    pooled, plain = (options[name]["throughput"] for name in ("best pooled", "best DP x TP"))
    rates = [speed["output_tokens_per_second"] for speed in (pooled, plain)]
    assert rates[0] > CLOSE * plan.WORTHWHILE * rates[1]
    advice, replays = made["recommendation"], made["replays"]
    assert advice["decided_by"] == "replay of a job, simulated"
    assert "over the whole job" in advice["reason"]
    assert {done["requests"] for done in replays} == {7000}
    chosen = {key: advice["set"][key] for key in ("pool_size", "resident_layers", "max_num_seqs")}
    best = max(replays, key=lambda done: done["output_tokens_per_second"])
    assert {key: best["configuration"][key] for key in chosen} == chosen
    others = [
        r["output_tokens_per_second"] for r in replays if r["configuration"]["pool_size"] == 1
    ]
    assert best["output_tokens_per_second"] > plan.WORTHWHILE * max(others)


def test_close_calls_are_settled_by_a_replay(full):
    made, _ = full
    replays, advice = made["replays"], made["recommendation"]
    best = max(replays, key=lambda done: done["steady_output_tokens_per_second"])
    assert best["configuration"]["pool_size"] == 1
    assert best["configuration"]["tensor_size"] == advice["set"]["tensor_parallel_size"]
    assert best["configuration"]["max_num_seqs"] == advice["set"]["max_num_seqs"]
    least = CLOSE * max(done["estimated_output_tokens_per_second"] for done in replays)
    assert all(done["estimated_output_tokens_per_second"] >= least for done in replays)


def test_what_is_clear_is_not_replayed():
    made = make("pool_size=1", "workload=2000,2000", "--gpus", "1", model="qwen3_32b")
    assert made["replays"] == []
    assert made["recommendation"]["decided_by"] == "estimate"


def test_nothing_is_recommended_where_nothing_fits_or_is_known():
    made = make("pool_size=1", hardware="h100")
    assert made["recommendation"]["set"] is None
    assert "no configuration of these GPUs fits" in made["recommendation"]["reason"]
    made = make(hardware="cpu")
    assert "does not know the memory" in made["recommendation"]["reason"]
    assert list(made["configurations"]) == ["as configured"]


def test_a_node_of_several_pools():
    made = make("pool_size=4", "--gpus", "8")
    assert made["configurations"]["as configured"]["configuration"]["pools"] == 2
    assert len(made["owners"]) == 4


# ---- the command line


def test_tables_can_be_read_without_a_terminal(capsys):
    assert plan.main(arguments("workload=1024,256")) == 0
    text = capsys.readouterr().out
    for words in (
        "measured on H200s",
        "0, 8, 16, 24",
        "does not fit",
        "DP4 x TP2",
        "Not measured: more than two GPUs",
        "was from",
        "do not pool",
        "1 pool of 8",
        "KV tokens, all GPUs",
        "Close calls: a job of",
        "decided by replay of a job, simulated",
        *FORMULA,
    ):
        assert words in text
    assert "…" not in text, "nothing is cut"
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("more", [["mode=replicated"], ["pool_size=1"], ["max_model_len=32768"]])
def test_every_kind_of_configuration_has_its_tables(more, capsys):
    assert plan.main(arguments(*more)) == 0
    assert "Recommendation" in capsys.readouterr().out
    assert plan.main(["--config", "tiny.yaml", "workload=16,16"]) == 0
    assert "unknown" in capsys.readouterr().out


def test_copies_hold_the_rows_in_use_and_on_their_way():
    small = ("pool_size=2", "max_model_len=4096")
    planned = {
        fetch: make(*small, f"was_fetch={fetch}", "mode=was")["configurations"]["as configured"]
        for fetch in ("auto", "copies", "collective")
    }
    assert planned["auto"] == planned["copies"]
    layer = make(*small)["model"]["layer_bytes"]
    held = {fetch: plan["memory"]["layer_buffers"] for fetch, plan in planned.items()}
    assert held["copies"] == pytest.approx(3 * layer, rel=1e-3)
    assert held["collective"] < 1.4 * layer
    rates = {f: p["throughput"]["output_tokens_per_second"] for f, p in planned.items()}
    assert rates["copies"] > rates["collective"]


def test_layers_on_the_host_make_room_for_the_cache(capsys):
    one = ("pool_size=1", "max_model_len=4096")
    assert not make(*one)["configurations"]["as configured"]["memory"]["fits"]
    held = make(*one, "pool_host_layers=20")["configurations"]["as configured"]["memory"]
    assert held["fits"]
    layer = make(*one)["model"]["layer_bytes"]
    assert held["host"] == 20 * layer
    assert held["weights"] == 60 * layer + 2 * 2 * 152064 * 8192 + 2 * 8192
    # Buffers for two layers, without the norms and biases.
    assert held["layer_buffers"] == pytest.approx(2 * layer, rel=1e-3)
    assert plan.main(arguments(*one, "pool_host_layers=20")) == 0
    text = capsys.readouterr().out
    assert "on the host" in text
    assert "compute hides the fetch from" in text


def test_json_is_the_whole_plan(capsys):
    assert plan.main(arguments("--json", "workload=128,64")) == 0
    made = json.loads(json.dumps(make("workload=128,64")))
    assert json.loads(capsys.readouterr().out) == made


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model=nowhere"], "there is no .*nowhere/config.json; a plan needs no weights"),
        (["workload=7"], "workload=7 must be IN,OUT"),
        (["workload=7,8,9,10"], "workload=7,8,9,10 must be IN,OUT"),
        (["workload=7,8,-9"], "requests=-9 must be at least 0"),
        (["workload=0,5"], "workload=0,5 must be two counts"),
        (["workload=8000,500"], "workload=8000,500 is longer than max_model_len=8192"),
        (["max_model_len=40000"], "max_model_len=40000 is more than the 32768"),
        (["pool_size=81"], "pool_size=81 must lie between 1 and the model's 80"),
        (["tensor_parallel_size=3"], "tensor_parallel_size=3 must divide the model's 8 key"),
        (["--gpus", "12"], "--gpus 12 must be a multiple of the 8"),
        (["hardware=nowhere.yaml"], "hardware='nowhere.yaml': there is no file"),
        (["hardware=a100"], "hardware='a100' must be one of"),
        (["worklaod=1,2"], "unknown key 'worklaod'"),
    ],
)
def test_what_cannot_be_planned_is_said(more, message, capsys):
    assert plan.main(arguments(*more)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(message, captured.err)


def test_hardware_auto_goes_by_the_first_gpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(plan, "_GPU_FOLDER", tmp_path)
    assert plan.main(arguments("hardware=auto")) == 2
    assert "set hardware=h200" in capsys.readouterr().err
    (tmp_path / "0000:01").mkdir()
    (tmp_path / "0000:01" / "information").write_text("Model: \t\t NVIDIA H20\nIRQ: 1\n")
    assert make("hardware=auto")["hardware"]["name"] == "h20"
    assert make("hardware=auto", "platform=cpu")["hardware"]["name"] == "cpu"


def test_the_profile_in_use_can_be_kept(tmp_path, capsys):
    path = tmp_path / "ours.yaml"
    assert plan.main(arguments("--save-profile", str(path))) == 0
    capsys.readouterr()
    ours = make(hardware=str(path))["hardware"]
    assert ours == make()["hardware"] | {"name": "ours"}


def test_hardware_can_be_measured(tmp_path, capsys):
    path = tmp_path / "here.yaml"
    chosen = arguments("platform=cpu", "pool_size=2", "--json", hardware="measure")
    assert plan.main([*chosen, "--save-profile", str(path)]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["kind"].startswith("estimates, from a profile that this command measured")
    assert made["hardware"]["name"] == "measure"
    assert "measured on" in made["hardware"]["source"]
    assert load_profile(str(path)).layer_ms


def test_a_figure_needs_matplotlib(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plan.main(arguments("--figure", str(tmp_path / "plan.png"))) == 2
    assert "sidp-jax[plot]" in capsys.readouterr().err


def test_the_figure_shows_times_and_bytes(monkeypatch, tmp_path, capsys):
    figure, times, bytes_ = MagicMock(), MagicMock(), MagicMock()
    figure.subplots.return_value = times, bytes_
    module = MagicMock()
    module.Figure.return_value = figure
    monkeypatch.setitem(sys.modules, "matplotlib", MagicMock())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    path = tmp_path / "plan.png"
    assert plan.main(arguments("--figure", str(path))) == 0
    labels = [call.kwargs["label"] for call in times.plot.call_args_list]
    assert labels == ["replicated", "was", "cas", "cas_staggered", "fetch", "hop", "hop_staggered"]
    assert len(bytes_.barh.call_args_list) == 5
    assert "estimated" in figure.suptitle.call_args.args[0]
    assert figure.savefig.call_args.args == (path,)


@pytest.mark.parametrize("mode", ["was", "cas", "auto", "replicated"])
def test_a_pool_of_one_is_plain(mode):
    config = plan.load_config("qwen72b.yaml", ["pool_size=1", f"mode={mode}", "model=m"])
    assert is_plain(config)
    assert modes_of(config, load_profile("h200")) == (REPLICATED,)
    assert not is_plain(replace(config, pool_size=2, mode="was"))
