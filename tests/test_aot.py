"""The step as eight real GPUs would run it, compiled here: memory, overlap, copies, link bytes.

At true widths, with ten layers: what a layer does and holds does not depend on how many there are.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import pytest

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import ATTENTION, FEED_FORWARD, layer_spec
from sidp_jax.pool import PoolLayout, kv_bytes_per_page, padded_vocab, weight_bytes_per_device

pytest.importorskip("jax_cuda12_plugin", reason="pip install 'sidp-jax[aot]'")
pytestmark = pytest.mark.timeout(900)

LAYERS, SEQS, PAGE = 10, 64, 64
WORKSPACE = 4 << 20  # of a product of cuBLAS
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
SHAPES = Path(__file__).parents[1] / "experiments" / "shapes"


@dataclass(frozen=True)
class Case:
    """A step to compile. With the weights its pages take as much memory as a run gives them."""

    shape: str
    hardware: str
    mode: str
    pages: int
    tokens: int = 256
    layers: int = LAYERS
    layer_loop: str = "unrolled"
    attention: str = "mosaic"
    pool: int = 8
    tensor: int = 1
    fetch: str = "collective"

    @property
    def config(self):
        return replace(ModelConfig.from_pretrained(SHAPES / self.shape), num_layers=self.layers)

    @property
    def arguments(self):
        """Of ``compile_forward``."""
        return {
            "hardware": self.hardware,
            "pool_size": self.pool,
            "tensor_size": self.tensor,
            "mode": self.mode,
            "was_fetch": self.fetch,
            "tokens": self.tokens,
            "num_kv_pages": self.pages,
            "layer_loop": self.layer_loop,
            "attention": self.attention,
            "page_size": PAGE,
            "max_num_seqs": SEQS,
        }


CASES = {
    "was": Case("qwen2.5_72b", "h200", "was", 50_000),
    "was 32b": Case("qwen3_32b", "h200", "was", 50_000),
    "was 70b": Case("llama3.1_70b", "h20", "was", 33_000),
    "was b200": Case("qwen2.5_72b", "b200", "was", 60_000, attention="reference"),
    "was tensor": Case("qwen2.5_72b", "h200", "was", 100_000, pool=4, tensor=2),
    "was copies": Case("qwen2.5_72b", "h200", "was", 50_000, pool=2, fetch="copies"),
    "was copies 32b": Case(
        "qwen3_32b", "h20", "was", 33_000, tokens=2048, pool=2, tensor=2, fetch="copies"
    ),
    # Below four rows of the slab there is nothing to scan over.
    "was scan": Case("qwen2.5_72b", "h200", "was", 15_000, layers=32, layer_loop="scan"),
    "cas": Case("qwen2.5_72b", "h200", "cas", 50_000, tokens=16),
    "cas 32b": Case("qwen3_32b", "h20", "cas", 33_000, tokens=16),
    "cas b200": Case("llama3.1_70b", "b200", "cas", 60_000, tokens=16, attention="reference"),
    "cas staggered": Case("qwen2.5_72b", "h200", "cas_staggered", 50_000),
    "cas staggered 32b": Case("qwen3_32b", "h200", "cas_staggered", 50_000, tokens=16),
    "cas staggered 70b": Case("llama3.1_70b", "h20", "cas_staggered", 33_000, tokens=1024),
    "replicated": Case("qwen2.5_72b", "h20", "replicated", 25_000),
    "replicated 70b": Case("llama3.1_70b", "h200", "replicated", 40_000),
    "replicated b200": Case("qwen3_32b", "b200", "replicated", 60_000, attention="reference"),
}
WAS = [name for name, case in CASES.items() if case.mode == "was" and case.fetch == "collective"]


def kernel_bytes(case):
    """Bytes of the four kernels of a layer on one device, in the order of their use."""
    spec = layer_spec(case.config)
    return [2 * prod(spec[name].shape) // case.tensor for name in (*ATTENTION, *FEED_FORWARD)]


def layer_bytes(case):
    """Bytes of a layer on one device."""
    spec = layer_spec(case.config).items()
    vectors = sum(prod(spec.shape) for name, spec in spec if not name.endswith("kernel"))
    return sum(kernel_bytes(case)) + 2 * vectors


def kv_bytes(case):
    return (
        case.pages
        * kv_bytes_per_page(
            num_layers=case.layers,
            num_kv_heads=case.config.num_kv_heads,
            head_dim=case.config.head_dim,
            page_size=PAGE,
            dtype_bytes=2,
        )
        // case.tensor
    )


@pytest.fixture(scope="module")
def reports():
    cases = [(case.shape, case.layers, case.arguments) for case in CASES.values()]
    worker = Path(__file__).with_name("aot_worker.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(cases)],
        env=ENVIRONMENT,
        cwd=worker.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_arguments_are_what_the_pool_says(reports, name):
    case = CASES[name]
    resident = case.layers if case.mode == "replicated" else 0
    weights = weight_bytes_per_device(
        PoolLayout(case.layers, case.pool, resident),
        layer_bytes=layer_bytes(case),
        hidden_size=case.config.hidden_size,
        vocab_size=case.config.vocab_size // case.tensor,
        tied=case.config.tie_word_embeddings,
        dtype_bytes=2,
    )
    rows = 3 * (case.pool - 1) * layer_bytes(case) if case.fetch == "copies" else 0
    assert reports[name]["arguments"] == pytest.approx(weights + rows + kv_bytes(case), rel=0.02)


@pytest.mark.parametrize("name", CASES)
def test_the_cache_is_updated_in_place(reports, name):
    assert reports[name]["aliased"] == kv_bytes(CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_temporaries(reports, name):
    """WaS: a layer and a down projection. In scan form also copies of what is being sent.

    Those are two kernels, up and down, as collectives read no slice of the slab in place. By copies
    the buffers are the programs' arguments.
    """
    case = CASES[name]
    config, layer = case.config, layer_bytes(case)
    tokens = case.tokens * {"cas": case.pool, "cas_staggered": 2}.get(case.mode, 1)
    activations = 2 * tokens * (8 * config.hidden_size + 3 * config.intermediate_size)
    activations += WORKSPACE
    limit = 0.0
    if name in WAS:
        limit = 2.2 if case.layer_loop == "scan" else 1.3
    temporaries = reports[name]["temporaries"]
    assert temporaries <= limit * layer + activations, (
        f"{temporaries / layer:.3f} layers, of which {activations / layer:.3f} may be activations; "
        f"limit {limit}"
    )


@pytest.mark.parametrize("name", WAS)
def test_every_fetch_rides_beneath_the_layer_before(reports, name):
    """It starts before and ends after GEMMs of that layer; the first layer has none before it."""
    fetches = reports[name]["fetches"]
    assert reports[name]["synchronous"] == [], "broadcasts that nothing overlaps"
    sizes = [fetch["nbytes"] for fetch in fetches]
    assert sum(sizes) % sum(kernel_bytes(CASES[name])) == 0
    exposed = [
        fetch
        for fetch in fetches
        if fetch["layer"] > 0 and fetch["layer"] - 1 not in fetch["beneath"]
    ]
    assert exposed == [], "fetches without a GEMM of the layer before between start and end"


@pytest.mark.parametrize("name", WAS)
def test_fetches_start_in_the_order_of_their_use(reports, name):
    """On the link they run one after another, in this order: none waits behind a later one."""
    sizes = [fetch["nbytes"] for fetch in reports[name]["fetches"] if fetch["layer"] > 0]
    assert sizes == kernel_bytes(CASES[name]) * (len(sizes) // 4)


@pytest.mark.parametrize("name", ["was", "was 32b", "was 70b", "was tensor"])
def test_the_slower_of_link_and_compute_sets_the_pace(reports, name):
    """In an idealised replay of the schedule, see ``aot_worker.replay``; no measurement.

    One buffer for gate and up costs up to a tenth where a layer's GEMMs and its fetch take equal
    time: neither can run while the other has that buffer.
    """
    share = kernel_bytes(CASES[name])[2] / sum(kernel_bytes(CASES[name]))
    for compute, attention, found in reports[name]["replays"]:
        ideal = max(1.0, compute + attention)
        assert found <= 1.01 * max(ideal, share * (1 + compute)), (compute, attention, found)
        assert found <= 1.12 * ideal, (compute, attention, found)


@pytest.mark.parametrize("name", CASES)
def test_nothing_the_size_of_a_weight_is_copied(reports, name):
    """So no cache either. In scan form each kernel is, once, when it is sent."""
    case = CASES[name]
    copies = [nbytes for _, nbytes in reports[name]["copies"] if nbytes >= min(kernel_bytes(case))]
    expected = []
    if case.layer_loop == "scan":
        expected = [fetch["nbytes"] for fetch in reports[name]["fetches"]]
    assert sorted(copies) == sorted(expected), reports[name]["copies"]


@pytest.mark.parametrize("name", CASES)
def test_bytes_moved_per_step_and_device(reports, name):
    case = CASES[name]
    config, tokens, others = case.config, case.tokens, case.pool - 1
    moved = reports[name]["received"]
    if name in WAS:
        fetched = case.layers * sum(kernel_bytes(case)) * others / case.pool
        assert moved["broadcast"] == fetched
    if case.tensor > 1:
        return  # the sums over a replica's devices come on top
    # Token ids and embeddings; each row's activations to every shard of the head, logits back.
    rows, vocab = min(tokens, SEQS), padded_vocab(config.vocab_size, case.pool)
    expected = others * (4 * tokens + 2 * tokens * config.hidden_size)
    expected += others * (2 * rows * config.hidden_size + 4 * rows * vocab / case.pool)
    if name in WAS:
        expected += case.layers * layer_bytes(case) * others / case.pool
    elif case.mode == "cas":
        heads, kv_heads = config.num_heads, config.num_kv_heads
        values = 2 * config.hidden_size + (2 * heads + 2 * kv_heads) * config.head_dim
        expected += others * (case.layers * 2 * tokens * values + 4 * tokens)
    elif case.mode == "cas_staggered":
        # In every stage queries, keys, values and results go from owner o to replica s - o and
        # back, and everyone's activations go on, up to the last; all enter and leave once.
        heads, kv_heads, stages = config.num_heads, config.num_kv_heads, case.layers + others
        owners = range(case.pool)
        stay = sum((2 * o - s) % case.pool == 0 for s in range(stages) for o in owners)
        exchanges, hops = stages - stay / case.pool, stages - 1 + 2 * others / case.pool
        values = exchanges * (2 * heads + 2 * kv_heads) * config.head_dim
        expected += 2 * tokens * (values + hops * config.hidden_size) + others * 4 * tokens
    assert sum(moved.values()) == pytest.approx(expected, rel=1e-3)


def test_a_gpu_without_kernels_says_so():
    code = (
        "import sys; sys.path.insert(0, 'tests'); from test_aot import *;"
        "from sidp_jax.aot import compile_forward;"
        "compile_forward(CASES['was'].config, 'b200', 8, 'was', 16, num_kv_pages=8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "attention='reference'" in done.stderr


def compile_plan(*overrides):
    """The compiled steps of a plan, by mode."""
    command = [sys.executable, "-m", "sidp_jax.plan", "--config", "qwen72b.yaml", "--json"]
    command += ["--compile", f"model={SHAPES / 'qwen2.5_72b'}", "hardware=h200", *overrides]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {step["mode"]: step for step in json.loads(done.stdout)["compiled"]}


@pytest.fixture(scope="module")
def compiled_plan():
    return compile_plan()


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
    # Of the temporaries it may promise a little too much, never too little; logits and their parts
    # are in the plan, and results of the program.
    logits = 2 * 4 * 256 * ModelConfig.from_pretrained(SHAPES / "qwen2.5_72b").vocab_size
    assert step["temporaries"] <= temporaries <= 1.15 * step["temporaries"] + logits


def test_the_compiled_plan_shows_a_middle_layer(compiled_plan):
    lines = compiled_plan["was"]["timeline"]
    assert compiled_plan["was"]["layers"] == 16
    assert lines[0].startswith("Layer 8 ")
    kinds = [line.split()[0] for line in lines[1:]]
    assert kinds.count("gemm") == kinds.count("start") == kinds.count("done") == 4


def test_the_compiled_plan_of_a_pool_of_two_holds_its_rows_as_arguments():
    step = compile_plan("pool_size=2", "mode=was")["was"]
    planned = step["planned"]
    held = planned["weights"] + planned["layer_buffers"] + planned["kv_cache"]
    assert step["copies"]
    assert held == pytest.approx(step["arguments"], rel=1e-3)
    assert step["temporaries"] <= planned["activations"] <= 1.15 * step["temporaries"]
    kinds = [line.split()[0] for line in step["timeline"][1:]]
    assert kinds.count("gemm") == 4
    assert "start" not in kinds
