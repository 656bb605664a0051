"""Layers that the host owns: a step is several programs, between which it sends for the next layer.

While the layers from one fetched layer up to the next are computed, the next is copied by the GPU's
copy engine from the host's pinned memory. Inside of one program XLA would start each copy just in
time by its own estimate, which no flag and no measured latency mends, and compute would wait. So
each period, a fetched layer and the resident ones behind it, is a program of its own, and the
copies are the runtime's, on its own stream. At most two fetched layers are on the device: the one
in use and the one that arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
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
from sidp_jax.modes.policy import WAS
from sidp_jax.pool import PoolLayout
from sidp_jax.weights import Weights, is_on_host, nbytes_per_device, partitions

if TYPE_CHECKING:
    from sidp_jax.step import StepProgram

_PER_REPLICA = PartitionSpec(POOL)


class _Layers(NamedTuple):
    """The layers of a period: at most one fetched, still with the axis of the pool, goes first."""

    fetched: tuple[LayerParams, ...]
    resident: tuple[LayerParams, ...]


Part = str | tuple[bool, int]
"""``begin``, ``end``, or of a period: whether a fetched layer is first, and the resident layers."""


class Arrivals:
    """The last layer that was sent for, which outlives the step: the next one begins with it."""

    def __init__(self):
        self._source: LayerParams | None = None
        self._layer: LayerParams = {}

    def layer(self, source: LayerParams) -> LayerParams:
        """A layer on the device, sent for now unless it was the last one; nothing is waited for.

        Args:
            source: A row of the slab, ``[pool, ...]``, whose kernels the host holds.
        """
        if self._source is not source:
            self._source, self._layer = None, {}  # the one before may go first
            kernels = {name: leaf for name, leaf in source.items() if is_on_host(leaf)}
            sharding = {name: _on_device(leaf).sharding for name, leaf in kernels.items()}
            self._layer = {**source, **jax.device_put(kernels, sharding)}
            self._source = source
        return self._layer


@dataclass(frozen=True)
class StepMemory:
    """What a step holds on one device, with the names of ``Compiled.memory_analysis()``.

    Attributes:
        argument_size_in_bytes: Weights on the device, both buffers of fetched layers, the cache,
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
class HostForward:
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
    ) -> LoweredHostForward:
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
        row = {name: _on_device(leaf) for name, leaf in weights.pooled[0].items()}
        stream = _PER_REPLICA, _PER_REPLICA
        parts = {"begin": self._lower(_forward_begin, stream, outer, last_tokens, buffer)}
        for span in _periods(layout):
            if span.shape not in parts:
                layers = _layers_of(span, weights, None if span.pooled is None else row)
                out = _PER_REPLICA, KVCache(KV_PARTITION, KV_PARTITION), _PER_REPLICA
                arguments = layers, self.numbers(span), x, kv, buffer
                parts[span.shape] = self._lower(_period, out, *arguments, donated=(2, 3))
        result = Forwarded(None, _PER_REPLICA, _PER_REPLICA)
        end = partial(_end, widest=self.widest)
        parts["end"] = self._lower(end, result, outer, x, last_tokens, buffer)
        # What the step before sent for is the first layer again if there is no other.
        fetched = [row[name] for name, leaf in weights.pooled[0].items() if is_on_host(leaf)]
        held = [weights, [fetched] * min(2, len(weights.pooled)), kv, last_tokens, buffer]
        kv_bytes = nbytes_per_device(kv)
        memory = StepMemory(nbytes_per_device(held), kv_bytes, nbytes_per_device(x), kv_bytes)
        return LoweredHostForward(self, parts, memory)

    def numbers(self, span: Span) -> jax.Array:
        """The numbers of a period's layers in order, int32, on the device."""
        return jax.device_put(span.numbers[1:], NamedSharding(self.program.mesh, PartitionSpec()))

    def _lower(
        self, function: Any, out_specs: Any, *arguments: Any, donated: tuple[int, ...] = ()
    ) -> jax.stages.Lowered:
        mapped = jax.shard_map(
            partial(function, self.program, self.batch_layout),
            mesh=self.program.mesh,
            in_specs=partitions(arguments),
            out_specs=out_specs,
            check_vma=False,
        )
        return jax.jit(mapped, donate_argnums=donated).lower(*arguments)


@dataclass(frozen=True)
class LoweredHostForward:
    """The traced programs; stands for ``jax.stages.Lowered``.

    Attributes:
        forward: What was traced.
        parts: The programs.
        memory: What a step holds, without what only the compiler knows.
    """

    forward: HostForward
    parts: Mapping[Part, jax.stages.Lowered]
    memory: StepMemory

    def compile(self, options: dict[str, Any] | None = None) -> CompiledHostForward:
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
        forward = self.forward
        # The numbers are here from now on: in a step they would queue behind the copies.
        periods = [(span, forward.numbers(span)) for span in _periods(forward.program.layout)]
        return CompiledHostForward(forward.arrivals, parts, periods, memory)


@dataclass(frozen=True)
class CompiledHostForward:
    """Runs a step; stands for ``jax.stages.Compiled``.

    Attributes:
        arrivals: The layer that the step before has sent for.
        parts: The programs.
        periods: For each period its layers, and their numbers on the device.
        memory: What a step holds.
    """

    arrivals: Arrivals
    parts: Mapping[Part, jax.stages.Compiled]
    periods: Sequence[tuple[Span, jax.Array]]
    memory: StepMemory

    def __call__(
        self, weights: Weights, kv: KVCache, last_tokens: jax.Array, buffer: jax.Array
    ) -> Forwarded:
        """Sends one step to the device, and the first fetched layer of the next one after it.

        The host waits here until the last period but one is over: a layer is sent for once the
        buffer of the last but one is free. What it has left to plan the next step in is the last
        period, the head and the next step's first period. That does for steps as long as pay for
        layers on the host, some hundred milliseconds.

        Args:
            weights: The weights.
            kv: The cache; donated, and gone if a program fails.
            last_tokens: int32 ``[pool, slots]``.
            buffer: The packed batch, int32 ``[pool, size]``.
        """
        rows, outer = weights.pooled, _outer(weights)
        self.arrivals.layer(rows[0])  # under way, but for a first step
        x, marker = self.parts["begin"](outer, last_tokens, buffer)
        row = 0
        for span, numbers in self.periods:
            fetched = None
            if span.pooled is not None:
                fetched = self.arrivals.layer(rows[row])
                # The period before is over, and so the buffer of its fetched layer free. The copy
                # is sent off first: with the period in the queue it would wait for that, too.
                jax.block_until_ready(marker)
                row = (row + 1) % len(rows)
                self.arrivals.layer(rows[row])
            period = self.parts[span.shape]
            x, kv, marker = period(_layers_of(span, weights, fetched), numbers, x, kv, buffer)
        return self.parts["end"](outer, x, last_tokens, buffer)._replace(kv=kv)

    def memory_analysis(self) -> StepMemory:
        """What the device really holds at most is arguments and temporaries together."""
        return self.memory

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
    context = layer_context(program, WAS, batch, outer.embedding.dtype)
    x = embedded(context, outer.embedding, resolve_tokens(batch, last_tokens[0]))
    return x, _marker(x)


def _period(
    program: StepProgram,
    batch_layout: BatchLayout,
    layers: _Layers,
    numbers: Int[Array, "layers"],
    x: Float[Array, "tokens hidden"],
    kv: KVCache,
    buffer: Int[Array, "1 size"],
) -> tuple[Float[Array, "tokens hidden"], KVCache, Float[Array, "1"]]:
    context = layer_context(program, WAS, read_batch(buffer, batch_layout), x.dtype)
    mine = KVCache(kv.k[0], kv.v[0])
    for place, params in enumerate((*local_slab(layers.fetched), *layers.resident)):
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
    context = layer_context(program, WAS, batch, x.dtype)
    fed = with_tokens(buffer[0], resolve_tokens(batch, last_tokens[0]), batch_layout, widest)
    return Forwarded(None, last_logits(context, outer, batch, x)[None], fed[None])


def _marker(x: Float[Array, "tokens hidden"]) -> Float[Array, "1"]:
    """Ready when its program is over, and unlike ``x`` not donated to the next one."""
    return x[:1, 0]


def _outer(weights: Weights) -> Weights:
    """What is no layer: the tables and the last norm."""
    return weights._replace(pooled=(), resident=())


def _layers_of(span: Span, weights: Weights, fetched: LayerParams | None) -> _Layers:
    first = span.first_resident
    resident = weights.resident[first : first + len(span.resident)]
    return _Layers(() if fetched is None else (fetched,), resident)


def _periods(layout: PoolLayout) -> list[Span]:
    """The periods, of which the first may have no layer, and then is none."""
    return [span for span in spans(layout) if any(span.shape)]


def _on_device(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The description of an array of the slab once it has been fetched."""
    sharding = NamedSharding(leaf.sharding.mesh, leaf.sharding.spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
