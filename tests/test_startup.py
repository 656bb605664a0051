import os
import subprocess
import sys

import pytest
from fakes import make_model_folder

from sidp_jax import startup
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.mesh import xla_flags
from sidp_jax.startup import check, count_gpus, resolve_platform, start_jax

VARIABLES = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "JAX_COMPILATION_CACHE_DIR",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
)


@pytest.fixture
def folder(tmp_path):
    return make_model_folder(tmp_path / "model")


def config(folder, **keys):
    return EngineConfig(model=str(folder), **{"platform": "cpu", "pool_size": 8, **keys})


def test_nothing_is_missing(folder):
    check(config(folder))


def test_a_missing_model_and_missing_gpus_are_named_in_one_message(monkeypatch):
    monkeypatch.setattr(startup, "count_gpus", lambda: 2)
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(ConfigError) as info:
        check(config("nowhere", platform="gpu"), job=True)
    message = str(info.value)
    assert "no folder" in message
    assert "set model=" in message
    assert "needs 8 GPUs, and this machine shows 2; set their product" in message
    assert "set input=" in message
    assert "set output=" in message


def test_every_pool_needs_its_own_gpus(folder, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(startup.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(startup, "count_gpus", lambda: 6)
    keys = {"platform": "gpu", "pool_size": 1, "tensor_parallel_size": 2}
    check(config(folder, num_pools=3, **keys))
    with pytest.raises(ConfigError, match=r"num_pools=4.* needs 8 GPUs.*shows 6"):
        check(config(folder, num_pools=4, **keys))


def test_visible_gpus_are_those_that_the_environment_names(monkeypatch, tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(startup, "Path", lambda _: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert startup.visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    assert startup.visible_gpus() == ["2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert startup.visible_gpus() == []


def test_an_incomplete_model_folder(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors.*load_format=dummy"):
        check(config(folder))
    check(config(folder, load_format="dummy"))
    (folder / "orbax").mkdir()
    check(config(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        check(config(folder))


def test_a_model_that_is_not_supported(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("Qwen3ForCausalLM", "MambaForCausalLM"))
    with pytest.raises(ConfigError, match="MambaForCausalLM"):
        check(config(folder))
    (folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="model="):
        check(config(folder))


def test_a_pool_larger_than_the_model(folder):
    with pytest.raises(ConfigError, match=r"pool_size=9.*8 layers"):
        check(config(folder, pool_size=9))


def test_more_layers_on_the_host_than_the_model_has(folder):
    with pytest.raises(ConfigError, match=r"pool_host_layers=9 must be at most the model's 8"):
        check(config(folder, pool_size=1, pool_host_layers=9))


def test_the_output_must_not_be_the_input(folder, tmp_path):
    path = tmp_path / "in.jsonl"
    path.touch()
    with pytest.raises(ConfigError, match="is the input file"):
        check(config(folder, input=str(path), output=str(path)), job=True)
    with pytest.raises(ConfigError, match="there is no file"):
        check(config(folder, input=str(path) + "x", output=str(path)), job=True)


@pytest.mark.parametrize(
    ("platform", "environment", "gpus", "want"),
    [
        ("cpu", "cuda", 8, "cpu"),
        ("gpu", "", 0, "gpu"),
        ("auto", "", 8, "gpu"),
        ("auto", "", 0, "cpu"),
        ("auto", "cpu", 8, "cpu"),
        ("auto", "cuda,cpu", 0, "gpu"),
    ],
)
def test_platform(monkeypatch, platform, environment, gpus, want):
    monkeypatch.setenv("JAX_PLATFORMS", environment)
    monkeypatch.setattr(startup, "count_gpus", lambda: gpus)
    assert resolve_platform(platform) == want


@pytest.mark.parametrize(
    ("visible", "want"), [(None, 3), ("0,1", 2), ("", 0), ("-1", 0), ("0,1,2,3,4", 3)]
)
def test_gpus_are_counted_without_jax(monkeypatch, tmp_path, visible, want):
    for name in ("nvidia0", "nvidia1", "nvidia12", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(startup, "Path", lambda path: tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus() == want


def python(code, **environment):
    """Runs code in a fresh process; what it prints."""
    inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


START = """
import os
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.startup import start_jax
try:
    start_jax(EngineConfig(model="m", pool_size=4, platform="cpu"))
except ConfigError as error:
    print(error)
else:
    import jax
    print(len(jax.devices()), jax.config.jax_compilation_cache_dir, os.environ["XLA_FLAGS"])
"""


def test_a_fresh_process_gets_its_devices(tmp_path):
    devices, cache, flags = python(START, XDG_CACHE_HOME=str(tmp_path)).split(" ")
    assert devices == "4"
    assert cache == str(tmp_path / "sidp_jax" / "xla")
    assert flags == "--xla_force_host_platform_device_count=4"


def test_what_the_user_has_set_stays(tmp_path):
    flags = "--xla_force_host_platform_device_count=5 --xla_cpu_multi_thread_eigen=false"
    output = python(START, JAX_COMPILATION_CACHE_DIR=str(tmp_path), XLA_FLAGS=flags)
    assert output == f"5 {tmp_path} {flags}"


def test_passes_that_the_user_disables_on_a_gpu_stay(monkeypatch):
    flag = "--xla_disable_hlo_passes=algsimp"
    monkeypatch.setenv("XLA_FLAGS", flag)
    startup._add_xla_flags(xla_flags("gpu", 8))
    words = os.environ["XLA_FLAGS"].split()
    assert words[0] == flag
    assert sum(word.startswith("--xla_disable_hlo_passes") for word in words) == 1
    assert len(words) == len(xla_flags("gpu", 8))
    monkeypatch.delenv("XLA_FLAGS")
    startup._add_xla_flags(xla_flags("gpu", 8))
    assert "--xla_disable_hlo_passes=rematerialization" in os.environ["XLA_FLAGS"].split()


def test_too_few_devices_by_the_users_own_flags():
    output = python(START, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert "need 4 devices of that platform, but jax runs with 2 (cpu); unset" in output


def test_jax_imported_before_but_not_used(tmp_path):
    output = python("import jax\n" + START, XDG_CACHE_HOME=str(tmp_path))
    assert output.startswith(f"4 {tmp_path}")


def test_jax_used_before():
    output = python("import jax; jax.devices()\n" + START)
    assert "jax runs with 1 (cpu); jax was in use before" in output
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=4" in output


def test_enough_devices_in_this_process(folder):
    start_jax(config(folder, pool_size=2))
    with pytest.raises(ConfigError, match="need 99 devices"):
        start_jax(config(folder, pool_size=99))
