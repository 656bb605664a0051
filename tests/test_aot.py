"""The step as eight real GPUs would run it, compiled here: memory, overlap, copies, link bytes.

At true widths, with ten layers: what a layer does and holds does not depend on how many there are.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout, kv_bytes_per_page, padded_vocab, weight_bytes_per_device

pytest.importorskip("jax_cuda12_plugin", reason="pip install 'sidp-jax[aot]'")
pytestmark = pytest.mark.timeout(900)

POOL, LAYERS, SEQS, PAGE = 8, 10, 64, 64
SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"
# Name: shape, GPU, mode, form of the slab, attention, tokens, pages. The caches take about as much
# memory as in a real run, but for CaS and replicated: XLA counts a donated cache twice, takes the
# program to be too large, and to save a little gathers the same activations twice per layer.
CASES = {
    "was": ("qwen2.5_72b", "h200", "was", "unrolled", "mosaic", 256, 40_000),
    "was 32b": ("qwen3_32b", "h200", "was", "unrolled", "mosaic", 256, 40_000),
    "was 70b": ("llama3.1_70b", "h20", "was", "unrolled", "mosaic", 256, 25_000),
    "was scan": ("qwen2.5_72b", "h200", "was", "scan", "mosaic", 256, 40_000),
    "was b200": ("qwen2.5_72b", "b200", "was", "unrolled", "reference", 256, 50_000),
    "cas": ("qwen2.5_72b", "h200", "cas", "unrolled", "mosaic", 16, 2_000),
    "replicated": ("qwen2.5_72b", "h20", "replicated", "unrolled", "mosaic", 256, 2_000),
}
WAS = [name for name in CASES if name.startswith("was")]
UNROLLED = [name for name in WAS if name != "was scan"]


def config_of(name):
    return replace(ModelConfig.from_pretrained(SHAPES / CASES[name][0]), num_layers=LAYERS)


def layer_bytes(config):
    return 2 * sum(prod(spec.shape) for spec in layer_spec(config).values())


def kv_bytes(name):
    config = config_of(name)
    return CASES[name][-1] * kv_bytes_per_page(
        num_layers=LAYERS,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=PAGE,
        dtype_bytes=2,
    )


@pytest.fixture(scope="module")
def reports():
    cases = [
        (
            shape,
            LAYERS,
            {
                "hardware": hardware,
                "pool_size": POOL,
                "mode": mode,
                "tokens": tokens,
                "num_kv_pages": pages,
                "layer_loop": layer_loop,
                "attention": attention,
                "page_size": PAGE,
                "max_num_seqs": SEQS,
            },
        )
        for shape, hardware, mode, layer_loop, attention, tokens, pages in CASES.values()
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    worker = Path(__file__).with_name("aot_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(cases)],
        env=environment,
        cwd=worker.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_what_the_pool_says(reports, name):
    config = config_of(name)
    resident = LAYERS if name == "replicated" else 0
    weights = weight_bytes_per_device(
        PoolLayout(LAYERS, POOL, resident),
        layer_bytes=layer_bytes(config),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        dtype_bytes=2,
    )
    assert reports[name]["arguments"] == pytest.approx(weights + kv_bytes(name), rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_the_cache_is_updated_in_place(reports, name):
    assert reports[name]["aliased"] == kv_bytes(name)


# Temporaries in layers, activations included, as they are: two layer buffers, packed with gaps, and
# in scan form a copy of the row of the slab. The largest tensor alone is 0.55 of a layer.
# What the programs need today, and a little: a guard against more, not a goal that was reached.
TEMPORARIES = {
    "was": 1.8,
    "was 32b": 2.2,
    "was 70b": 2.3,
    "was scan": 3.8,
    "was b200": 2.35,
    "cas": 0.05,
    "replicated": 0.05,
}


@pytest.mark.parametrize("name", CASES)
def test_layer_buffers(reports, name):
    layers = reports[name]["temporaries"] / layer_bytes(config_of(name))
    assert layers <= TEMPORARIES[name]


@pytest.mark.parametrize("name", UNROLLED)
def test_every_fetch_rides_beneath_the_layer_before(reports, name):
    """The first layer has none before it.

    Behind the last one's fetches come no others, and XLA starts some of them later: beneath the
    last layer itself, and its output projection, 8% of a layer, beneath attention alone.
    """
    fetches = reports[name]["fetches"]
    assert not [nbytes for nbytes in reports[name]["synchronous"] if nbytes > 1 << 20]
    large = [fetch for fetch in fetches if fetch["nbytes"] > 1 << 20]
    assert len(large) == 4 * LAYERS
    for fetch in large:
        if 0 < fetch["layer"] < LAYERS - 1:
            assert fetch["layer"] - 1 in fetch["beneath"], fetch
    last = [fetch for fetch in large if fetch["layer"] == LAYERS - 1]
    uncovered = sum(fetch["nbytes"] for fetch in last if not fetch["beneath"])
    assert uncovered < 0.1 * layer_bytes(config_of(name))


@pytest.mark.parametrize("name", [name for name in CASES if name != "was scan"])
def test_nothing_the_size_of_a_weight_is_copied(reports, name):
    """So no cache either; the logits, which are larger than some weights, are rearranged once."""
    config = config_of(name)
    smallest = 2 * min(
        prod(spec.shape) for key, spec in layer_spec(config).items() if key.endswith("kernel")
    )
    assert not [copy for copy in reports[name]["copies"] if copy[1] >= smallest]


@pytest.mark.parametrize("name", CASES)
def test_bytes_moved_per_step_and_device(reports, name):
    config, tokens = config_of(name), CASES[name][5]
    rows, vocab = min(tokens, SEQS), padded_vocab(config.vocab_size, POOL)
    others = POOL - 1
    # Token ids and embeddings; each row's activations to every shard of the head, logits back.
    expected = others * (4 * tokens + 2 * tokens * config.hidden_size)
    expected += others * (2 * rows * config.hidden_size + 4 * rows * vocab / POOL)
    if CASES[name][2] == "was":
        expected += LAYERS * layer_bytes(config) * others / POOL
    elif CASES[name][2] == "cas":
        heads, kv_heads = config.num_heads, config.num_kv_heads
        values = 2 * config.hidden_size + (2 * heads + 2 * kv_heads) * config.head_dim
        expected += others * (LAYERS * 2 * tokens * values + 4 * tokens)
    assert reports[name]["received"] == pytest.approx(expected, rel=1e-3)


def test_a_gpu_without_kernels_says_so():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_aot import *;"
        "from sidp_jax.aot import compile_forward;"
        "compile_forward(config_of('was'), 'b200', 8, 'was', 16, num_kv_pages=8)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "attention='reference'" in done.stderr


@pytest.fixture(scope="module")
def compiled_plan():
    command = [sys.executable, "-m", "sidp_jax.plan", "--config", "qwen72b.yaml", "--json"]
    command += ["--compile", f"model={SHAPES / 'qwen2.5_72b'}", "hardware=h200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {step["mode"]: step for step in json.loads(done.stdout)["compiled"]}


@pytest.mark.parametrize("mode", ["was", "cas"])
def test_the_plan_knows_the_memory_of_the_compiled_step(compiled_plan, mode):
    step = compiled_plan[mode]
    planned = step["planned"]
    arguments = planned["weights"] + planned["kv_cache"]
    temporaries = planned["layer_buffers"] + planned["activations"]
    assert arguments == pytest.approx(step["arguments"], rel=0.02)
    assert planned["kv_cache"] == step["aliased"]
    found = step["arguments"] + step["temporaries"]
    assert arguments + temporaries == pytest.approx(found, rel=0.02)
    # Of the temporaries it may promise a little too much, never too little.
    assert step["temporaries"] <= temporaries <= 1.15 * step["temporaries"]


def test_the_compiled_plan_shows_a_middle_layer(compiled_plan):
    lines = compiled_plan["was"]["timeline"]
    assert compiled_plan["was"]["layers"] == 16
    assert lines[0].startswith("Layer 8 ")
    kinds = [line.split()[0] for line in lines[1:]]
    assert kinds.count("gemm") == kinds.count("start") == kinds.count("done") == 4
