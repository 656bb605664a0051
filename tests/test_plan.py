import json
import re
import subprocess
import sys
from itertools import pairwise, product
from math import prod
from pathlib import Path
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
from checkpoints import LAYOUTS
from helpers import small_config

from sidp_jax import plan, plan_search
from sidp_jax.estimate import (
    FORMULA,
    Candidate,
    Setting,
    Workload,
    fetch_seconds,
    hop_seconds,
    layer_parameters,
    layer_shape,
    memory,
    policy_of,
    step_seconds,
)
from sidp_jax.hardware import load_profile, profile_names
from sidp_jax.kv_cache import kv_cache_spec
from sidp_jax.mesh import PARAMETER_AXES, make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.modes.policy import CAS, REPLICATED, WAS
from sidp_jax.plan_search import (
    best,
    crossover,
    evaluate,
    fetch_hidden_from,
    plain_candidates,
    pooled_candidates,
    tensor_sizes,
)
from sidp_jax.pool import PoolLayout
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
def full():
    """Plans by the whole search, in a process without the type checks that make it slow here."""
    code = (
        "import sys, json; from sidp_jax import plan\n"
        "for line in json.loads(sys.argv[1]): plan.main(line)\n"
        "sys.exit('jax' in sys.modules)"
    )
    lines = [arguments("--json"), arguments("--json", model="qwen3_32b", hardware="h100")]
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"planning must not import jax; {done.stderr}"
    first, second = done.stdout.split("\n}\n{\n")
    return json.loads(first + "}"), json.loads("{" + second)


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """A search of few configurations."""
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
    assert held.layer_buffers == 2 * layer
    parts = held.weights, held.layer_buffers, held.activations, held.sampling
    page = 64 * 327680
    assert 0 <= held.usable - sum(parts) - held.kv_cache < page
    assert held.fits
    plain = memory(setting(), candidate(1, 1, 80, (REPLICATED,)))
    assert plain.weights > plain.usable
    assert not plain.fits
    only_was = memory(setting(), candidate(modes=(WAS,)))
    assert 7 < held.activations / only_was.activations <= 8, "lockstep cas holds everyone's tokens"


def test_a_configuration_fits_if_one_sequence_does():
    one = 8192 // 64
    assert memory(setting(), candidate(num_kv_pages=one)).fits
    assert not memory(setting(), candidate(num_kv_pages=one - 1)).fits
    assert not memory(setting(), candidate(num_kv_pages=10**6)).fits, "more than the memory"


def fetched(spans, layer, fetch):
    """A step of WaS, event by event: a fetch starts with the layers that are computed before it."""
    now = 0.0
    for number, count in enumerate(spans):
        arrives = now + fetch if number + 1 < len(spans) else now
        for _ in range(count):
            now += layer
        now = max(now, arrives)
    return now


@pytest.mark.parametrize(("resident", "tokens"), [*product((0, 7, 40, 80), (16, 1024, 4096))])
def test_was_is_as_long_as_its_events(resident, tokens):
    where, ours = setting(), candidate(resident=resident)
    policy, workload = policy_of(where, ours), Workload(1, 1)
    pooled = PoolLayout(80, 8, resident).pooled
    spans = [end - start for start, end in pairwise([0, *pooled, 80])]
    layers = fetched(spans, policy.seconds(REPLICATED, tokens), fetch_seconds(policy))
    got = step_seconds(where, ours, WAS, tokens, 0.0, workload)
    few = 80 * tokens * 2 * 64 * 128 / where.hardware.flops  # attention of prompts of one token
    head = 152064 * 8192 * 2 / 8 / where.hardware.memory_bandwidth
    assert layers <= got - head <= layers + few * 1.001


def test_a_step_costs_what_its_parts_cost():
    where, workload = setting("qwen3_32b"), Workload(1024, 256)
    plain = candidate(1, 1, 64, (REPLICATED,))
    policy = policy_of(where, plain)
    seconds = step_seconds(where, plain, REPLICATED, 500, 100.0, workload)
    reads = 64 * 100 * 1152 * 2 * 8 * 128 * 2 / 4.28e12
    prefill = 64 * 400 * 2 * 64 * 128 * 1024 / 700e12
    head = 151936 * 5120 * 2 / 4.28e12
    assert seconds == pytest.approx(64 * policy.seconds(REPLICATED, 500) + reads + prefill + head)
    halves = candidate(1, 2, 64, (REPLICATED,))
    reduced = 64 * 2 * (2 * 0.5 * 500 * 5120 * 2 / 385e9 + 10e-6)
    exchanged = 100 * 151936 * 4 / 2 / 385e9
    expected = 64 * policy_of(where, halves).seconds(REPLICATED, 500)
    expected += reads / 2 + prefill / 2 + head / 2 + reduced + exchanged
    assert step_seconds(where, halves, REPLICATED, 500, 100.0, workload) == pytest.approx(expected)


def test_fetch_and_hop_are_the_link_parts_of_a_layer():
    where, ours = setting(), candidate()
    policy = policy_of(where, ours)
    assert fetch_seconds(policy) == policy.shape.weight_bytes / 385e9
    moved = 7 * 100 * 2 * (8192 + 8192 + 10240 + 8192)
    assert hop_seconds(policy, 100) == pytest.approx(moved / 385e9 + 4 * 10e-6)


# ---- modes and configurations


@pytest.mark.parametrize(("hardware", "model"), [*product(profile_names(), LARGE)])
def test_the_crossover_is_the_only_one(hardware, model):
    policy = policy_of(setting(model, hardware), candidate())
    first, hidden = crossover(policy), fetch_hidden_from(policy)
    for tokens in {*range(1, 4096, 311), first - 1, first, hidden - 1, hidden} - {0}:
        was, cas, home = (policy.seconds(mode, tokens) for mode in (WAS, CAS, REPLICATED))
        assert (was <= cas) == (tokens >= first)
        assert (was <= home) == (tokens >= hidden)


def test_throughput_names_what_bounds_it():
    where, work = setting(), Workload(1024, 256)

    def limit(**changes):
        return evaluate(where, candidate(**changes), work).speed

    assert limit().limit == "max_num_seqs"
    assert limit().running == 256
    assert limit(max_num_seqs=1024).limit == "KV cache"
    assert limit(max_num_batched_tokens=512).limit == "max_num_batched_tokens"
    assert limit(max_num_batched_tokens=512).step_tokens == 512
    tail = evaluate(where, candidate(max_num_seqs=4), Workload(1, 8000)).speed
    assert tail.mode == CAS, "as the policy would"
    assert tail.requests_per_second * 8000 == pytest.approx(tail.output_tokens_per_second)


def test_the_search_tries_every_way_to_use_the_node():
    model = shape("qwen2.5_72b")
    assert tensor_sizes(model, 8) == [1, 2, 4, 8]
    assert tensor_sizes(model, 6) == [1, 2], "3 divides neither the heads"
    ways = {
        (c.pools, c.pool_size, c.tensor_size)
        for c in pooled_candidates(model, 8, (WAS, CAS))
        if c.pools * c.pool_size * c.tensor_size == 8
    }
    assert ways == {(1, 8, 1), (2, 4, 1), (4, 2, 1), (1, 4, 2), (2, 2, 2), (1, 2, 4)}
    assert all(c.max_num_seqs <= c.max_num_batched_tokens for c in plain_candidates(model, 8, 2))
    assert best(setting(), plain_candidates(model, 8, 1), Workload(1024, 256)) is None


def test_estimates_know_only_modes_that_they_know():
    with pytest.raises(ValueError, match="can be estimated for replicated, was, cas alone"):
        candidate(modes=(WAS, "cas_staggered"))


# ---- the plan


def test_plan_of_qwen72b_on_eight_h200(full):
    made, _ = full
    assert made["devices"] == 8
    assert made["owners"][3] == list(range(3, 80, 8))
    options = made["configurations"]
    assert list(options) == ["as configured", "plain DP", "best DP x TP", "best pooled"]
    assert options["plain DP"]["throughput"] is None
    assert options["best DP x TP"]["configuration"]["tensor_size"] == 2
    assert [step["best"] for step in made["steps"]] == ["cas"] * 2 + ["was"] * 5
    assert 64 < made["crossover"] < 256
    assert 1024 < made["fetch_hidden_from"] < 2048
    assert made["recommendation"]["pool"] is False
    assert made["recommendation"]["set"]["tensor_parallel_size"] == 2
    assert made["recommendation"]["jobs"] == 4
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
    rate = {n: o["throughput"]["output_tokens_per_second"] for n, o in options.items()}
    plain = max(rate["plain DP"], rate["best DP x TP"])
    assert rate["best pooled"] > plan.WORTHWHILE * plain


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
        "measured on one H200",
        "0, 8, 16, 24",
        "does not fit",
        "DP4 x TP2",
        "the staggered one is not counted",
        "do not pool",
        "1 pool of 8",
        "KV tokens, all GPUs",
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


def test_json_is_the_whole_plan(capsys):
    assert plan.main(arguments("--json", "workload=128,64")) == 0
    assert json.loads(capsys.readouterr().out) == make("workload=128,64")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["model=nowhere"], "there is no .*nowhere/config.json; a plan needs no weights"),
        (["workload=7"], "workload=7 must be IN,OUT"),
        (["workload=0,5"], "workload=0,5 must be two counts"),
        (["workload=8000,500"], "workload=8000,500 is longer than max_model_len=8192"),
        (["max_model_len=40000"], "max_model_len=40000 is more than the 32768"),
        (["pool_size=81"], "pool_size=81 must lie between 1 and the model's 80"),
        (["tensor_parallel_size=3"], "tensor_parallel_size=3 must divide the model's 8 key"),
        (["--gpus", "12"], "--gpus 12 must be a multiple of the 8"),
        (["cas_schedule=staggered"], "cas_schedule='staggered' cannot be planned"),
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
    assert labels == ["replicated", "was", "cas", "fetch", "hop"]
    assert len(bytes_.barh.call_args_list) == 5
    assert "estimated" in figure.suptitle.call_args.args[0]
    assert figure.savefig.call_args.args == (path,)
