"""WaS by copies: a step is several programs, between which the host sends for the next layers.

While the layers of one period are computed, those of the next are copied by the GPUs' copy engines,
from the host's pinned memory or from the GPU of their owner. Neither takes cores from the compute,
as a collective does. Inside of one program XLA would start each copy just in time by its own
estimate, which no flag and no measured latency mends, and compute would wait. So each period, a
fetched layer (of a pool: a row of the slab) and the resident ones behind it, is a program of its
own, and the copies are the runtime's, on their own streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from sidp_jax.batch import BatchLayout
from sidp_jax.forward import (
    Forwarded,
    embedded,
    last_logits,
    layer_context,
    read_batch,
    resolve_tokens,
    with_tokens,
)
from sidp_jax.kv_cache import KV_PARTITION, KVCache
from sidp_jax.mesh import POOL
from sidp_jax.models.decoder import LayerParams
from sidp_jax.modes.loop import Span, local_slab, spans
from sidp_jax.pool import PoolLayout
from sidp_jax.program_cache import LoweredProgram
from sidp_jax.weights import Weights, is_on_host, nbytes_per_device, partitions

if TYPE_CHECKING:
    from sidp_jax.step import StepProgram

_PER_REPLICA = PartitionSpec(POOL)


class _Layers(NamedTuple):
    """The layers of a span: at most one fetched, still with the axis of the pool, goes first."""

    fetched: tuple[LayerParams, ...]
    resident: tuple[LayerParams, ...]


Period = tuple[Span, ...]
"""Spans that one program runs, whose pooled layers are one row of the slab, or are none."""

Part = str | tuple[tuple[bool, int], ...]
"""``begin``, ``end``, or of a period the shapes of its spans."""


class Arrivals:
    """The last row that was sent for, which outlives the step: the next one begins with it."""

    def __init__(self):
        self._source: LayerParams | None = None
        self._layers: tuple[LayerParams, ...] = ()

    def row(self, source: LayerParams, owners: int) -> tuple[LayerParams, ...]:
        """The layers of a row at every replica, in order; nothing is waited for.

        They are sent for now unless they were the last.

        Args:
            source: The row, arrays ``[pool, ...]``; entry ``o`` is with its owner, or with the
                host.
            owners: Replicas that own a layer of it.

        Returns:
            For each layer arrays ``[pool, ...]``, of which entry ``i`` is replica ``i``'s copy.
        """
        if self._source is not source:
            self._source, self._layers = None, ()  # those before may go first
            on_host = any(is_on_host(leaf) for leaf in source.values())
            self._layers = (_from_host(source),) if on_host else _from_owners(source, owners)
            self._source = source
        return self._layers


def _from_owners(source: LayerParams, owners: int) -> tuple[LayerParams, ...]:
    """The layers of a row, each copied from the devices of its owner to those of all others."""
    devices = next(iter(source.values())).sharding.mesh.devices  # [pool, tensor]
    held = [{s.device: s.data for s in leaf.addressable_shards} for leaf in source.values()]

    def from_owner(owner: int) -> LayerParams:
        copies = []
        for replica, row in enumerate(devices):
            for origin, device in zip(devices[owner], row, strict=True):
                kept = [leaf[origin] for leaf in held]
                copies.append(kept if replica == owner else jax.device_put(kept, device))
        return {
            name: jax.make_array_from_single_device_arrays(
                leaf.shape, leaf.sharding, [copy[place] for copy in copies]
            )
            for place, (name, leaf) in enumerate(source.items())
        }

    return tuple(map(from_owner, range(owners)))


def _from_host(source: LayerParams) -> LayerParams:
    """A layer whose kernels are copied from the host's memory."""
    kernels = {name: leaf for name, leaf in source.items() if is_on_host(leaf)}
    sharding = {name: _on_device(leaf).sharding for name, leaf in kernels.items()}
    return {**source, **jax.device_put(kernels, sharding)}


@dataclass(frozen=True)
class StepMemory:
    """What a step holds on one device, with the names of ``Compiled.memory_analysis()``.

    Attributes:
        argument_size_in_bytes: Weights on the device, all buffers of fetched layers, the cache,
            last tokens and batch.
        output_size_in_bytes: Cache, logits and batch.
        temp_size_in_bytes: Temporaries of the program that has most, and the residual stream.
        alias_size_in_bytes: The cache, which is updated in place.
    """

    argument_size_in_bytes: int
    output_size_in_bytes: int
    temp_size_in_bytes: int
    alias_size_in_bytes: int


@dataclass(frozen=True)
class CopiedForward:
    """The forward programs of one batch shape; stands for the one program of other layouts.

    Attributes:
        program: Model, pool and mesh.
        batch_layout: Shape of the batch.
        widest: The shape that the sampler expects.
        arrivals: Shared by all shapes of the batch.
    """

    program: StepProgram
    batch_layout: BatchLayout
    widest: BatchLayout
    arrivals: Arrivals

    def lower(
        self,
        weights: Weights,
        kv: KVCache,
        last_tokens: jax.ShapeDtypeStruct,
        buffer: jax.ShapeDtypeStruct,
    ) -> LoweredCopiedForward:
        """Traces the programs; of periods with equally many layers, one.

        Args:
            weights: The weights' specification, with where each array lies.
            kv: That of the cache.
            last_tokens: That of the last tokens, ``[pool, slots]``.
            buffer: That of the packed batch, ``[pool, size]``.
        """
        layout, table, outer = self.program.layout, weights.embedding, _outer(weights)
        x = jax.ShapeDtypeStruct(
            (layout.pool_size * self.batch_layout.tokens, table.shape[1]),
            table.dtype,
            sharding=self.program.per_replica(),
        )
        stream = _PER_REPLICA, _PER_REPLICA
        everywhere = NamedSharding(self.program.mesh, PartitionSpec())
        parts = {"begin": self._lower("begin", _forward_begin, stream, outer, last_tokens, buffer)}
        row = {name: _on_device(leaf) for name, leaf in weights.pooled[0].items()}
        for period in _periods(layout):
            if (shape := _shape(period)) not in parts:
                layers = _layers_of(period, weights, (row,) * _num_fetched(period))
                out = _PER_REPLICA, KVCache(KV_PARTITION, KV_PARTITION), _PER_REPLICA
                count = jax.ShapeDtypeStruct(_numbers(period).shape, jnp.int32, sharding=everywhere)
                arguments = layers, count, x, kv, buffer
                parts[shape] = self._lower("period", _period, out, *arguments, donated=(2, 3))
        result = Forwarded(None, _PER_REPLICA, _PER_REPLICA)
        end = partial(_end, widest=self.widest)
        parts["end"] = self._lower("end", end, result, outer, x, last_tokens, buffer)
        held = [weights, self.buffers(weights), kv, last_tokens, buffer]
        kv_bytes = nbytes_per_device(kv)
        memory = StepMemory(nbytes_per_device(held), kv_bytes, nbytes_per_device(x), kv_bytes)
        return LoweredCopiedForward(self, parts, memory)

    def buffers(self, weights: Weights) -> list[LayerParams]:
        """What fetched layers take on a device at most: for each buffer its arrays.

        From the host come the kernels, from owners all layers of a row but the device's own. What
        the step before sent for is the first row again if there is no other.
        """
        layout, row = self.program.layout, weights.pooled[0]
        if layout.on_host:
            arriving = [{name: _on_device(leaf) for name, leaf in row.items() if is_on_host(leaf)}]
        else:
            arriving = [row] * (layout.pool_size - 1)
        return arriving * layout.buffered_rows

    def _lower(
        self,
        name: str,
        function: Any,
        out_specs: Any,
        *arguments: Any,
        donated: tuple[int, ...] = (),
    ) -> jax.stages.Lowered | LoweredProgram:
        mapped = jax.shard_map(
            partial(function, self.program, self.batch_layout),
            mesh=self.program.mesh,
            in_specs=partitions(arguments),
            out_specs=out_specs,
            check_vma=False,
        )
        jitted = jax.jit(mapped, donate_argnums=donated)
        identity = ("copied", name, self.batch_layout, self.widest)
        return self.program.kept(jitted, *identity).lower(*arguments)


@dataclass(frozen=True)
class LoweredCopiedForward:
    """The traced programs; stands for ``jax.stages.Lowered``.

    Attributes:
        forward: What was traced.
        parts: The programs.
        memory: What a step holds, without what only the compiler knows.
    """

    forward: CopiedForward
    parts: Mapping[Part, jax.stages.Lowered | LoweredProgram]
    memory: StepMemory

    def compile(self, options: dict[str, Any] | None = None) -> CompiledCopiedForward:
        """Compiles the programs side by side, with options like ``Lowered.compile``."""
        with ThreadPoolExecutor(len(self.parts)) as pool:
            compiled = pool.map(lambda lowered: lowered.compile(options), self.parts.values())
            parts = dict(zip(self.parts, compiled, strict=True))
        held = {name: compiled.memory_analysis() for name, compiled in parts.items()}
        temporaries = max(each.temp_size_in_bytes for each in held.values())
        known = self.memory
        memory = replace(
            known,
            output_size_in_bytes=known.output_size_in_bytes + held["end"].output_size_in_bytes,
            temp_size_in_bytes=known.temp_size_in_bytes + temporaries,
        )
        return CompiledCopiedForward(self.forward, parts, memory)


class _Run(NamedTuple):
    """A period, the layers of it that are fetched, its program, and its layers' numbers there."""

    period: Period
    fetched: int
    program: jax.stages.Compiled
    numbers: jax.Array


@dataclass(frozen=True)
class CompiledCopiedForward:
    """Runs a step; stands for ``jax.stages.Compiled``.

    Attributes:
        forward: What was compiled.
        parts: The programs.
        memory: What a step holds.
    """

    forward: CopiedForward
    parts: Mapping[Part, jax.stages.Compiled]
    memory: StepMemory

    @cached_property
    def _runs(self) -> list[_Run]:
        """What is the same in every step.

        The numbers are on the devices since the first: in a later one they would queue behind the
        copies.
        """
        program = self.forward.program
        everywhere = NamedSharding(program.mesh, PartitionSpec())
        return [
            _Run(
                period,
                _num_fetched(period),
                self.parts[_shape(period)],
                jax.device_put(_numbers(period), everywhere),
            )
            for period in _periods(program.layout)
        ]

    def __call__(
        self, weights: Weights, kv: KVCache, last_tokens: jax.Array, buffer: jax.Array
    ) -> Forwarded:
        """Sends one step to the devices, and the first row of the next one after it.

        A copy waits for what is in the queue of its device when it is sent off, as what is in it
        may still use the memory. So the row of the next period is sent off before this period is
        put into the queue. From the host, whose copies take far longer than a layer, that is when
        the period before is over: two buffers do, and the devices wait for the host for as long as
        it takes to send off one layer. From owners it is while the period before still runs, so
        that the devices never wait; a third buffer arrives then.

        The host waits here until the last period but one (from owners: but two) is over. What it
        has left to plan the next step in are the periods after that and the head.

        Args:
            weights: The weights.
            kv: The cache; donated, and gone if a program fails.
            last_tokens: int32 ``[pool, slots]``.
            buffer: The packed batch, int32 ``[pool, size]``.
        """
        rows, outer, arrivals = weights.pooled, _outer(weights), self.forward.arrivals
        ahead = self.forward.program.layout.rows_ahead
        widths = [run.fetched for run in self._runs if run.fetched]
        arrivals.row(rows[0], widths[0])  # under way, but for a first step
        x, marker = self.parts["begin"](outer, last_tokens, buffer)
        over = deque([marker])  # when they are ready, so are the programs up to theirs
        row = 0
        for run in self._runs:
            fetched = ()
            if run.fetched:
                fetched = arrivals.row(rows[row], widths[row])
                while len(over) > ahead:
                    jax.block_until_ready(over.popleft())
                row = (row + 1) % len(rows)
                arrivals.row(rows[row], widths[row])
            # Not by a name: it would hold the layers while others are sent for.
            x, kv, marker = run.program(
                _layers_of(run.period, weights, fetched), run.numbers, x, kv, buffer
            )
            over.append(marker)
        return self.parts["end"](outer, x, last_tokens, buffer)._replace(kv=kv)

    def memory_analysis(self) -> StepMemory:
        """What the device really holds at most is arguments and temporaries together."""
        return self.memory

    @property
    def longest_period(self) -> jax.stages.Compiled:
        """The program of a period with the most layers, to read its schedule."""
        shapes = [name for name in self.parts if not isinstance(name, str)]
        return self.parts[max(shapes, key=lambda spans: sum(sum(span) for span in spans))]

    def as_text(self) -> str:
        """The HLO of all programs, those of periods with equally many layers once."""
        return "\n\n".join(part.as_text() for part in self.parts.values())


def _forward_begin(
    program: StepProgram,
    batch_layout: BatchLayout,
    outer: Weights,
    last_tokens: Int[Array, "1 slots"],
    buffer: Int[Array, "1 size"],
) -> tuple[Float[Array, "tokens hidden"], Float[Array, "1"]]:
    batch = read_batch(buffer, batch_layout)
    context = layer_context(program, batch, outer.embedding.dtype)
    x = embedded(context, outer.embedding, resolve_tokens(batch, last_tokens[0]))
    return x, _marker(x)


def _period(
    program: StepProgram,
    batch_layout: BatchLayout,
    spans_layers: tuple[_Layers, ...],
    numbers: Int[Array, "layers"],
    x: Float[Array, "tokens hidden"],
    kv: KVCache,
    buffer: Int[Array, "1 size"],
) -> tuple[Float[Array, "tokens hidden"], KVCache, Float[Array, "1"]]:
    context = layer_context(program, read_batch(buffer, batch_layout), x.dtype)
    mine = KVCache(kv.k[0], kv.v[0])
    layers = [
        params for each in spans_layers for params in (*local_slab(each.fetched), *each.resident)
    ]
    for place, params in enumerate(layers):
        x, mine = context.run_layer(params, numbers[place], x, mine)
    return x, KVCache(mine.k[None], mine.v[None]), _marker(x)


def _end(
    program: StepProgram,
    batch_layout: BatchLayout,
    outer: Weights,
    x: Float[Array, "tokens hidden"],
    last_tokens: Int[Array, "1 slots"],
    buffer: Int[Array, "1 size"],
    *,
    widest: BatchLayout,
) -> Forwarded:
    batch = read_batch(buffer, batch_layout)
    context = layer_context(program, batch, x.dtype)
    fed = with_tokens(buffer[0], resolve_tokens(batch, last_tokens[0]), batch_layout, widest)
    return Forwarded(None, last_logits(context, outer, batch, x)[None], fed[None])


def _marker(x: Float[Array, "tokens hidden"]) -> Float[Array, "1"]:
    """Ready when its program is over, and unlike ``x`` not donated to the next one."""
    return x[:1, 0]


def _outer(weights: Weights) -> Weights:
    """What is no layer: the tables and the last norm."""
    return weights._replace(pooled=(), resident=())


def _layers_of(
    period: Period, weights: Weights, fetched: Sequence[LayerParams]
) -> tuple[_Layers, ...]:
    arrived = iter(fetched)
    return tuple(
        _Layers(
            () if span.pooled is None else (next(arrived),),
            weights.resident[span.first_resident : span.first_resident + len(span.resident)],
        )
        for span in period
    )


def _periods(layout: PoolLayout) -> list[Period]:
    """The periods, of which the first may have no layer, and then is none."""
    before, *pooled = spans(layout)
    first = [(before,)] if any(before.shape) else []
    size = layout.pool_size
    return first + [tuple(pooled[at : at + size]) for at in range(0, len(pooled), size)]


def _shape(period: Period) -> Part:
    """What of a period is visible in its program."""
    return tuple(span.shape for span in period)


def _numbers(period: Period) -> np.ndarray:
    """The numbers of a period's layers in order, int32."""
    return np.concatenate([span.numbers[1:] for span in period])


def _num_fetched(period: Period) -> int:
    return sum(span.pooled is not None for span in period)


def _on_device(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The description of an array of the slab once it has been fetched."""
    sharding = NamedSharding(leaf.sharding.mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
