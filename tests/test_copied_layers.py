"""WaS by copies, from the host or from owners: the bits of all layers at home, few buffers."""

import weakref

import jax
import numpy as np
import pytest
from helpers import random_weights, small_config

from sidp_jax.batch import BatchLayout, build_batch
from sidp_jax.kv_cache import allocate
from sidp_jax.mesh import make_mesh
from sidp_jax.pool import PoolLayout
from sidp_jax.request import SamplingParams, Sequence
from sidp_jax.runner import Runner, RunnerShapes, num_pages_that_fit
from sidp_jax.scheduler import Chunk, StepPlan
from sidp_jax.step import StepProgram
from sidp_jax.weights import HOST_MEMORY, nbytes_per_device

PAGE_SIZE, PAGES, SEQS = 4, 6, 2
BATCHES = tuple(BatchLayout(tokens, SEQS, 4, 3) for tokens in (4, 16))
# Layers and resident ones; one, two and more are fetched.
CASES = [(6, 4), (5, 0), (3, 2), (4, 1), (7, 4), (1, 0)]
# Pool, devices of a replica, layers and resident ones: rows that are whole, short, and only one.
POOLS = [(2, 1, 6, 0), (2, 1, 7, 2), (4, 1, 9, 0), (3, 1, 8, 3), (2, 2, 5, 1), (3, 1, 3, 0)]


def make_runner(layers, resident, *, pool=1, tensor=1, **changes):
    """A runner without its engine, not warmed up, and its modes' steps.

    With fewer resident layers than all, those of a pool of one are the host's.
    """
    fetched = resident < layers
    config, mesh = small_config(layers, **changes), make_mesh(pool, tensor)
    layout = PoolLayout(layers, pool, resident, on_host=fetched and pool == 1)
    weights = random_weights(config, layout, mesh, "unrolled")
    shapes = RunnerShapes(BATCHES, SEQS, PAGE_SIZE, PAGES, np.dtype(np.float32))
    steps = tuple(("was" if fetched else "replicated", batch) for batch in BATCHES)
    program = StepProgram(config, layout, mesh, "reference", was_fetch="copies")
    return Runner(program, weights, shapes, steps)


def packed(batch, pool):
    """For each replica two prompts that fill a batch, in the pages of the other batches."""
    lengths = (batch.tokens // 2 + 1, batch.tokens // 2 - 1)
    replicas, rng = [], np.random.default_rng(batch.tokens)
    for _ in range(pool):
        chunks = []
        for slot, length in enumerate(lengths):
            prompt = rng.integers(0, 90, length).tolist()
            sequence = Sequence(
                slot, str(slot), 0, prompt, SamplingParams(temperature=0, max_tokens=1), 0, 1
            )
            sequence.slot = slot
            sequence.pages.extend(range(3 * slot, 3 * slot + 3))
            chunks.append(Chunk(sequence, 0, length, True))
        replicas.append(chunks)
    return build_batch(StepPlan(replicas), batch, PAGE_SIZE)


def steps_of(runner, order):
    """Runs batches, by their place in ``BATCHES``; yields the logits and what was fed."""
    programs = [runner._lower_forward(*step).compile() for step in runner.steps]
    sharding = runner.program.per_replica()
    kv, pool = allocate(runner._kv_spec()), runner.program.layout.pool_size
    last_tokens = jax.device_put(np.zeros((pool, SEQS), np.int32), sharding)
    for place in order:
        buffer = jax.device_put(packed(BATCHES[place], pool), sharding)
        kv, logits, fed = programs[place](runner.weights, kv, last_tokens, buffer)
        yield np.asarray(logits), np.asarray(fed), np.asarray(kv.k), np.asarray(kv.v)


@pytest.mark.parametrize(("layers", "resident"), CASES)
def test_bit_identical_to_replicated(layers, resident):
    """Over several steps of changing shape: each begins with what the one before sent for."""
    order = (1, 1, 0, 1)
    ours = list(steps_of(make_runner(layers, resident), order))
    theirs = list(steps_of(make_runner(layers, layers), order))
    assert not np.array_equal(ours[1][0], ours[2][0])
    for got, expected in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(("pool", "tensor", "layers", "resident"), POOLS)
def test_a_pool_is_bit_identical_to_replicated(pool, tensor, layers, resident):
    order, mesh = (1, 0, 1), {"pool": pool, "tensor": tensor}
    ours = list(steps_of(make_runner(layers, resident, **mesh), order))
    theirs = list(steps_of(make_runner(layers, layers, **mesh), order))
    assert len({logits.tobytes() for logits in ours[0][0]}) == pool
    for got, expected in zip(ours, theirs, strict=True):
        jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_pool_copies_each_layer_to_the_others_once_a_step_and_holds_three_rows(monkeypatch):
    pool, layers, copied, alive, most = 3, 9, [], [], 0
    put, assemble = jax.device_put, jax.make_array_from_single_device_arrays

    def living():
        return sum(array() is not None for array in alive)

    def watched_put(arrays, device):
        if isinstance(arrays, list):
            assert {array.device for array in arrays}.isdisjoint({device})
            copied.append(device)
        return put(arrays, device)

    def watched_assemble(*arguments):
        nonlocal most
        array = assemble(*arguments)
        alive.append(weakref.ref(array))
        most = max(most, living())
        return array

    monkeypatch.setattr(jax, "device_put", watched_put)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", watched_assemble)
    runner = make_runner(layers, 0, pool=pool)
    sent = [len(copied) for _ in steps_of(runner, (1, 0, 1))]
    assert sent == [(pool - 1) * (pool + layers * step) for step in (1, 2, 3)]
    a_row = pool * len(runner.weights.pooled[0])
    assert living() == a_row  # the next step's first
    assert most <= 3 * a_row
    held = runner._lower_forward(*runner.steps[0]).memory.argument_size_in_bytes
    layer = sum(leaf.nbytes for leaf in runner.weights.pooled[0].values()) // pool
    rest = nbytes_per_device([runner.weights, runner._kv_spec()]) + 4 * (SEQS + BATCHES[0].size)
    assert held == rest + 3 * (pool - 1) * layer


def test_a_tied_model_of_another_family():
    changes = {"architecture": "Qwen2ForCausalLM", "tie_word_embeddings": True}
    (ours,) = steps_of(make_runner(5, 3, **changes), [1])
    (theirs,) = steps_of(make_runner(5, 5, **changes), [1])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class Copies:
    """Stands for ``jax.device_put``: remembers each copied layer for as long as it lives."""

    def __init__(self):
        self.made, self.at_most, self._put = [], 0, jax.device_put

    def __call__(self, kernels, shardings):
        copied = self._put(kernels, shardings)
        if isinstance(kernels, dict):
            assert {leaf.sharding.memory_kind for leaf in kernels.values()} == {HOST_MEMORY}
            assert HOST_MEMORY not in {leaf.sharding.memory_kind for leaf in copied.values()}
            self.made.append(weakref.ref(copied["down.kernel"]))
            self.at_most = max(self.at_most, self.alive)
        return copied

    @property
    def alive(self):
        return sum(copied() is not None for copied in self.made)


@pytest.mark.parametrize(
    ("layers", "resident", "first", "later"), [(6, 2, 5, 4), (4, 0, 5, 4), (3, 2, 1, 0)]
)
def test_two_buffers_and_one_copy_of_each_layer_a_step(monkeypatch, layers, resident, first, later):
    copies = Copies()
    monkeypatch.setattr(jax, "device_put", copies)
    counts = []
    for _ in steps_of(make_runner(layers, resident), (1, 0, 1)):
        counts.append(len(copies.made))
        assert copies.alive == 1  # the next step's first
    assert counts == [first, first + later, first + 2 * later]
    assert copies.at_most == min(2, layers - resident)


@pytest.mark.parametrize(
    ("pool", "layers", "resident", "periods"),
    [
        (1, 8, 4, {((True, 1),)}),  # 0*, 1 | 2*, 3 | 4*, 5 | 6*, 7
        (1, 7, 4, {((True, 1),), ((True, 2),)}),  # 0*, 1 | 2*, 3 | 4*, 5, 6
        (2, 6, 2, {((False, 1),), ((True, 0), (True, 1)), ((True, 0), (True, 0))}),
    ],
)
def test_periods_of_equal_length_share_a_program(pool, layers, resident, periods):
    runner = make_runner(layers, resident, pool=pool)
    lowered = runner._lower_forward(*runner.steps[1])
    assert set(lowered.parts) == {"begin", *periods, "end"}
    compiled = lowered.compile()
    text = compiled.as_text()
    assert text.count("HloModule jit__") == len(periods) + 2
    assert "HloModule jit__forward_begin" in text  # what begins a step in a trace
    longest = max(periods, key=lambda spans: sum(fetched + more for fetched, more in spans))
    assert compiled.longest_period is compiled.parts[longest]


def test_memory_counts_two_fetched_layers_and_the_largest_program():
    runner = make_runner(6, 3)
    lowered = runner._lower_forward(*runner.steps[1])
    parts = [each.compile() for each in lowered.parts.values()]
    held = lowered.compile().memory_analysis()
    kv = nbytes_per_device(runner._kv_spec())
    kernels = sum(
        leaf.nbytes
        for leaf in runner.weights.pooled[0].values()
        if leaf.sharding.memory_kind == HOST_MEMORY
    )
    small = 4 * (SEQS + BATCHES[1].size)
    expected = nbytes_per_device(runner.weights) + 2 * kernels + kv + small
    assert held.argument_size_in_bytes == expected
    assert held.alias_size_in_bytes == kv
    logits = 4 * SEQS * 90
    assert held.output_size_in_bytes == pytest.approx(kv + logits + 4 * BATCHES[1].size, abs=64)
    largest = max(part.memory_analysis().temp_size_in_bytes for part in parts)
    assert held.temp_size_in_bytes == largest + 4 * 16 * 32


def test_more_pages_fit_than_beside_all_layers():
    home, fetched = (
        num_pages_that_fit(runner.program, runner.weights, runner.shapes, runner.steps, 1 << 20)
        for runner in (make_runner(8, 8), make_runner(8, 4))
    )
    assert fetched > home
