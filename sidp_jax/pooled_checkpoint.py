"""Orbax checkpoints of pooled weights: an array for each parameter of each layer.

A layer is written by its owner and read by its owner, whoever that is then: the arrays on disk
know nothing of a pool, so that any pool size, any resident layers and both layer loops restore
from them. Their leading axis of size 1 is the owner's entry in a slab row, so that neither saving
nor restoring a pooled layer reshapes anything on a device.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout
from sidp_jax.safetensors_files import CheckpointError
from sidp_jax.weights import Weights

# Most bytes between disk and devices at a time: the host memory that saving and restoring take.
# The largest array has to fit.
_CONCURRENT_GB = 8

AbstractParams = dict[str, jax.ShapeDtypeStruct]
NamedArrays = Iterator[tuple[str, jax.Array]]


def save_pooled(
    folder: Path, config: ModelConfig, layout: PoolLayout, mesh: Mesh, weights: Weights
) -> None:
    """Writes weights as an Orbax checkpoint, each layer from the devices of its owner.

    Args:
        folder: The checkpoint's own folder, which must not exist; it appears when complete.
        config: The model's architecture.
        layout: Who owns what; no layer is resident.
        mesh: The devices that hold the weights.
        weights: In the ``unrolled`` form.
    """
    assert not layout.resident_layers, layout
    assert isinstance(weights.pooled, tuple), "the unrolled form is saved"
    arrays = {
        _path(name, layer): _owned_part(weights.pooled[layout.row(layer)][name], owner, mesh)
        for layer in layout.pooled
        for owner in [layout.owner(layer)]
        for name in layer_spec(config)
    }
    arrays |= {
        _path(hf.EMBEDDING): weights.embedding,
        _path(hf.FINAL_NORM): weights.final_norm,
    }
    if weights.head is not None:
        arrays[_path(hf.HEAD)] = weights.head
    with _checkpointer() as checkpointer:
        tree = unflatten_dict(arrays, sep="/")
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(tree))


class OrbaxSource:
    """Parameters from ``save_pooled``; opening it checks all names and shapes."""

    def __init__(self, folder: Path, config: ModelConfig):
        self._folder = folder.absolute()
        self._checkpointer = _checkpointer()
        try:
            metadata = self._checkpointer.metadata(self._folder).item_metadata
            if metadata is None:  # as orbax answers if it can read none of it
                raise CheckpointError(
                    f"{folder} is damaged or incomplete: its _METADATA or manifest.ocdbt cannot be "
                    f"read; convert the model again"
                )
            _check_arrays(folder, config, flatten_dict(metadata.tree, sep="/"))
        except BaseException:
            self._checkpointer.close()
            raise

    def __enter__(self) -> OrbaxSource:
        return self

    def __exit__(self, *_: object) -> None:
        self._checkpointer.close()

    def pooled_row(self, layers: tuple[int | None, ...], leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        wanted = {}
        for name, leaf in leaves.items():
            for _, owner in _owned_entries(leaf):
                if layers[owner] is not None:
                    wanted[_path(name, layers[owner])] = _owned_spec(leaf, owner)
        restored = self._restore(wanted)
        for name, leaf in leaves.items():
            shards = []
            for device, owner in _owned_entries(leaf):
                if layers[owner] is None:
                    shape = leaf.sharding.shard_shape(leaf.shape)
                    shards.append(jnp.zeros(shape, leaf.dtype, device=device))
                else:
                    array = restored[_path(name, layers[owner])]
                    shards.append(_shards(array)[device])
            yield name, jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    def resident_layer(self, layer: int, leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        restored = self._restore(
            {
                _path(name, layer): jax.ShapeDtypeStruct(
                    (1, *leaf.shape),
                    leaf.dtype,
                    sharding=NamedSharding(
                        leaf.sharding.mesh, PartitionSpec(None, *leaf.sharding.spec)
                    ),
                )
                for name, leaf in leaves.items()
            }
        )
        for name, leaf in leaves.items():
            yield name, _drop_leading_axis(leaf.sharding)(restored.pop(_path(name, layer)))

    def outer(self, leaves: AbstractParams) -> NamedArrays:
        """See ``checkpoint.Source``."""
        restored = self._restore({_path(name): leaf for name, leaf in leaves.items()})
        for name in leaves:
            yield name, restored[_path(name)]

    def _restore(self, wanted: AbstractParams) -> dict[str, jax.Array]:
        """Restores the arrays at some paths, each straight to where its sharding says."""
        args = {
            # Not strict: the vocabulary is padded with zeros for whatever pool reads it.
            path: ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, dtype=leaf.dtype, global_shape=leaf.shape, strict=False
            )
            for path, leaf in wanted.items()
        }
        request = ocp.args.PyTreeRestore(
            unflatten_dict(wanted, sep="/"),
            restore_args=unflatten_dict(args, sep="/"),
            partial_restore=True,
        )
        try:
            restored = self._checkpointer.restore(self._folder, request)
        except Exception as error:  # orbax raises just this where tensorstore fails
            raise CheckpointError(_describe(self._folder, error)) from error
        return flatten_dict(restored, sep="/")


def _describe(folder: Path, error: Exception) -> str:
    """One line that names the array, out of the page that orbax writes."""
    array = re.search(r"'path': '([^'/]+)/'", str(error))
    reason = str(error.__cause__ or error).partition("\n")[0]
    name = f"array {array[1]!r}" if array else "an array"
    return f"{folder} is damaged: {name} cannot be read ({reason:.300}); convert the model again"


def _path(name: str, layer: int | None = None) -> str:
    """Where a parameter lies in the tree on disk."""
    path = name.replace(".", "/")
    return path if layer is None else f"layers/{layer:05d}/{path}"


def _checkpointer() -> ocp.Checkpointer:
    # Weights hardly compress, and compressing them takes far longer than writing them.
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            use_compression=False,
            save_device_host_concurrent_gb=_CONCURRENT_GB,
            save_concurrent_gb=_CONCURRENT_GB,
            restore_concurrent_gb=_CONCURRENT_GB,
        )
    )


def _owned_entries(leaf: jax.ShapeDtypeStruct) -> list[tuple[jax.Device, int]]:
    """Each device of this process, and the entry of axis 0 that it holds."""
    places = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    return [(device, index[0].start or 0) for device, index in places.items()]


def _owner_sharding(mesh: Mesh, spec: PartitionSpec, owner: int) -> NamedSharding:
    """The sharding of a slab row, on the devices of one owner."""
    alone = Mesh(mesh.devices[owner : owner + 1], mesh.axis_names, axis_types=mesh.axis_types)
    return NamedSharding(alone, spec)


def _owned_spec(leaf: jax.ShapeDtypeStruct, owner: int) -> jax.ShapeDtypeStruct:
    """One owner's entry of a slab row, as it lies on disk and on the owner's devices."""
    sharding = _owner_sharding(leaf.sharding.mesh, leaf.sharding.spec, owner)
    return jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype, sharding=sharding)


def _owned_part(array: jax.Array, owner: int, mesh: Mesh) -> jax.Array:
    """One owner's entry of a slab row, without a copy."""
    shards = _shards(array)
    parts = [shards[device] for device in mesh.devices[owner]]
    shape = (1, *array.shape[1:])
    sharding = _owner_sharding(mesh, array.sharding.spec, owner)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _shards(array: jax.Array) -> dict[jax.Device, jax.Array]:
    return {shard.device: shard.data for shard in array.addressable_shards}


@cache
def _drop_leading_axis(sharding: NamedSharding) -> jax.stages.Wrapped:
    return jax.jit(lambda array: array[0], out_shardings=sharding)


def _check_arrays(folder: Path, config: ModelConfig, found: dict[str, Any]) -> None:
    """Raises if an array is missing, unknown, or of another shape than ``config`` says."""
    wanted = {
        _path(name, layer): (1, *spec.shape)
        for layer in range(config.num_layers)
        for name, spec in layer_spec(config).items()
    }
    wanted |= {_path(name): shape for name, shape in hf.outer_shapes(config).items()}
    tables = (_path(hf.EMBEDDING), _path(hf.HEAD))
    problems = [f"array {path!r} is missing" for path in wanted if path not in found]
    for path, array in found.items():
        if path not in wanted:
            problems.append(f"array {path!r} has no place in {config.architecture}")
        elif not _fits(tuple(array.shape), wanted[path], padded=path in tables):
            problems.append(
                f"array {path!r} has shape {list(array.shape)}, config.json wants "
                f"{list(wanted[path])}"
            )
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise CheckpointError(
            f"{folder} does not fit its config.json: {'; '.join(problems[:5])}{more}"
        )


def _fits(found: tuple[int, ...], wanted: tuple[int, ...], padded: bool) -> bool:
    """Whether shapes agree; a padded table may have rows more."""
    if padded:
        return found[0] >= wanted[0] and found[1:] == wanted[1:]
    return found == wanted
