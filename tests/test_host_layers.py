"""Layers that the host owns: the same bits as with all layers at home, from two buffers."""

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
# Layers and resident ones: the first period has layers or none; one, two and more are fetched.
CASES = [(6, 4), (5, 0), (3, 2), (4, 1), (7, 4), (1, 0)]


def make_runner(layers, resident, **changes):
    """A runner without its engine, not warmed up, and its modes' steps."""
    on_host = resident < layers
    config, mesh = small_config(layers, **changes), make_mesh(1)
    layout = PoolLayout(layers, 1, resident, on_host)
    weights = random_weights(config, layout, mesh, "unrolled")
    shapes = RunnerShapes(BATCHES, SEQS, PAGE_SIZE, PAGES, np.dtype(np.float32))
    steps = tuple(("was" if on_host else "replicated", batch) for batch in BATCHES)
    return Runner(StepProgram(config, layout, mesh, "reference"), weights, shapes, steps)


def packed(batch):
    """Two prompts that fill a batch, of which the first goes on in the next batch's pages."""
    lengths = (batch.tokens // 2 + 1, batch.tokens // 2 - 1)
    chunks, rng = [], np.random.default_rng(batch.tokens)
    for slot, length in enumerate(lengths):
        prompt = rng.integers(0, 90, length).tolist()
        sequence = Sequence(
            slot, str(slot), 0, prompt, SamplingParams(temperature=0, max_tokens=1), 0, 1
        )
        sequence.slot = slot
        sequence.pages.extend(range(3 * slot, 3 * slot + 3))
        chunks.append(Chunk(sequence, 0, length, True))
    return build_batch(StepPlan([chunks]), batch, PAGE_SIZE)


def steps_of(runner, order):
    """Runs batches, by their place in ``BATCHES``; yields the logits and what was fed."""
    programs = [runner._lower_forward(*step).compile() for step in runner.steps]
    sharding = runner.program.per_replica()
    kv = allocate(runner._kv_spec())
    last_tokens = jax.device_put(np.zeros((1, SEQS), np.int32), sharding)
    for place in order:
        buffer = jax.device_put(packed(BATCHES[place]), sharding)
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


def test_periods_of_equal_length_share_a_program():
    runner = make_runner(8, 4)
    lowered = runner._lower_forward(*runner.steps[1])
    # 0 | 1, 2 | 3, 4 | 5, 6 | 7
    assert set(lowered.parts) == {"begin", (False, 1), (True, 1), (True, 0), "end"}
    text = lowered.compile().as_text()
    assert text.count("HloModule jit__") == 5
    assert "HloModule jit__forward_begin" in text  # what begins a step in a trace


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
