"""A converted checkpoint restores onto any pool, and says what is wrong when it cannot."""

import json
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import (
    CONFIG,
    GOLDEN,
    LAYOUTS,
    assert_same_tensors,
    device_bytes,
    exported,
    random_tensors,
    write_checkpoint,
)

from sidp_jax import convert as convert_module
from sidp_jax.checkpoint import CheckpointError, detect_format, load_weights
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.convert import convert
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout
from sidp_jax.pooled_checkpoint import OrbaxSource

MODEL = ModelConfig.from_dict(CONFIG)


def restore(folder, place=(2, 1, 0), layer_loop="unrolled", dtype="float32", config=MODEL):
    pool, tensor, resident = place
    layout = PoolLayout(config.num_layers, pool, resident)
    mesh = make_mesh(pool, tensor)
    return layout, load_weights(folder, config, layout, mesh, dtype=dtype, layer_loop=layer_loop)


def convert_to(output, model, **keys):
    convert(EngineConfig(model=str(model), **{"dtype": "float32", "pool_size": 4, **keys}), output)
    return output


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A checkpoint of pool size 4, and the tensors that it was made from."""
    tensors = random_tensors(MODEL)
    model = write_checkpoint(tmp_path_factory.mktemp("model"), tensors, shards=2)
    (model / "tokenizer.json").write_text("{}")
    (model / "merges.txt").write_text("a b")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "notes.bin").write_text("not needed")
    return convert_to(tmp_path_factory.mktemp("converted") / "new", model), tensors


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("place", [(4, 1, 0), *LAYOUTS])
def test_restores_onto_any_layout(converted, place, layer_loop):
    folder, tensors = converted
    layout, weights = restore(folder, place, layer_loop)
    assert_same_tensors(exported(weights, layout, MODEL), tensors)
    rows = np.asarray(weights.embedding)
    assert not rows[MODEL.vocab_size :].any()


def test_restores_in_another_type(converted):
    folder, tensors = converted
    layout, weights = restore(folder, dtype="bfloat16")
    wanted = {name: value.astype(jnp.bfloat16) for name, value in tensors.items()}
    assert_same_tensors(exported(weights, layout, MODEL), wanted)


def test_tied_checkpoint_of_another_family(tmp_path):
    config = ModelConfig.from_pretrained(GOLDEN / "qwen2")
    folder = convert_to(tmp_path / "new", GOLDEN / "qwen2", pool_size=3)
    source = restore(GOLDEN / "qwen2", (2, 1, 1), config=config)
    target = restore(folder, (2, 1, 1), config=config)
    assert target[1].head is None
    assert_same_tensors(
        exported(target[1], target[0], config), exported(source[1], source[0], config)
    )


def test_the_folder_is_complete_without_the_old_one(converted):
    folder, _ = converted
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "tokenizer.json", "merges.txt", "chat_template.jinja", "orbax"}
    assert detect_format(folder) == "orbax"
    assert ModelConfig.from_pretrained(folder) == MODEL


def test_each_layer_is_on_disk_once_in_its_own_array(converted):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(converted[0] / "orbax").item_metadata.tree
    assert sorted(tree["layers"]) == [f"{layer:05d}" for layer in range(5)]
    assert tuple(tree["layers"]["00003"]["gate_up"]["kernel"].shape) == (1, 2, 20, 12)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_no_device_holds_more_than_its_share_and_one_layer(converted, monkeypatch, layer_loop):
    peaks, before = {}, device_bytes()

    def watch(self, wanted, restore=OrbaxSource._restore):
        restored = restore(self, wanted)
        for device, size in device_bytes().items():
            peaks[device] = max(peaks.get(device, 0), size - before.get(device, 0))
        return restored

    monkeypatch.setattr(OrbaxSource, "_restore", watch)
    _, weights = restore(converted[0], (4, 1, 0), layer_loop)
    layer = sum(int(np.prod(spec.shape)) * 4 for spec in layer_spec(MODEL).values())
    share = dict.fromkeys(peaks, 0)
    for array in jax.tree.leaves(weights):
        for shard in array.addressable_shards:
            share[shard.device] += shard.data.nbytes
    assert sum(share.values()) > 0
    for device, peak in peaks.items():
        assert peak <= share[device] + layer


def test_another_models_checkpoint_is_refused(converted):
    deeper = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 6, "intermediate_size": 22})
    message = r"array 'layers/00005/.*(shape|missing)"
    with pytest.raises(CheckpointError, match=message):
        restore(converted[0], config=deeper)
    wider = ModelConfig.from_dict({**CONFIG, "vocab_size": 64})
    with pytest.raises(CheckpointError, match=r"embed/embedding' has shape \[40, 12\].*\[64, 12\]"):
        restore(converted[0], config=wider)
    shallower = ModelConfig.from_dict({**CONFIG, "num_hidden_layers": 4})
    with pytest.raises(CheckpointError, match=r"'layers/00004/.*has no place"):
        restore(converted[0], config=shallower)


RESTORE = """
import sys
from sidp_jax.checkpoint import CheckpointError, load_weights
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.pool import PoolLayout

model = ModelConfig.from_pretrained(sys.argv[1])
form = dict(dtype="float32", layer_loop="unrolled")
try:
    load_weights(sys.argv[1], model, PoolLayout(model.num_layers, 2), make_mesh(2), **form)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("manifest.ocdbt", "damaged or incomplete: its _METADATA or manifest.ocdbt"),
        ("_METADATA", "damaged or incomplete: its _METADATA or manifest.ocdbt"),
        ("ocdbt.process_0/d/*", r"damaged: array 'layers\.\S+' cannot be read"),
    ],
)
def test_damaged_checkpoints_are_refused(converted, tmp_path, damaged, message):
    folder = tmp_path / "copy"
    shutil.copytree(converted[0], folder)
    largest = max((folder / "orbax").glob(damaged), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    # In its own process: orbax leaves failed tasks behind that complain at some later time.
    command = [sys.executable, "-c", RESTORE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(f"orbax is {message}", done.stdout)


def test_output_must_be_new_or_empty(converted, tmp_path):
    model = write_checkpoint(tmp_path / "model", random_tensors(MODEL))
    (tmp_path / "empty").mkdir()
    convert_to(tmp_path / "empty", model)
    for taken in (tmp_path / "empty", model, model / "config.json"):
        with pytest.raises(ConfigError, match="is not empty"):
            convert_to(taken, model)


def test_a_converted_checkpoint_is_not_converted_again(converted, tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        convert_to(tmp_path / "again", converted[0])


def test_command_line(tmp_path):
    tensors = random_tensors(MODEL, jnp.bfloat16)
    model = write_checkpoint(tmp_path / "model", tensors)
    command = [sys.executable, "-m", "sidp_jax.convert", "--model", str(model), "--output"]
    done = subprocess.run(
        [*command, str(tmp_path / "new"), "pool_size=3"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # bfloat16 on disk stays bfloat16 without being told.
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "new" / "orbax").item_metadata.tree
    assert jnp.dtype(tree["final_norm"]["scale"].dtype) == jnp.bfloat16
    layout, weights = restore(tmp_path / "new", dtype="bfloat16")
    assert_same_tensors(exported(weights, layout, MODEL), tensors)


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["pool_size"], 2, "must be key=value"),
        (["max_num_seqs=3"], 2, "one of pool_size"),
        (["pool_size=6"], 2, "pool_size=6 must lie between 1 and the model's 5 layers"),
        (["pool_size=0"], 2, "pool_size=0"),
        (["dtype=int8"], 2, "dtype='int8'"),
        (["platform=cpu"], 1, "no *.safetensors"),
    ],
)
def test_wrong_usage(tmp_path, capsys, monkeypatch, overrides, code, message):
    monkeypatch.setattr(convert_module, "start_jax", lambda config: None)
    model = write_checkpoint(tmp_path / "model", random_tensors(MODEL))
    if code == 1:
        (model / "model.safetensors").unlink()
        (model / "orbax").mkdir()
    arguments = ["--model", str(model), "--output", str(tmp_path / "new"), *overrides]
    assert convert_module.main(arguments) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_not_supported_is_refused(tmp_path, capsys):
    model = write_checkpoint(tmp_path / "model", random_tensors(MODEL))
    config = {**CONFIG, "architectures": ["GemmaForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    arguments = ["--model", str(model), "--output", str(tmp_path / "new")]
    assert convert_module.main(arguments) == 2
    assert "GemmaForCausalLM" in capsys.readouterr().err
