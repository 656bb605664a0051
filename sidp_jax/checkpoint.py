"""Weights onto the devices: each shard is made for its device alone, one tensor at a time.

No device ever holds a layer that it does not own, and the host holds one parameter of one layer
(and the one before it, while that is on its way). A source yields the parameters row by row; how
the rows are kept, as an array each or stacked, is decided in one place for all sources.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from sidp_jax.dummy_weights import DummySource
from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import LayerParams
from sidp_jax.pool import PoolLayout
from sidp_jax.safetensors_files import CheckpointError, StoredTensor, TensorReader, find_tensors
from sidp_jax.weights import LayerLoop, LayerStack, Weights, weights_spec

__all__ = ["CheckpointError", "LoadFormat", "Source", "detect_format", "load_weights"]

logger = logging.getLogger(__name__)

LoadFormat = Literal["auto", "safetensors", "orbax", "dummy"]

ORBAX_FOLDER = "orbax"
"""The folder of a converted checkpoint that holds its weights."""

AbstractParams = dict[str, jax.ShapeDtypeStruct]
NamedArrays = Iterator[tuple[str, jax.Array]]
ShardMaker = Callable[[hf.Index], np.ndarray | None]


@runtime_checkable
class Source(Protocol):
    """Where parameters come from. ``leaves`` say shape, type and sharding of what is wanted."""

    def pooled_row(self, layers: tuple[int | None, ...], leaves: AbstractParams) -> NamedArrays:
        """One slab row as arrays ``[pool, ...]``; ``layers[o]`` is what replica ``o`` owns."""
        ...

    def resident_layer(self, layer: int, leaves: AbstractParams) -> NamedArrays:
        """One layer for every replica, as arrays ``[...]``."""
        ...

    def outer(self, leaves: AbstractParams) -> NamedArrays:
        """The parameters outside the layers, tables padded with zero rows."""
        ...


def load_weights(
    path: str | Path | None,
    model_config: ModelConfig,
    layout: PoolLayout,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    layer_loop: LayerLoop,
    load_format: LoadFormat = "auto",
    seed: int = 0,
) -> Weights:
    """Loads all weights to the devices that own them.

    Args:
        path: Folder with the checkpoint; unused by ``dummy``.
        model_config: The model's architecture.
        layout: Who owns what.
        mesh: The devices.
        dtype: Type of the weights on the devices, whatever type is stored.
        layer_loop: Form of the layers.
        load_format: ``safetensors``, ``orbax`` (from ``sidp_jax.convert``), ``auto`` (whichever
            the folder holds), or ``dummy``: uniform in +-1e-3, norms too, for benchmarks.
        seed: Seed of the dummy weights; the same seed gives the same values in every layout.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged, or made for another model. The
            message names tensor and file.
    """
    started = time.perf_counter()
    dtype = jnp.dtype(dtype)
    spec = partial(weights_spec, model_config, mesh=mesh, dtype=dtype)
    on_devices = replace(layout, on_host=False)
    if load_format == "auto":
        load_format = detect_format(path)
    with _open_source(path, model_config, load_format, seed) as source:
        weights = _assemble(
            source,
            layout,
            spec(on_devices, layer_loop="unrolled"),
            spec(layout, layer_loop=layer_loop),
        )
    jax.block_until_ready(weights)
    size = sum(leaf.size * dtype.itemsize for leaf in jax.tree.leaves(weights))
    seconds = time.perf_counter() - started
    logger.info(
        "loaded %.2f GB (%s) in %.1f s, %.2f GB/s",
        size / 1e9,
        load_format,
        seconds,
        size / 1e9 / seconds,
    )
    return weights


def detect_format(path: str | Path | None) -> LoadFormat:
    """``orbax`` for a folder from ``sidp_jax.convert``, else ``safetensors``.

    Raises:
        CheckpointError: There is no such folder.
    """
    if path is None or not Path(path).is_dir():
        raise CheckpointError(
            f"no checkpoint folder {path}: set `model` to a folder with a Hugging Face checkpoint, "
            f"or load_format=dummy for random weights"
        )
    return "orbax" if (Path(path) / ORBAX_FOLDER).is_dir() else "safetensors"


def _open_source(
    path: str | Path | None, config: ModelConfig, load_format: LoadFormat, seed: int
) -> AbstractContextManager[Source]:
    if load_format == "dummy":
        return DummySource(config, seed)
    detect_format(path)
    if load_format == "safetensors":
        return SafetensorsSource(Path(path), config)
    if load_format == "orbax":
        # Imported here: orbax takes a second to import and most jobs do not need it.
        from sidp_jax.pooled_checkpoint import OrbaxSource

        return OrbaxSource(Path(path) / ORBAX_FOLDER, config)
    raise ValueError(f"{load_format=} must be one of auto, safetensors, orbax, dummy")


def _assemble(source: Source, layout: PoolLayout, rows: Weights, target: Weights) -> Weights:
    """All parameters from a source, in the form of ``target``.

    ``rows`` is the unrolled form, on the devices: what the host owns goes there through them.
    """
    owners = range(layout.pool_size)
    pooled = (
        source.pooled_row(tuple(layout.layer_at(row, owner) for owner in owners), leaves)
        for row, leaves in enumerate(rows.pooled)
    )
    if layout.on_host:
        pooled = map(_moved, pooled, target.pooled)
    resident = (
        source.resident_layer(layer, leaves)
        for layer, leaves in zip(layout.resident, rows.resident, strict=True)
    )
    leaves = {hf.EMBEDDING: target.embedding, hf.FINAL_NORM: target.final_norm}
    if target.head is not None:
        leaves[hf.HEAD] = target.head
    outer = dict(source.outer(leaves))
    return Weights(
        pooled=_collect(pooled, target.pooled, axis=1),
        resident=_collect(resident, target.resident, axis=0),
        embedding=outer[hf.EMBEDDING],
        final_norm=outer[hf.FINAL_NORM],
        head=outer.get(hf.HEAD),
    )


def _moved(layer: NamedArrays, target: LayerParams) -> NamedArrays:
    """A layer's parameters in the memory that ``target`` says."""
    for name, array in layer:
        yield name, jax.device_put(array, target[name].sharding).block_until_ready()
        del array  # before the next one is made, not after


def _collect(layers: Iterable[NamedArrays], target: LayerStack, axis: int) -> LayerStack:
    """Keeps the layers apart, or writes one after the other into arrays stacked on ``axis``.

    A stack is filled in place on its devices, so that they need room for one parameter more.
    """
    if isinstance(target, tuple):
        return tuple(dict(layer) for layer in layers)
    stacks: LayerParams = {
        name: _empty_stack(leaf.shape, _stack_dtype(leaf), leaf.sharding)
        for name, leaf in target.items()
    }
    for index, layer in enumerate(layers):
        for name, array in layer:
            insert = _insert_into(axis, target[name].sharding)
            stacks[name] = insert(stacks[name], array, index).block_until_ready()
            del array  # before the next one is made, not after
    return {name: _reinterpret(stacks.pop(name), leaf.dtype) for name, leaf in target.items()}


def _stack_dtype(leaf: jax.ShapeDtypeStruct) -> jnp.dtype:
    """The type in which a stack is filled.

    XLA on the CPU cannot write 16-bit floats into an array without going through all of it, since
    it converts them to float32 and back. Integers it writes in place.
    """
    on_cpu = leaf.sharding.mesh.devices.flat[0].platform == "cpu"
    return jnp.dtype(jnp.uint16) if on_cpu and leaf.dtype.itemsize == 2 else leaf.dtype


@cache
def _insert_into(axis: int, sharding: NamedSharding) -> jax.stages.Wrapped:
    def insert(stack: jax.Array, array: jax.Array, index: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, bits, index, axis)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _empty_stack(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> jax.Array:
    """Zeros made on the devices."""
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


def _reinterpret(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The same memory, on the CPU, as another type of the same size."""
    if array.dtype == dtype:
        return array
    shards = [
        # jax adopts memory that is aligned as it wants it, and this memory is its own.
        jax.device_put(np.asarray(shard.data).view(dtype), shard.device)
        for shard in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


class SafetensorsSource:
    """Parameters from a Hugging Face checkpoint; opening it checks all names and shapes."""

    def __init__(self, folder: Path, config: ModelConfig):
        self._config = config
        self._tensors = find_tensors(folder)
        _check_tensors(folder, config, self._tensors)
        self._reader = TensorReader()
        # The parameter read last: the devices of one owner take different parts of it.
        self._last: tuple[tuple[str, int | None], np.ndarray] | None = None

    def __enter__(self) -> SafetensorsSource:
        return self

    def __exit__(self, *exc: object) -> None:
        self._reader.__exit__(*exc)

    def pooled_row(self, layers: tuple[int | None, ...], leaves: AbstractParams) -> NamedArrays:
        """See ``Source``."""
        for name, leaf in leaves.items():

            def part(index: hf.Index, name: str = name, leaf=leaf) -> np.ndarray | None:
                layer = layers[index[0].start or 0]
                if layer is None:
                    return None
                return self._layer_param(name, layer, leaf.shape[1:], leaf.dtype)[index[1:]][None]

            yield name, self._place(leaf, part)

    def resident_layer(self, layer: int, leaves: AbstractParams) -> NamedArrays:
        """See ``Source``."""
        for name, leaf in leaves.items():

            def part(index: hf.Index, name: str = name, leaf=leaf) -> np.ndarray:
                return self._layer_param(name, layer, leaf.shape, leaf.dtype)[index]

            yield name, self._place(leaf, part)

    def outer(self, leaves: AbstractParams) -> NamedArrays:
        """See ``Source``."""
        for name, leaf in leaves.items():
            (slot,) = hf.outer_slots(self._config)[name]

            def part(index: hf.Index, slot: hf.TensorSlot = slot, leaf=leaf) -> np.ndarray:
                return self._rows(slot, index, leaf)

            yield name, self._place(leaf, part)

    def _place(self, leaf: jax.ShapeDtypeStruct, part: ShardMaker) -> jax.Array:
        array = _place(leaf, part)
        self._last = None
        return array

    def _layer_param(
        self, name: str, layer: int, shape: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """A whole parameter of one layer, put together from its tensors on the host."""
        key = (name, layer)
        if self._last is None or self._last[0] != key:
            self._last = None  # before the next one is allocated, not after
            param = np.empty(shape, dtype)
            for slot in hf.layer_slots(self._config, layer)[name]:
                self._reader.read(self._tensors[slot.name], param[slot.index])
            self._last = (key, param)
        return self._last[1]

    def _rows(self, slot: hf.TensorSlot, index: hf.Index, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        """Some rows of a tensor, and zeros where the padding of the vocabulary begins."""
        first, stop, _ = index[0].indices(leaf.shape[0])
        part = np.zeros((stop - first, *leaf.shape[1:]), leaf.dtype)
        inside = part[: max(0, slot.shape[0] - first)]
        if inside.size:
            self._reader.read(self._tensors[slot.name], inside, first * part[0].size)
        return part


def _place(leaf: jax.ShapeDtypeStruct, part: ShardMaker) -> jax.Array:
    """An array whose shards are made one by one, each put on its device before the next but one.

    Args:
        leaf: Shape, type and sharding.
        part: Makes the shard at an index on the host; None stands for zeros.
    """
    shards: list[jax.Array] = []
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        values = part(index)
        if values is None:
            shape = leaf.sharding.shard_shape(leaf.shape)
            shard = jnp.zeros(shape, leaf.dtype, device=device)
        else:
            shard = jax.device_put(np.ascontiguousarray(values), device)
        if shards:
            shards[-1].block_until_ready()
        shards.append(shard)
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)


def _check_tensors(folder: Path, config: ModelConfig, found: dict[str, StoredTensor]) -> None:
    """Raises if a tensor is missing, unknown, or of another shape than ``config`` says."""
    wanted = hf.tensor_slots(config)
    problems = [f"tensor {name!r} is in none of the files" for name in wanted if name not in found]
    for name, tensor in found.items():
        if name in wanted:
            if tensor.shape != wanted[name].shape:
                problems.append(
                    f"tensor {name!r} of {tensor.file} has shape {list(tensor.shape)}, "
                    f"config.json wants {list(wanted[name].shape)}"
                )
        elif not hf.is_ignorable(config, name):
            problems.append(
                f"tensor {name!r} of {tensor.file} has no place in {config.architecture} with "
                f"{config.num_layers} layers"
            )
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder} does not fit its config.json: {'; '.join(problems[:5])}{more}"
        )
