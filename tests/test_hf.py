"""The table of Hugging Face names: complete, without overlaps, and right about who goes where."""

import numpy as np
import pytest
from checkpoints import CONFIG, FAMILIES, GOLDEN, assert_same_tensors, random_tensors
from safetensors import safe_open

from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec

FAMILY_OF = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def assemble(config, tensors):
    """Our parameters from a checkpoint's tensors, through the table alone."""
    layers, outer = [], {}
    for layer in range(config.num_layers):
        params = {}
        for name, slots in hf.layer_slots(config, layer).items():
            params[name] = np.full(layer_spec(config)[name].shape, np.nan, np.float32)
            for slot in slots:
                params[name][slot.index] = tensors[slot.name].reshape(slot.part_shape)
        layers.append(params)
    for name, (slot,) in hf.outer_slots(config).items():
        outer[name] = tensors[slot.name]
    return layers, outer


def config_of(family="qwen3", **changes):
    return ModelConfig.from_dict({**CONFIG, "architectures": [FAMILY_OF[family]], **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_writes(family):
    config = ModelConfig.from_pretrained(GOLDEN / family)
    written = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
        with safe_open(file, "numpy") as tensors:
            written |= {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    assert {name: slot.shape for name, slot in hf.tensor_slots(config).items()} == written


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_every_value_of_every_parameter_has_one_source(family, kv_heads, tied):
    config = config_of(family, num_key_value_heads=kv_heads, tie_word_embeddings=tied)
    for name, slots in hf.layer_slots(config, 0).items():
        written = np.zeros(layer_spec(config)[name].shape, int)
        for slot in slots:
            written[slot.index] += 1
            assert written[slot.index].shape == slot.part_shape
            assert np.prod(slot.shape) == np.prod(slot.part_shape)
        assert (written == 1).all(), name
    assert set(hf.outer_slots(config)) == set(hf.outer_shapes(config))
    assert (hf.HEAD in hf.outer_shapes(config)) == (not tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_export_is_the_inverse_of_import(family):
    config = config_of(family, tie_word_embeddings=family == "qwen2")
    tensors = random_tensors(config)
    layers, outer = assemble(config, tensors)
    assert_same_tensors(hf.export_tensors(config, layers, outer), tensors)


def test_export_drops_the_padding_of_the_vocabulary():
    config = config_of()
    tensors = random_tensors(config)
    layers, outer = assemble(config, tensors)
    for name in (hf.EMBEDDING, hf.HEAD):
        outer[name] = np.pad(outer[name], ((0, 3), (0, 0)))
    assert_same_tensors(hf.export_tensors(config, layers, outer), tensors)


def test_fused_parameters_hold_each_head_where_the_layer_looks_for_it():
    config = config_of("qwen2")
    tensors = random_tensors(config)
    layers, _ = assemble(config, tensors)
    queries, size = config.queries_per_kv_head, config.head_dim
    prefix = "model.layers.3.self_attn."

    def head(name, index):
        return tensors[prefix + name][index * size : (index + 1) * size]

    for group in range(config.num_kv_heads):
        for kind in ("weight", "bias"):
            fused = layers[3]["qkv.kernel" if kind == "weight" else "qkv.bias"][group]
            for query in range(queries):
                wanted = head(f"q_proj.{kind}", group * queries + query)
                np.testing.assert_array_equal(fused[query], wanted)
            np.testing.assert_array_equal(fused[queries], head(f"k_proj.{kind}", group))
            np.testing.assert_array_equal(fused[queries + 1], head(f"v_proj.{kind}", group))
        for query in range(queries):
            column = (group * queries + query) * size
            wanted = tensors[prefix + "o_proj.weight"][:, column : column + size]
            np.testing.assert_array_equal(layers[3]["out.kernel"][:, group, query], wanted)
    gate = tensors["model.layers.3.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(layers[3]["gate_up.kernel"][0], gate)


def test_ignorable_tensors():
    config = config_of()
    assert hf.is_ignorable(config, "model.layers.11.self_attn.rotary_emb.inv_freq")
    assert hf.is_ignorable(config, "model.rotary_emb.inv_freq")
    assert not hf.is_ignorable(config, "model.layers.11.self_attn.q_proj.lora_A.weight")
    assert not hf.is_ignorable(config, "lm_head.weight")
    assert hf.is_ignorable(config_of(tie_word_embeddings=True), "lm_head.weight")


@pytest.mark.parametrize(
    ("family", "layers", "sizes", "tensors", "parameters"),
    [
        # hidden, intermediate, heads, kv_heads, vocabulary; as published, head_dim 128
        ("qwen2", 80, (8192, 29568, 64, 8, 152064), 963, 72_706_203_648),
        ("qwen3", 64, (5120, 25600, 64, 8, 151936), 707, 32_762_123_264),
        ("llama", 80, (8192, 28672, 64, 8, 128256), 723, 70_553_706_496),
    ],
)
def test_published_models_have_the_published_number_of_parameters(
    family, layers, sizes, tensors, parameters
):
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = config_of(
        family,
        num_hidden_layers=layers,
        vocab_size=sizes[4],
        head_dim=128,
        **dict(zip(keys, sizes[:4], strict=True)),
    )
    slots = hf.tensor_slots(config)
    assert len(slots) == tensors
    assert sum(int(np.prod(slot.shape)) for slot in slots.values()) == parameters
