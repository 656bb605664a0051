"""Checkpoints go straight to the owners, in bounded memory, and damaged ones are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    CONFIG,
    FAMILIES,
    GOLDEN,
    LAYOUTS,
    assert_same_tensors,
    device_bytes,
    exported,
    layer_params,
    outer_params,
    random_tensors,
    write_checkpoint,
)
from safetensors.numpy import load_file, save_file

from sidp_jax import dummy_weights, safetensors_files
from sidp_jax.checkpoint import CheckpointError, load_weights
from sidp_jax.mesh import make_mesh
from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout
from sidp_jax.weights import weights_spec

MODEL = ModelConfig.from_dict(CONFIG)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load(folder, config=MODEL, place=(2, 1, 0), layer_loop="unrolled", dtype="float32", **options):
    pool, tensor, resident = place
    layout = PoolLayout(config.num_layers, pool, resident)
    mesh = make_mesh(pool, tensor)
    return layout, load_weights(
        folder, config, layout, mesh, dtype=dtype, layer_loop=layer_loop, **options
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = random_tensors(MODEL)
    return write_checkpoint(folder, tensors, shards=3), tensors


# Where things go.


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("place", LAYOUTS)
def test_every_value_arrives_in_every_layout(checkpoint, place, layer_loop):
    folder, tensors = checkpoint
    layout, weights = load(folder, place=place, layer_loop=layer_loop)
    assert_same_tensors(exported(weights, layout, MODEL), tensors)
    spec = weights_spec(
        MODEL, layout, make_mesh(*place[:2]), layer_loop=layer_loop, dtype=jnp.dtype("float32")
    )
    assert jax.tree.structure(weights) == jax.tree.structure(spec)
    for array, leaf in zip(jax.tree.leaves(weights), jax.tree.leaves(spec), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (leaf.shape, leaf.dtype, leaf.sharding)


def test_what_the_host_owns_lies_in_its_memory(checkpoint):
    folder, tensors = checkpoint
    layers = MODEL.num_layers
    layout, mesh = PoolLayout(layers, 1, layers - 2, on_host=True), make_mesh(1)
    form = {"layer_loop": "unrolled", "dtype": jnp.dtype("float32")}
    weights = load_weights(folder, MODEL, layout, mesh, **form)
    assert_same_tensors(exported(weights, layout, MODEL), tensors)
    for row in weights.pooled:
        kinds = {name: array.sharding.memory_kind for name, array in row.items()}
        assert {n for n, kind in kinds.items() if kind == "pinned_host"} == {
            name for name in kinds if name.endswith(".kernel")
        }
    with pytest.raises(ValueError, match="must be 'unrolled' where the host owns layers"):
        weights_spec(MODEL, layout, mesh, layer_loop="scan", dtype=form["dtype"])


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_that_transformers_wrote(family):
    config = ModelConfig.from_pretrained(GOLDEN / family)
    tensors = {}
    for file in (GOLDEN / family).glob("*.safetensors"):
        tensors |= load_file(file)
    layout, weights = load(GOLDEN / family, config)
    assert_same_tensors(exported(weights, layout, config), tensors)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
def test_padding_of_vocabulary_and_last_row_is_zero(checkpoint, layer_loop):
    layout, weights = load(checkpoint[0], place=(4, 2, 0), layer_loop=layer_loop)
    for table in (weights.embedding, weights.head):
        assert table.shape[0] == 40
        assert not np.asarray(table)[MODEL.vocab_size :].any()
    assert layout.layer_at(1, 1) is None
    pooled = weights.pooled
    absent = [a[1:, 1] for a in pooled.values()] if layer_loop == "scan" else pooled[1].values()
    for array in absent:
        assert not np.asarray(array)[1:].any()


def test_shards_that_hold_nothing_but_padding(tmp_path):
    values = {**CONFIG, "vocab_size": 9}
    config = ModelConfig.from_dict(values)
    tensors = random_tensors(config)
    layout, weights = load(write_checkpoint(tmp_path, tensors, values), config, place=(4, 2, 0))
    assert weights.head.shape[0] == 16
    assert not np.asarray(weights.head)[9:].any()
    assert_same_tensors(exported(weights, layout, config), tensors)


@pytest.mark.parametrize("layer_loop", ["scan", "unrolled"])
@pytest.mark.parametrize("place", [(3, 1, 0), (2, 2, 1)])
def test_no_device_ever_holds_more_than_its_share_and_one_parameter(
    checkpoint, monkeypatch, place, layer_loop
):
    folder, _ = checkpoint
    peaks = dict.fromkeys(jax.devices(), 0)
    before = device_bytes()

    def watch(self, tensor, out, first=0, read=safetensors_files.TensorReader.read):
        for device, size in device_bytes().items():
            peaks[device] = max(peaks[device], size - before.get(device, 0))
        read(self, tensor, out, first)

    monkeypatch.setattr(safetensors_files.TensorReader, "read", watch)
    _, weights = load(folder, place=place, layer_loop=layer_loop)
    share = dict.fromkeys(peaks, 0)
    for array in jax.tree.leaves(weights):
        for shard in array.addressable_shards:
            share[shard.device] += shard.data.nbytes
    largest = max(int(np.prod(spec.shape)) * 4 for spec in layer_spec(MODEL).values())
    for device, peak in peaks.items():
        assert peak <= share[device] + largest


def test_weights_are_copies_of_the_files(tmp_path):
    tensors = random_tensors(MODEL)
    folder = write_checkpoint(tmp_path, tensors)
    layout, weights = load(folder)
    file = folder / "model.safetensors"
    if sys.platform == "linux":
        assert str(file) not in Path("/proc/self/maps").read_text()
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same_tensors(exported(weights, layout, MODEL), tensors)


# Types and forms of the files.


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_cast(tmp_path, stored, dtype):
    tensors = random_tensors(MODEL, stored)
    layout, weights = load(write_checkpoint(tmp_path, tensors), dtype=dtype)
    wanted = {name: value.astype(jnp.dtype(dtype)) for name, value in tensors.items()}
    assert_same_tensors(exported(weights, layout, MODEL), wanted)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("index", [True, False])
def test_with_and_without_an_index(tmp_path, shards, index):
    tensors = random_tensors(MODEL)
    folder = write_checkpoint(tmp_path, tensors, shards=shards)
    if not index:
        (folder / safetensors_files.INDEX_FILE).unlink(missing_ok=True)
    layout, weights = load(folder)
    assert_same_tensors(exported(weights, layout, MODEL), tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_read_in_chunks(checkpoint, monkeypatch, dtype):
    monkeypatch.setattr(safetensors_files, "_CHUNK_BYTES", 52)
    layout, weights = load(checkpoint[0], place=(2, 2, 0), dtype=dtype)
    wanted = {name: value.astype(jnp.dtype(dtype)) for name, value in checkpoint[1].items()}
    assert_same_tensors(exported(weights, layout, MODEL), wanted)


def test_tensors_that_say_nothing_new_are_ignored(tmp_path):
    values = {**CONFIG, "tie_word_embeddings": True}
    config = ModelConfig.from_dict(values)
    tensors = random_tensors(config)
    extra = {
        "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32),
        "lm_head.weight": np.ones((37, 12), np.float32),
    }
    layout, weights = load(write_checkpoint(tmp_path, {**tensors, **extra}, values), config)
    assert weights.head is None
    assert_same_tensors(exported(weights, layout, config), tensors)


# Damage.


def drop(tensors):
    del tensors[Q_PROJ]


def add(tensors):
    tensors["model.layers.5.mlp.up_proj.weight"] = np.ones((20, 12), np.float32)


def add_bias(tensors):
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.ones(48, np.float32)


def misshape(tensors):
    tensors[Q_PROJ] = tensors[Q_PROJ].T.copy()


def quantise(tensors):
    tensors[Q_PROJ] = tensors[Q_PROJ].astype(np.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, rf"{Q_PROJ}' is in none of the files"),
        (add, r"layers.5.mlp.up_proj.weight' of \S*model.safetensors has no place"),
        (add_bias, r"layers.0.self_attn.q_proj.bias' of \S*model.safetensors has no place"),
        (misshape, rf"{Q_PROJ}' of \S*model.safetensors has shape \[12, 48\].*wants \[48, 12\]"),
        (quantise, rf"{Q_PROJ}' of \S*model.safetensors is stored as I8"),
    ],
)
def test_wrong_tensors_are_refused(tmp_path, change, message):
    tensors = random_tensors(MODEL)
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(write_checkpoint(tmp_path, tensors))


def test_many_problems_are_counted(tmp_path):
    tensors = {name: value for name, value in random_tensors(MODEL).items() if "mlp" not in name}
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.*and 10 more"):
        load(write_checkpoint(tmp_path, tensors))


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 3000, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    folder = write_checkpoint(tmp_path, random_tensors(MODEL), shards=2)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors.*truncated"):
        load(folder)


def test_a_truncated_file_names_the_tensor_that_is_cut(tmp_path):
    save_file({"one": np.ones(4, np.float32)}, tmp_path / "a.safetensors")
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="tensor 'one'"):
        safetensors_files.find_tensors(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
    save_file({"one": np.ones(4, np.float32)}, tmp_path / "a.safetensors")
    tensor = safetensors_files.find_tensors(tmp_path)["one"]
    os.truncate(tensor.file, tensor.offset + 7)
    with (
        safetensors_files.TensorReader() as reader,
        pytest.raises(CheckpointError, match=r"a.safetensors ends at .* tensor 'one'"),
    ):
        reader.read(tensor, np.empty(4, np.float32))


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path, random_tensors(MODEL))
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(CheckpointError, match=r"its tensors end at"):
        load(folder)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\xff\xfe", "header of .* is damaged"),
        (b"[1]", "header of .* is damaged"),
        (b'{"a": 3}', "'a' of .* damaged header entry 3"),
        (
            b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
            r"has 4 bytes at 0, but its shape \[2\] in F32 needs 8",
        ),
        (
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
            r"shape \[-1\]",
        ),
    ],
)
def test_damaged_headers_are_refused(tmp_path, header, message):
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        safetensors_files.find_tensors(tmp_path)


def test_a_shard_that_is_missing_is_named(checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint[1], shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003.safetensors is missing: .*other"):
        load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../b"}}'])
def test_a_damaged_index_is_refused(checkpoint, tmp_path, content):
    folder = write_checkpoint(tmp_path, checkpoint[1], shards=3)
    (folder / safetensors_files.INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"index.json is damaged"):
        load(folder)


def test_an_index_that_names_the_wrong_file_is_refused(checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path, checkpoint[1], shards=2)
    index = folder / safetensors_files.INDEX_FILE
    listed = json.loads(index.read_text())
    listed["weight_map"][Q_PROJ] = next(
        file for file in listed["weight_map"].values() if file != listed["weight_map"][Q_PROJ]
    )
    index.write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=rf"lacks tensor '{Q_PROJ}'"):
        load(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path, random_tensors(MODEL))
    save_file({Q_PROJ: np.ones((48, 12), np.float32)}, folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ}' is in two files"):
        load(folder)


def test_folders_without_weights_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no \*.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is not read"):
        load(tmp_path)


# Dummy weights.


def dummy(place=(1, 1, 0), layer_loop="unrolled", **options):
    return load(None, place=place, layer_loop=layer_loop, load_format="dummy", **options)


@pytest.mark.parametrize(("place", "layer_loop"), [*zip(LAYOUTS, ["scan", "unrolled"] * 3)])  # noqa: B905
def test_dummy_weights_are_the_same_in_every_layout(place, layer_loop):
    layout, weights = dummy(place, layer_loop, seed=7)
    one, reference = dummy(seed=7)
    assert_same_tensors(exported(weights, layout, MODEL), exported(reference, one, MODEL))
    assert not np.asarray(weights.embedding)[MODEL.vocab_size :].any()


def test_dummy_weights_are_uniform_in_a_thousandth():
    layout, weights = dummy()
    layers = [layer_params(weights, layout, layer) for layer in range(MODEL.num_layers)]
    params = [{**layer, **outer_params(weights)} for layer in layers]
    for values in (value for group in params for value in group.values()):
        assert np.abs(values).max() <= 1e-3
        assert np.unique(values).size > 0.99 * values.size
        assert values.std() == pytest.approx(1e-3 / 3**0.5, rel=0.6 if values.size < 50 else 0.1)
    assert not np.array_equal(layers[0]["qkv.kernel"], layers[1]["qkv.kernel"])
    _, other = dummy(seed=1)
    assert not np.array_equal(np.asarray(other.final_norm), np.asarray(weights.final_norm))


def test_dummy_weights_in_bfloat16_are_those_in_float32_rounded():
    layout, exact = dummy()
    _, rounded = dummy(dtype="bfloat16")
    wanted = {n: v.astype(jnp.bfloat16) for n, v in exported(exact, layout, MODEL).items()}
    assert_same_tensors(exported(rounded, layout, MODEL), wanted)


def test_dummy_weights_need_no_memory_besides_their_own():
    spec = weights_spec(
        MODEL,
        PoolLayout(5, 4),
        make_mesh(4, 2),
        layer_loop="unrolled",
        dtype=jnp.dtype("bfloat16"),
    )
    leaf = spec.pooled[0]["gate_up.kernel"]
    draw = dummy_weights._draw_row(leaf.shape, leaf.dtype, leaf.sharding)
    keys = jax.ShapeDtypeStruct((4, 2), np.uint32)
    memory = draw.lower(keys, np.ones(4, bool)).compile().memory_analysis()
    assert memory.output_size_in_bytes == 2 * 20 * 12 // 2 * 2
    assert memory.temp_size_in_bytes <= 64


# Memory of the host.

BIG = {
    **CONFIG,
    "vocab_size": 8192,
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_hidden_layers": 42,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
}

MEASURE = """
import sys, time
from pathlib import Path
import jax, psutil
from sidp_jax.checkpoint import load_weights
from sidp_jax.mesh import make_mesh
from sidp_jax.models import hf
from sidp_jax.models.config import ModelConfig
from sidp_jax.pool import PoolLayout

folder, pool, layer_loop = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
config = ModelConfig.from_pretrained(folder)
layout, mesh = PoolLayout(config.num_layers, pool), make_mesh(pool)
jax.jit(lambda x: x + 1)(1.0).block_until_ready()
before, started = psutil.Process().memory_info().rss, time.perf_counter()
weights = load_weights(folder, config, layout, mesh, dtype="bfloat16", layer_loop=layer_loop)
seconds = time.perf_counter() - started
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
arrays = sum(shard.data.nbytes for a in jax.tree.leaves(weights) for shard in a.addressable_shards)
print(peak - before - arrays, arrays, seconds)
"""


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory):
    """A checkpoint of more than 2 GB in bfloat16, written without holding it in memory."""
    folder = tmp_path_factory.mktemp("big")
    (folder / "config.json").write_text(json.dumps(BIG))
    header, end = {}, 0
    for name, slot in hf.tensor_slots(ModelConfig.from_dict(BIG)).items():
        start, end = end, end + 2 * int(np.prod(slot.shape))
        header[name] = {"dtype": "BF16", "shape": slot.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    noise = np.random.default_rng(0).integers(0x3C00, 0x3F00, 1 << 22, np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, end, len(noise)):
            stream.write(noise[: end - start])
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("pool", "layer_loop"), [(1, "scan"), (4, "scan"), (4, "unrolled")])
def test_host_memory_stays_bounded(big_checkpoint, pool, layer_loop):
    stored = sum(file.stat().st_size for file in big_checkpoint.glob("*.safetensors"))
    assert stored >= 2e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(big_checkpoint), str(pool), layer_loop],
        capture_output=True,
        text=True,
        check=True,
    )
    beyond, arrays, seconds = map(float, done.stdout.split())
    print(f"{pool=} {layer_loop}: {beyond / stored:.1%} beyond the arrays, {seconds:.1f} s")
    assert arrays >= stored * 0.99
    assert beyond < 0.2 * stored
