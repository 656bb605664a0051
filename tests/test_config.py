import subprocess
import sys
from pathlib import Path

import pytest

from sidp_jax.config import (
    CONFIG_FOLDER,
    ConfigError,
    EngineConfig,
    find_config,
    load_config,
    resolve_path,
)
from sidp_jax.request import SamplingParams


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_overrides_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    path = write(tmp_path, "model: m\npool_size: 4\nmode: was\nsampling:\n  temperature: 0.5\n")
    config = load_config(path, ["pool_size=2", "sampling.top_p=0.9", "sampling.max_tokens=null"])
    assert (config.pool_size, config.mode, config.max_num_seqs) == (2, "was", 256)
    assert config.sampling == SamplingParams(temperature=0.5, top_p=0.9, max_tokens=None)


def test_nested_and_dotted_keys_are_the_same(tmp_path):
    nested = load_config(write(tmp_path, "model: m\nsampling: {top_k: 5, stop: [a, b]}"))
    dotted = load_config(write(tmp_path, "model: m\nsampling.top_k: 5\nsampling.stop: [a, b]"))
    assert nested == dotted
    assert nested.sampling.stop == ("a", "b")


def test_an_empty_section_is_no_error(tmp_path):
    assert load_config(write(tmp_path, "model: m\nsampling:\n")).sampling == SamplingParams()


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output=2024", "2024"),  # looks like a number, is a path
        ("output=null", None),
        ("input=a=b.jsonl", "a=b.jsonl"),
        ("gpu_memory_utilization=1", 1.0),
        ("overwrite=true", True),
        ("num_kv_pages=null", None),
        ("max_model_len=4_096", 4096),
    ],
)
def test_override_values_have_the_type_of_their_key(tmp_path, override, value):
    config = load_config(write(tmp_path, "model: m\noutput: o\n"), [override])
    got = getattr(config, override.partition("=")[0])
    assert got == value
    assert type(got) is type(value)


def test_numbers_that_yaml_takes_for_strings(tmp_path):
    config = load_config(write(tmp_path, "model: m"), ["sampling.min_p=1e-3"])
    assert config.sampling.min_p == 0.001


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("pool_sizes", "pool_size"),
        ("max_num_seq", "max_num_seqs"),
        ("temperature", "sampling.temperature"),
        ("sampling.max_token", "sampling.max_tokens"),
        ("sampling_top_p", "sampling.top_p"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, nearest):
    with pytest.raises(ConfigError, match=f"unknown key '{key}'.* '{nearest}'"):
        EngineConfig.from_mapping({"model": "m", key: 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pool_size", 0, r"pool_size=0 must be at least 1; set it"),
        ("pool_size", "four", r"pool_size='four' must be an integer; the default is 1"),
        ("pool_size", True, r"pool_size=True must be an integer"),
        ("pool_size", 2.5, r"pool_size=2.5 must be an integer"),
        ("pool_size", None, r"pool_size=None must be an integer"),
        ("tensor_parallel_size", 0, "tensor_parallel_size=0 must be at least 1"),
        ("mode", "wass", r"mode='wass' must be one of auto, replicated, was, cas.*'was'"),
        ("was_fetch", "host", r"was_fetch='host' must be one of auto, collective, copies"),
        ("layer_loop", "rolled", r"layer_loop='rolled' must be one of auto, scan, unrolled"),
        ("dtype", "fp8", r"dtype='fp8' must be one of bfloat16, float32"),
        ("load_format", "gguf", r"load_format='gguf' must be one of"),
        ("attention", "flash", r"attention='flash' must be one of auto, reference"),
        ("platform", "tpu", r"platform='tpu' must be one of auto, cpu, gpu"),
        ("hardware", "H999", r"hardware='H999' must be one of auto, .*h200"),
        ("resident_layers", -1, r"resident_layers=-1 must be at least 0"),
        ("pool_host_layers", -1, r"pool_host_layers=-1 must be at least 0"),
        ("max_model_len", 1, r"max_model_len=1 must be at least 2"),
        ("num_kv_pages", 0, r"num_kv_pages=0 must be at least 1; null takes"),
        ("gpu_memory_utilization", 1.5, r"gpu_memory_utilization=1.5 must be above 0 and at most"),
        ("gpu_memory_utilization", float("nan"), r"gpu_memory_utilization=nan must be"),
        ("trust_remote_code", True, r"trust_remote_code=True must be false"),
        ("seed", -1, r"seed=-1 must be in 0"),
        ("input", 7, r"input=7 must be a string or null; put it in quotes"),
        ("model", "", r"model='' must be not empty; set it to a folder"),
        ("model", None, r"model is not set; set it to a folder"),
        (
            "max_num_batched_tokens",
            8,
            r"max_num_batched_tokens=8 must be at least max_num_seqs=256",
        ),
        ("sampling", 3, r"sampling=3 must hold keys"),
        ("sampling.temperature", -1, r"sampling.temperature=-1.0 must be"),
        ("sampling.n", "x", r"sampling.n='x' must be an integer"),
    ],
)
def test_a_bad_value_names_key_value_limit_and_remedy(key, value, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_mapping({"model": "m", key: value})


def test_the_constructor_checks_as_well():
    with pytest.raises(ConfigError, match="pool_size=0"):
        EngineConfig(model="m", pool_size=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pool_size", 2, "pool_host_layers=3 is for one GPU, and pool_size x .* is 2; set it to 0"),
        ("tensor_parallel_size", 2, "is for one GPU"),
        ("mode", "cas", "needs mode=was or auto, got 'cas'"),
        ("mode", "replicated", "needs mode=was or auto, got 'replicated'"),
        ("resident_layers", 1, "needs resident_layers=0, got 1"),
        ("was_fetch", "collective", "needs was_fetch=copies or auto, got 'collective'"),
        ("layer_loop", "scan", "needs layer_loop=unrolled or auto, got 'scan'"),
    ],
)
def test_layers_of_the_host_are_for_one_gpu_that_fetches_them(key, value, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="m", pool_host_layers=3, **{key: value})


def test_copies_take_whole_arrays():
    with pytest.raises(ConfigError, match="was_fetch='copies' needs layer_loop=unrolled or auto"):
        EngineConfig(model="m", pool_size=2, was_fetch="copies", layer_loop="scan")


@pytest.mark.parametrize("override", ["mode", "=was", ""])
def test_an_override_needs_its_form(tmp_path, override):
    with pytest.raises(ConfigError, match="key=value"):
        load_config(write(tmp_path, "model: m"), [override])


def test_an_override_that_is_not_yaml(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "model: m"), ["sampling.stop=[a"])


@pytest.mark.parametrize("text", ["- a\n- b", "just text", "1: 2", "model: [unclosed"])
def test_a_file_that_is_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(write(tmp_path, text))


def test_a_bare_name_is_found_here_first_and_then_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("tiny.yaml") == CONFIG_FOLDER / "tiny.yaml"
    (tmp_path / "tiny.yaml").write_text("model: mine")
    assert load_config("tiny.yaml").model == "mine"
    with pytest.raises(ConfigError, match=r"qwen72b\.yaml"):
        find_config("tony.yaml")
    with pytest.raises(ConfigError, match=r"no config file"):
        find_config("elsewhere/qwen72b.yaml")


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    config = load_config(path)
    assert config.output is not None
    assert config.pool_size == 8


def test_package_paths_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    before = load_config("tiny.yaml").model_path
    monkeypatch.chdir(tmp_path)
    config = load_config("tiny.yaml")
    assert config.model_path == before
    assert config.model_path.is_absolute()
    assert config.output_path == Path("outputs/tiny.jsonl")
    assert resolve_path("~/x") == Path.home() / "x"


def test_importing_host_modules_does_not_import_jax():
    modules = "config, fingerprint, job, llm, progress, responses, results, rows, run, startup"
    code = (
        f"import sys; from sidp_jax import {modules}, tokenizer; "
        "print(sorted({'jax', 'transformers', 'flax'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
