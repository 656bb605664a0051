"""Hugging Face tensor names and our parameters: one table, read in both directions.

Our parameters keep Hugging Face's ``[out, in]`` order, so a tensor of a checkpoint is a reshaped
part of a parameter: nothing is transposed, and the largest thing ever copied is one tensor.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from jax.typing import ArrayLike

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec

EMBEDDING = "embed.embedding"
FINAL_NORM = "final_norm.scale"
HEAD = "head.kernel"

_LAYER = "model.layers.{layer}."

# Tensor in the checkpoint; parameter; part of the parameter (`_index`); how many dimensions of
# that part make up the tensor's first dimension. The remaining ones make up its second, if any.
_TABLE = (
    (_LAYER + "input_layernorm.weight", "input_norm.scale", "all", 1),
    (_LAYER + "self_attn.q_proj.weight", "qkv.kernel", "queries", 3),
    (_LAYER + "self_attn.k_proj.weight", "qkv.kernel", "keys", 2),
    (_LAYER + "self_attn.v_proj.weight", "qkv.kernel", "values", 2),
    (_LAYER + "self_attn.q_proj.bias", "qkv.bias", "queries", 3),
    (_LAYER + "self_attn.k_proj.bias", "qkv.bias", "keys", 2),
    (_LAYER + "self_attn.v_proj.bias", "qkv.bias", "values", 2),
    (_LAYER + "self_attn.q_norm.weight", "q_norm.scale", "all", 1),
    (_LAYER + "self_attn.k_norm.weight", "k_norm.scale", "all", 1),
    (_LAYER + "self_attn.o_proj.weight", "out.kernel", "all", 1),
    (_LAYER + "post_attention_layernorm.weight", "post_norm.scale", "all", 1),
    (_LAYER + "mlp.gate_proj.weight", "gate_up.kernel", "gate", 1),
    (_LAYER + "mlp.up_proj.weight", "gate_up.kernel", "up", 1),
    (_LAYER + "mlp.down_proj.weight", "down.kernel", "all", 1),
    ("model.embed_tokens.weight", EMBEDDING, "all", 1),
    ("model.norm.weight", FINAL_NORM, "all", 1),
    ("lm_head.weight", HEAD, "all", 1),
)

# Tensors that published checkpoints carry and that say nothing new.
_IGNORABLE = re.compile(r"(model\.layers\.\d+\.self_attn|model)\.rotary_emb\.inv_freq")

Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class TensorSlot:
    """The place of one checkpoint tensor among our parameters.

    Attributes:
        name: The tensor's name in the checkpoint.
        param: The parameter that it is a part of.
        layer: The decoder layer, None outside the layers.
        index: The part: ``parameter[index]``.
        shape: Shape of the tensor in the checkpoint.
        part_shape: Shape of ``parameter[index]``; as many values as ``shape``.
    """

    name: str
    param: str
    layer: int | None
    index: Index
    shape: tuple[int, ...]
    part_shape: tuple[int, ...]


def outer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters outside the layers, the vocabulary without its padding."""
    table = (config.vocab_size, config.hidden_size)
    shapes = {EMBEDDING: table, FINAL_NORM: (config.hidden_size,)}
    return shapes if config.tie_word_embeddings else {**shapes, HEAD: table}


def layer_slots(config: ModelConfig, layer: int) -> dict[str, list[TensorSlot]]:
    """The tensors that make up each parameter of one layer, by parameter name."""
    shapes = {name: spec.shape for name, spec in layer_spec(config).items()}
    return _slots(config, shapes, layer)


def outer_slots(config: ModelConfig) -> dict[str, list[TensorSlot]]:
    """The tensors that make up each parameter outside the layers, by parameter name."""
    return _slots(config, outer_shapes(config), None)


def tensor_slots(config: ModelConfig) -> dict[str, TensorSlot]:
    """Every tensor that a checkpoint of the model has to have, by its name there."""
    groups = [outer_slots(config)] + [layer_slots(config, i) for i in range(config.num_layers)]
    return {slot.name: slot for group in groups for slots in group.values() for slot in slots}


def is_ignorable(config: ModelConfig, name: str) -> bool:
    """Whether a tensor may be in a checkpoint although the model has no place for it."""
    return bool(_IGNORABLE.fullmatch(name)) or (
        # A tied head is the embedding, as in transformers, whatever a file says besides.
        config.tie_word_embeddings and name == "lm_head.weight"
    )


def export_tensors(
    config: ModelConfig,
    layers: Sequence[Mapping[str, ArrayLike]],
    outer: Mapping[str, ArrayLike],
) -> dict[str, np.ndarray]:
    """Our parameters as the tensors of a Hugging Face checkpoint.

    Args:
        config: The model's architecture.
        layers: The parameters of each layer, by name.
        outer: The parameters of ``outer_shapes``; rows that pad the vocabulary are dropped.

    Returns:
        Contiguous arrays by tensor name, for ``safetensors.numpy.save_file``.
    """
    tensors = {}
    for slot in tensor_slots(config).values():
        source = outer if slot.layer is None else layers[slot.layer]
        value = np.asarray(source[slot.param])
        if slot.param in (EMBEDDING, HEAD):
            value = value[: config.vocab_size]
        tensors[slot.name] = np.ascontiguousarray(value[slot.index].reshape(slot.shape))
    return tensors


def _slots(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], layer: int | None
) -> dict[str, list[TensorSlot]]:
    slots: dict[str, list[TensorSlot]] = {name: [] for name in shapes}
    for template, param, part, leading in _TABLE:
        if param not in shapes:
            continue
        index = _index(config, part)
        # Shapes only: a broadcast scalar is an array of any shape without its memory.
        part_shape = np.broadcast_to(np.int8(0), shapes[param])[index].shape
        first, second = part_shape[:leading], part_shape[leading:]
        shape = (prod(first), prod(second)) if second else (prod(first),)
        name = template.format(layer=layer)
        slots[param].append(TensorSlot(name, param, layer, index, shape, part_shape))
    return slots


def _index(config: ModelConfig, part: str) -> Index:
    """A part of a fused parameter: of ``[groups, queries + 2, ...]`` or ``[gate and up, ...]``."""
    queries = config.queries_per_kv_head
    return {
        "all": (),
        "queries": (slice(None), slice(0, queries)),
        "keys": (slice(None), queries),
        "values": (slice(None), queries + 1),
        "gate": (0,),
        "up": (1,),
    }[part]
