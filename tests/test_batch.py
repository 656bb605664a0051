from math import prod

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidp_jax.batch import (
    NO_SLOT,
    BatchLayout,
    StepBatch,
    build_batch,
    token_buckets,
    unpack,
    widen,
)
from sidp_jax.request import SAMPLERS, SamplingParams, Sequence
from sidp_jax.scheduler import Chunk, Scheduler, SchedulerConfig, StepPlan

PAGE_SIZE = 4
FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")


def obvious_batch(chunks: list[Chunk], layout: BatchLayout) -> dict[str, np.ndarray]:
    """The batch of one replica, token by token and field by field."""
    tokens, seqs, stop_ids = layout.tokens, layout.seqs, layout.stop_ids
    batch = {
        "tokens": [0] * tokens,
        "positions": [0] * tokens,
        "token_rows": [seqs] * tokens,
        "kv_slots": [-1] * tokens,
        "query_starts": [0] * (seqs + 1),
        "context_lens": [0] * seqs,
        "block_tables": [[0] * layout.pages for _ in range(seqs)],
        "logit_rows": [0] * seqs,
        "slots": [NO_SLOT] * seqs,
        "samples": [0] * seqs,
        "output_index": [0] * seqs,
        "prompt_lens": [0] * seqs,
        "seeds": [0] * seqs,
        "temperature": [0.0] * seqs,
        "top_k": [0] * seqs,
        "top_p": [1.0] * seqs,
        "min_p": [0.0] * seqs,
        "presence": [0.0] * seqs,
        "frequency": [0.0] * seqs,
        "repetition": [1.0] * seqs,
        "banned_until": [0] * seqs,
        "stop_ids": [[-1] * stop_ids for _ in range(seqs)],
    }
    t = 0
    for row, (sequence, start, length, samples) in enumerate(chunks):
        known = sequence.prompt + sequence.output
        batch["query_starts"][row] = t
        for position in range(start, start + length):
            batch["tokens"][t] = known[position] if position < len(known) else -1
            batch["positions"][t] = position
            batch["token_rows"][t] = row
            page = sequence.pages[position // PAGE_SIZE]
            batch["kv_slots"][t] = page * PAGE_SIZE + position % PAGE_SIZE
            t += 1
        params = sequence.params
        batch["context_lens"][row] = start + length
        batch["logit_rows"][row] = t - 1
        batch["slots"][row] = sequence.slot
        batch["samples"][row] = int(samples)
        batch["output_index"][row] = max(0, start + length - len(sequence.prompt))
        batch["prompt_lens"][row] = len(sequence.prompt)
        batch["seeds"][row] = sequence.seed
        batch["temperature"][row] = params.temperature
        batch["top_k"][row] = 0 if params.top_k == -1 else params.top_k
        batch["top_p"][row] = params.top_p
        batch["min_p"][row] = params.min_p
        batch["presence"][row] = params.presence_penalty
        batch["frequency"][row] = params.frequency_penalty
        batch["repetition"][row] = params.repetition_penalty
        batch["banned_until"][row] = params.min_tokens
        for i, page in enumerate(sequence.pages):
            batch["block_tables"][row][i] = page
        for i, token in enumerate(sequence.stop_ids):
            batch["stop_ids"][row][i] = token
    for row in range(len(chunks), seqs + 1):
        batch["query_starts"][row] = t
    types = dict.fromkeys(FLOATS, np.float32) | {"seeds": np.uint32}
    return {name: np.array(value, types.get(name, np.int32)) for name, value in batch.items()}


def check(plan: StepPlan, layout: BatchLayout) -> None:
    buffers = build_batch(plan, layout, PAGE_SIZE)
    assert (buffers.dtype, buffers.shape) == (np.int32, (len(plan.replicas), layout.size))
    for buffer, chunks in zip(buffers, plan.replicas, strict=True):
        batch, expected = unpack(buffer, layout), obvious_batch(chunks, layout)
        assert set(expected) == set(StepBatch._fields)
        for name, value in expected.items():
            field = getattr(batch, name)
            assert field.dtype == value.dtype, name
            np.testing.assert_array_equal(field, value, err_msg=name)


requests = st.fixed_dictionaries(
    {
        "prompt_len": st.integers(1, 20),
        "seed": st.integers(0, 2**32 - 1),
        "stop_ids": st.lists(st.integers(0, 2**31 - 1), max_size=3),
        "params": st.fixed_dictionaries(
            {
                "temperature": st.floats(0, 2, width=32),
                "top_k": st.integers(-1, 50),
                "top_p": st.floats(0.125, 1, width=32),
                "min_p": st.floats(0, 1, width=32),
                "presence_penalty": st.floats(-2, 2, width=32),
                "frequency_penalty": st.floats(-2, 2, width=32),
                "repetition_penalty": st.floats(0.125, 2, width=32),
                "min_tokens": st.integers(0, 12),
            }
        ),
    }
)


@settings(max_examples=30)
@given(
    pool_size=st.integers(1, 3),
    budget=st.integers(4, 20),
    padding=st.integers(0, 5),
    late=st.integers(0, 2),
    rows=st.lists(requests, min_size=1, max_size=12),
)
def test_against_the_obvious_batch(pool_size, budget, padding, late, rows):
    scheduler = Scheduler(SchedulerConfig(pool_size, 4, budget, 32, PAGE_SIZE, num_kv_pages=14))
    for seq_id, row in enumerate(rows):
        prompt = [100 * seq_id + i for i in range(row["prompt_len"])]
        params = SamplingParams(max_tokens=12, **row["params"])
        stop_ids = tuple(row["stop_ids"])
        scheduler.add(Sequence(seq_id, str(seq_id), 0, prompt, params, row["seed"], 12, stop_ids))
    layout = BatchLayout(budget + padding, 4 + padding, 8 + padding, 3 + padding)
    launched = []
    for step in range(12):
        plan = scheduler.schedule()
        launched.append(plan)
        if plan is not None:
            check(plan, layout)
        done = launched[step - late] if step >= late else None
        for chunk in (chunk for chunks in (done.replicas if done else ()) for chunk in chunks):
            if chunk.samples:
                scheduler.record_token(chunk.sequence, 1000 + step)
                if len(chunk.sequence.output) == 12:
                    scheduler.finish(chunk.sequence, "length")


def running_sequence(**fields) -> Sequence:
    sequence = Sequence(0, "a", 0, [5, 6, 7], SamplingParams(), seed=2**32 - 1, max_tokens=9)
    sequence.replica, sequence.slot = 0, 2
    sequence.pages.extend([3, 1])
    for name, value in fields.items():
        setattr(sequence, name, value)
    return sequence


def test_one_batch_in_full():
    decode = running_sequence(output=[8], num_pending=2)
    prefill = running_sequence(slot=0, stop_ids=(9,), prompt=list(range(40, 48)))
    prefill.pages[:] = type(prefill.pages)("i", [2, 5])
    plan = StepPlan([[Chunk(decode, 4, 1, True), Chunk(prefill, 3, 3, False)], []])
    layout = BatchLayout(tokens=6, seqs=3, pages=2, stop_ids=1)
    busy, idle = (unpack(buffer, layout) for buffer in build_batch(plan, layout, PAGE_SIZE))
    assert busy.tokens.tolist() == [-1, 43, 44, 45, 0, 0]
    assert busy.positions.tolist() == [4, 3, 4, 5, 0, 0]
    assert busy.token_rows.tolist() == [0, 1, 1, 1, 3, 3]
    assert busy.kv_slots.tolist() == [4, 11, 20, 21, -1, -1]
    assert busy.query_starts.tolist() == [0, 1, 4, 4]
    assert busy.context_lens.tolist() == [5, 6, 0]
    assert busy.block_tables.tolist() == [[3, 1], [2, 5], [0, 0]]
    assert busy.logit_rows.tolist() == [0, 3, 0]
    assert busy.slots.tolist() == [2, 0, NO_SLOT]
    assert busy.samples.tolist() == [1, 0, 0]
    assert busy.output_index.tolist() == [2, 0, 0]
    assert busy.stop_ids.tolist() == [[-1], [9], [-1]]
    assert busy.seeds.tolist() == [2**32 - 1, 2**32 - 1, 0]
    np.testing.assert_array_equal(build_batch(plan, layout, PAGE_SIZE)[1], layout.empty(1)[0])
    assert idle.query_starts.tolist() == [0, 0, 0, 0]


def test_the_fields_fill_the_buffer_without_overlap():
    layout = BatchLayout(tokens=5, seqs=3, pages=4, stop_ids=2)
    assert tuple(layout.fields) == StepBatch._fields
    end = 0
    for field in layout.fields.values():
        assert field.offset == end
        assert field.offset * field.dtype.itemsize % 256 == 0, "what a kernel's argument needs"
        assert field.dtype.itemsize == 4
        assert prod(field.shape) <= field.room < prod(field.shape) + 64
        end += field.room
    assert layout.size == end
    assert layout.fields["query_starts"].shape == (4,)
    assert layout.fields["block_tables"].shape == (3, 4)
    assert layout.fields["stop_ids"].shape == (3, 2)
    assert {name for name, f in layout.fields.items() if f.dtype == np.float32} == set(FLOATS)


def test_layouts_are_values():
    layout = BatchLayout(5, 3, 4, 2)
    assert layout.size > 0  # what is derived is no part of the value
    assert layout == BatchLayout(5, 3, 4, 2)
    assert hash(layout) == hash(BatchLayout(5, 3, 4, 2))
    with pytest.raises(ValueError, match="must be at least 1"):
        BatchLayout(5, 0, 4, 2)


def test_the_device_reads_the_same_batch():
    plan = StepPlan([[Chunk(running_sequence(), 0, 3, True)]])
    layout = BatchLayout(tokens=4, seqs=2, pages=3, stop_ids=0)
    (buffer,) = build_batch(plan, layout, PAGE_SIZE)
    read = jax.jit(lambda buffer: unpack(buffer, layout, jax.lax.bitcast_convert_type))
    for name, on_device, on_host in zip(
        StepBatch._fields, read(buffer), unpack(buffer, layout), strict=True
    ):
        assert on_device.dtype == on_host.dtype, name
        np.testing.assert_array_equal(on_device, on_host, err_msg=name)


def test_what_does_not_fit_is_refused():
    plan = StepPlan([[Chunk(running_sequence(stop_ids=(1, 2)), 0, 3, True)]])
    with pytest.raises(ValueError, match="3 tokens of 1 sequences, more than"):
        build_batch(plan, BatchLayout(2, 1, 2, 2), PAGE_SIZE)
    with pytest.raises(ValueError, match="2 ids end the sequence, more than 1"):
        build_batch(plan, BatchLayout(3, 1, 2, 1), PAGE_SIZE)


@pytest.mark.parametrize(
    ("most", "seqs", "buckets"),
    [
        (1, 1, (1,)),
        (16, 16, (16,)),
        (17, 2, (16, 17)),
        (64, 64, (16, 64)),
        (100, 64, (16, 64, 100)),
        (512, 128, (16, 64, 128, 192, 256, 384, 512)),
        (512, 256, (16, 64, 128, 160, 192, 224, 256, 384, 512)),
    ],
)
def test_token_buckets(most, seqs, buckets):
    assert token_buckets(most, seqs) == buckets


def test_a_run_has_at_most_20_programs():
    assert len(token_buckets(8192, 256)) + len(SAMPLERS) <= 20
    assert len(token_buckets(2048, 512)) + len(SAMPLERS) <= 20


def test_widen_adds_room_for_tokens_and_nothing_else():
    narrow, wide = BatchLayout(4, 3, 2, 1), BatchLayout(9, 3, 2, 1)
    rng = np.random.default_rng(0)
    buffer = rng.integers(1, 99, narrow.size).astype(np.int32)
    pad = lambda part, count, value: np.pad(part, (0, count), constant_values=value)  # noqa: E731
    before, after = unpack(buffer, narrow), unpack(widen(buffer, narrow, wide, pad), wide)
    empty = unpack(wide.empty(1)[0], wide)
    for name, part in before._asdict().items():
        got = getattr(after, name)
        np.testing.assert_array_equal(got[: len(part)], part)
        np.testing.assert_array_equal(got[len(part) :], getattr(empty, name)[len(part) :])
