"""Checkpoints for the tests, and weights on devices as plain parameters of the host."""

import json
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import save_file

from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.pool import PoolLayout
from sidp_jax.weights import Weights

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("qwen2", "qwen3", "llama")

# Pool size, tensor size, resident layers: even and uneven pools, all layers resident, and both
# axes of the mesh in use. No more than 5 layers and 8 devices.
LAYOUTS = ((1, 1, 0), (3, 1, 0), (2, 2, 1), (4, 2, 0), (2, 1, 5))

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 37,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def random_tensors(config: ModelConfig, dtype=np.float32) -> dict[str, np.ndarray]:
    """Random values for every tensor of a checkpoint, by name."""
    rng = np.random.default_rng(0)
    slots = hf.tensor_slots(config)
    return {name: rng.standard_normal(slot.shape).astype(dtype) for name, slot in slots.items()}


def write_checkpoint(
    folder: Path, tensors: dict[str, np.ndarray], values: dict | None = None, shards: int = 1
) -> Path:
    """Writes ``config.json`` and safetensors, with an index if there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values or CONFIG))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def layer_params(weights: Weights, layout: PoolLayout, layer: int) -> dict[str, np.ndarray]:
    """The parameters of one layer, from whichever place and form it lies in."""
    if layer in layout.resident:
        index = layout.resident.index(layer)
        if isinstance(weights.resident, tuple):
            return _host(weights.resident[index])
        return _host({name: array[index] for name, array in weights.resident.items()})
    row, owner = layout.row(layer), layout.owner(layer)
    if isinstance(weights.pooled, tuple):
        return _host({name: array[owner] for name, array in weights.pooled[row].items()})
    return _host({name: array[owner, row] for name, array in weights.pooled.items()})


def outer_params(weights: Weights) -> dict[str, np.ndarray]:
    """The parameters outside the layers, with the padding of the vocabulary."""
    outer = {hf.EMBEDDING: weights.embedding, hf.FINAL_NORM: weights.final_norm}
    return _host(outer if weights.head is None else {**outer, hf.HEAD: weights.head})


def exported(weights: Weights, layout: PoolLayout, config: ModelConfig) -> dict[str, np.ndarray]:
    """Weights on devices as the tensors of a Hugging Face checkpoint."""
    layers = [layer_params(weights, layout, layer) for layer in range(config.num_layers)]
    return hf.export_tensors(config, layers, outer_params(weights))


def assert_same_tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    """Same names, types and values."""
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def device_bytes() -> dict[jax.Device, int]:
    """Bytes of all arrays by device; what several arrays share is counted once."""
    sizes = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            buffer = shard.data.unsafe_buffer_pointer()
            sizes.setdefault(shard.device, {})[buffer] = shard.data.nbytes
    return {device: sum(buffers.values()) for device, buffers in sizes.items()}


def _host(params) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in params.items()}
