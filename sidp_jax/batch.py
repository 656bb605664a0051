"""What the host hands the devices for one step: every field of a batch in one buffer (no jax)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt32

from sidp_jax.request import Sequence
from sidp_jax.scheduler import Chunk, StepPlan

NO_SLOT = 2**31 - 1  # slot of an empty row: out of range for any number of slots
# Fields start at multiples of so many int32, 256 bytes: kernels read them in place, and a kernel's
# arguments have to be aligned so.
_ALIGNMENT = 64


class StepBatch(NamedTuple):
    """One replica's batch; a row is one sequence, and its tokens are neighbours.

    The annotations are also the layout of the buffer: names, types, shapes and order.
    """

    # Per token
    tokens: Int32[Any, "tokens"]  # -1: the last one sampled for its row's slot; padding 0
    positions: Int32[Any, "tokens"]  # padding 0
    token_rows: Int32[Any, "tokens"]  # padding: the number of rows
    kv_slots: Int32[Any, "tokens"]  # page * page_size + offset; padding -1
    # Per sequence, different in every step
    query_starts: Int32[Any, "seqs+1"]  # row r has tokens query_starts[r]..query_starts[r+1]-1
    context_lens: Int32[Any, "seqs"]  # tokens in the KV cache after this step; 0: empty row
    block_tables: Int32[Any, "seqs pages"]  # padding 0
    logit_rows: Int32[Any, "seqs"]  # the row's last token; padding 0
    slots: Int32[Any, "seqs"]  # padding NO_SLOT
    samples: Int32[Any, "seqs"]  # 1 if the token sampled for the row counts
    output_index: Int32[Any, "seqs"]  # index of the token to be sampled, counted from 0
    # Per sequence, the same in every step
    prompt_lens: Int32[Any, "seqs"]
    seeds: UInt32[Any, "seqs"]
    temperature: Float32[Any, "seqs"]  # 0: greedy
    top_k: Int32[Any, "seqs"]  # 0: all
    top_p: Float32[Any, "seqs"]
    min_p: Float32[Any, "seqs"]
    presence: Float32[Any, "seqs"]
    frequency: Float32[Any, "seqs"]
    repetition: Float32[Any, "seqs"]
    banned_until: Int32[Any, "seqs"]  # stop_ids are masked while output_index is below this
    stop_ids: Int32[Any, "seqs stop_ids"]  # padding -1


# What empty entries hold, where that is not 0; token_rows is padded with the number of rows.
_PADDING = {"kv_slots": -1, "slots": NO_SLOT, "top_p": 1, "repetition": 1, "stop_ids": -1}
_CONSTANTS = StepBatch._fields[StepBatch._fields.index("prompt_lens") :]


class Field(NamedTuple):
    """Where a field of the batch lies in the buffer; it may be smaller than its room there."""

    offset: int
    room: int
    shape: tuple[int, ...]
    dtype: np.dtype


@dataclass(frozen=True)
class BatchLayout:
    """The static shapes of a batch, and where its fields lie in one int32 buffer per replica.

    Attributes:
        tokens: most tokens (T).
        seqs: most sequences (S).
        pages: most pages of a sequence (P).
        stop_ids: most token ids that end a sequence (K).
    """

    tokens: int
    seqs: int
    pages: int
    stop_ids: int

    def __post_init__(self):
        if min(self.tokens, self.seqs, self.pages) < 1 or self.stop_ids < 0:
            raise ValueError(f"{self}: tokens, seqs and pages must be at least 1, stop_ids 0")

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Offset, shape and dtype of every field, by name."""
        sizes = {**vars(self), "seqs+1": self.seqs + 1}
        fields, offset = {}, 0
        for name, spec in StepBatch.__annotations__.items():
            shape = tuple(sizes[dim] for dim in spec.dim_str.split())
            room = ceil(prod(shape) / _ALIGNMENT) * _ALIGNMENT
            fields[name] = Field(offset, room, shape, np.dtype(spec.dtypes[0]))
            offset += room
        return fields

    @cached_property
    def size(self) -> int:
        """Length of the buffer, in int32."""
        return sum(field.room for field in self.fields.values())

    @cached_property
    def constants(self) -> np.dtype:
        """One row of the fields that are the same in every step, as a record."""
        fields = ((name, self.fields[name]) for name in _CONSTANTS)
        return np.dtype([(name, field.dtype, field.shape[1:]) for name, field in fields])

    @cached_property
    def _padding(self) -> Int32[np.ndarray, " size"]:
        buffer = np.zeros(self.size, np.int32)
        batch = unpack(buffer, self)
        for name, value in _PADDING.items():
            getattr(batch, name)[:] = value
        batch.token_rows[:] = self.seqs
        return buffer

    def empty(self, num_replicas: int) -> Int32[np.ndarray, "replicas size"]:
        """The buffers of a step in which no replica has anything to do."""
        return np.tile(self._padding, (num_replicas, 1))


def token_buckets(max_num_batched_tokens: int, max_num_seqs: int = 1) -> tuple[int, ...]:
    """The numbers of tokens that steps are padded to.

    Up to some 128 tokens a GPU's matrix products take as long as their weights take to read, so
    padding costs next to nothing; beyond it costs in proportion. Steps of decode alone, of up to
    ``max_num_seqs`` tokens, come in any size: four sizes to an octave there. Longer ones are filled
    with prefill up to a size: two, and one from 4096 on.
    """
    octaves = [2**i for i in range(7, max_num_batched_tokens.bit_length())]
    sizes = {16, 64, *octaves, *(n * 3 // 2 for n in octaves if n < 4096)}
    sizes |= {n * k // 4 for n in octaves for k in (5, 7) if n * k // 4 < max_num_seqs}
    most = max_num_batched_tokens
    return *sorted(n for n in sizes if n < most), most


def unpack(
    buffer: Int32[Any, "*replicas size"],
    layout: BatchLayout,
    bitcast: Callable[[Any, np.dtype], Any] = np.ndarray.view,
) -> StepBatch:
    """The fields of a buffer, of one replica or of all; of a numpy buffer they are views.

    Args:
        buffer: a numpy or a jax array.
        layout: the layout it was built with.
        bitcast: reads the bits of an int32 array as another type; `jax.lax.bitcast_convert_type`
            for a jax array.
    """

    def read(field: Field) -> Any:
        part = buffer[..., field.offset : field.offset + prod(field.shape)]
        part = part.reshape(*buffer.shape[:-1], *field.shape)
        return part if field.dtype == np.int32 else bitcast(part, field.dtype)

    return StepBatch(*(read(field) for field in layout.fields.values()))


def widen(
    buffer: Int32[Any, " size"],
    layout: BatchLayout,
    widest: BatchLayout,
    pad: Callable[[Any, int, int], Any],
    concatenate: Callable[[list[Any]], Any] = np.concatenate,
) -> Int32[Any, " widest_size"]:
    """The same batch in a layout with room for more tokens.

    Args:
        buffer: one replica's part, a numpy or a jax array.
        layout: the layout it was built with.
        widest: one that differs in ``tokens`` alone.
        pad: ``pad(part, count, value)`` appends ``value`` ``count`` times.
        concatenate: joins the parts again.
    """
    padding = {**_PADDING, "token_rows": layout.seqs}
    parts = []
    for name, field in layout.fields.items():
        size = prod(field.shape)
        part = buffer[field.offset : field.offset + size]
        more = widest.fields[name].room - size
        parts.append(pad(part, more, padding.get(name, 0)) if more else part)
    return concatenate(parts)


def build_batch(
    plan: StepPlan, layout: BatchLayout, page_size: int
) -> Int32[np.ndarray, "replicas size"]:
    """The buffers of one step, one row per replica; chunk i of a replica is its sequence row i.

    Raises:
        ValueError: the plan does not fit the layout.
    """
    if plan.max_tokens > layout.tokens or plan.max_seqs > layout.seqs:
        raise ValueError(
            f"a replica has {plan.max_tokens} tokens of {plan.max_seqs} sequences, "
            f"more than {layout}: take a larger layout"
        )
    buffers = layout.empty(len(plan.replicas))
    batch = unpack(buffers, layout)
    # From here on everything is flat over the replicas; two masks put it into its places.
    chunks = [chunk for chunks in plan.replicas for chunk in chunks]
    sequences, starts, lengths, samples = zip(*chunks, strict=True)
    lengths = np.array(lengths)
    stops = np.array(starts) + lengths
    rows = np.arange(layout.seqs) < np.array([[len(chunks)] for chunks in plan.replicas])

    _fill_constants(batch, rows, layout.constants, sequences)
    block_tables = _block_tables(sequences)
    batch.block_tables[rows, : block_tables.shape[1]] = block_tables
    batch.query_starts[:, 1:][rows] = lengths
    np.cumsum(batch.query_starts, axis=1, out=batch.query_starts)
    batch.context_lens[rows] = stops
    batch.logit_rows[rows] = batch.query_starts[:, 1:][rows] - 1
    batch.slots[rows] = [sequence.slot for sequence in sequences]
    batch.samples[rows] = samples
    batch.output_index[rows] = np.maximum(stops - batch.prompt_lens[rows], 0)

    tokens = np.arange(layout.tokens) < batch.query_starts[:, -1:]
    positions = np.arange(lengths.sum()) + np.repeat(stops - np.cumsum(lengths), lengths)
    pages = block_tables[np.repeat(np.arange(len(chunks)), lengths), positions // page_size]
    batch.tokens[tokens] = _token_values(chunks)
    batch.positions[tokens] = positions
    batch.token_rows[tokens] = np.repeat(np.nonzero(rows)[1], lengths)
    batch.kv_slots[tokens] = pages * page_size + positions % page_size
    return buffers


def _fill_constants(
    batch: StepBatch,
    rows: Bool[np.ndarray, "replicas seqs"],
    record: np.dtype,
    sequences: tuple[Sequence, ...],
) -> None:
    """Write what is the same in every step; each sequence is packed once and remembers it."""
    for sequence in sequences:
        if len(sequence.packed) != record.itemsize:
            sequence.packed = _pack(sequence, record)
    records = np.frombuffer(b"".join([sequence.packed for sequence in sequences]), record)
    for name in record.names:
        getattr(batch, name)[rows] = records[name]


def _pack(sequence: Sequence, record: np.dtype) -> bytes:
    params = sequence.params
    (most_stop_ids,) = record["stop_ids"].shape
    room = most_stop_ids - len(sequence.stop_ids)
    if room < 0:
        raise ValueError(
            f"{len(sequence.stop_ids)} ids end the sequence, more than {most_stop_ids}: "
            "take a layout with more stop_ids"
        )
    row = np.zeros((), record)
    row["prompt_lens"] = len(sequence.prompt)
    row["seeds"] = sequence.seed
    row["temperature"] = params.temperature
    row["top_k"] = max(params.top_k, 0)
    row["top_p"] = params.top_p
    row["min_p"] = params.min_p
    row["presence"] = params.presence_penalty
    row["frequency"] = params.frequency_penalty
    row["repetition"] = params.repetition_penalty
    row["banned_until"] = params.min_tokens
    row["stop_ids"] = sequence.stop_ids + (-1,) * room
    return row.tobytes()


def _block_tables(sequences: tuple[Sequence, ...]) -> Int32[np.ndarray, "rows pages"]:
    """Each sequence's pages in a row, padded with 0 to the longest."""
    pages = [sequence.pages for sequence in sequences]
    longest = max(map(len, pages))
    width = longest * pages[0].itemsize
    padded = b"".join([row.tobytes().ljust(width, b"\0") for row in pages])
    return np.frombuffer(padded, np.int32).reshape(-1, longest)


def _token_values(chunks: list[Chunk]) -> list[int]:
    values: list[int] = []
    for sequence, start, length, _ in chunks:
        if start < sequence.num_known:
            values += sequence.tokens_between(start, start + length)
        else:  # decode, one step ahead of what the host knows
            values.append(-1)
    return values
