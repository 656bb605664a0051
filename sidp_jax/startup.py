"""What has to be in place before jax starts: the checkpoint, the devices, the environment.

jax reads its environment once, when it is first imported and first asked for a device. So this
module decides everything without it, and then starts it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Literal

from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.estimate import layer_shape
from sidp_jax.mesh import xla_flags
from sidp_jax.models.config import ModelConfig
from sidp_jax.settle import DTYPE_BYTES, layout_of

logger = logging.getLogger(__name__)

Platform = Literal["cpu", "gpu"]

_CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
# jax preallocates this much more than the engine plans with, for what it cannot see.
_PREALLOCATION_MARGIN = 0.03
# With several GPUs it has to leave more: collectives allocate for themselves, outside of jax's
# share. On two H100s 0.95 of the memory left too little for the reductions of a replica.
_MARGIN_WITH_COLLECTIVES = 0.01
_PINNED_DEFAULT_GB = 64


def check(config: EngineConfig, *, job: bool = False) -> None:
    """Looks whether everything that a run needs is there, before anything is loaded.

    Args:
        config: What to run.
        job: Whether an input and an output file are needed, too.

    Raises:
        ConfigError: Something is missing; the message lists all of it, and what to set.
    """
    problems = [*_model_problems(config), *_device_problems(config)]
    if job:
        problems += _file_problems(config)
    if problems:
        raise ConfigError("\n".join(["this configuration cannot run here:", *problems]))


def _model_problems(config: EngineConfig) -> Iterator[str]:
    folder = config.model_path
    if not folder.is_dir():
        yield (
            f"- model={config.model!r}: there is no folder {folder.absolute()}; download the "
            "checkpoint and set model=/path/to/it, a folder with config.json, *.safetensors and "
            "tokenizer.json"
        )
        return
    try:
        model = ModelConfig.from_pretrained(folder)
        layout_of(config, model)
    except (ValueError, OSError) as error:
        yield f"- model={config.model!r}: {error}"
    if config.load_format != "dummy" and not any(_weight_files(folder)):
        yield (
            f"- model={config.model!r}: {folder.absolute()} holds no *.safetensors and no "
            "converted weights; download them, or set load_format=dummy for random ones"
        )


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")
    yield from folder.glob("orbax")


def _device_problems(config: EngineConfig) -> Iterator[str]:
    if resolve_platform(config.platform) == "cpu":
        return
    present, needed = count_gpus(), config.num_pools * config.num_devices
    if present < needed:
        yield (
            f"- num_pools={config.num_pools}, each of pool_size={config.pool_size} replicas, needs "
            f"{needed} GPUs, and this machine shows {present}; set their product to the number of "
            "GPUs, or platform=cpu for virtual devices"
        )
    if not any(importlib.util.find_spec(plugin) for plugin in _CUDA_PLUGINS):
        yield (
            "- platform=gpu needs jax's CUDA plugin, which is not installed; install the extra "
            "cuda12 or cuda13 of sidp-jax, or set platform=cpu"
        )
    user = os.environ.get("JAX_PLATFORMS", "")
    if user and not _is_gpu(user):
        yield f"- platform=gpu, but the environment has JAX_PLATFORMS={user}; unset one of them"


def _file_problems(config: EngineConfig) -> Iterator[str]:
    if config.input_path is None:
        yield "- input is not set; set input=requests.jsonl, a file with one request per line"
    elif not config.input_path.is_file():
        yield f"- input={config.input!r}: there is no file {config.input_path.absolute()}"
    if config.output_path is None:
        yield "- output is not set; set output=results.jsonl, the file to write"
    elif config.input_path is not None and config.output_path.absolute() == (
        config.input_path.absolute()
    ):
        yield f"- output={config.output!r} is the input file; set another one"


def resolve_platform(platform: str) -> Platform:
    """``cpu`` or ``gpu``; for ``auto`` JAX_PLATFORMS decides, or else whether there are GPUs."""
    if platform != "auto":
        return platform
    user = os.environ.get("JAX_PLATFORMS", "")
    if user:
        return "gpu" if _is_gpu(user) else "cpu"
    return "gpu" if count_gpus() else "cpu"


def visible_gpus() -> list[str]:
    """Names of the NVIDIA GPUs that this process may use, found without jax."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))
    if visible is None:
        return [str(number) for number in range(present)]
    return [name for name in visible.split(",") if name and name != "-1"][:present]


def count_gpus() -> int:
    """How many ``visible_gpus`` there are."""
    return len(visible_gpus())


def start_jax(config: EngineConfig) -> None:
    """Sets jax's environment, where the user has not set it, and starts jax.

    Sets JAX_PLATFORMS, XLA_FLAGS, JAX_COMPILATION_CACHE_DIR, XLA_PYTHON_CLIENT_MEM_FRACTION and,
    where layers lie on the host, XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB.

    Raises:
        ConfigError: jax cannot start, or had started before with other devices than needed.
    """
    platform = resolve_platform(config.platform)
    imported = "jax" in sys.modules
    # The CPU stays usable beside the GPUs, for arrays on the host.
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if platform == "gpu" else "cpu")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache_folder()))
    _add_xla_flags(xla_flags(platform, config.num_devices))
    if platform == "gpu":
        several = config.num_devices > 1
        margin = _MARGIN_WITH_COLLECTIVES if several else _PREALLOCATION_MARGIN
        fraction = min(config.gpu_memory_utilization + margin, 0.98)
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction:.2f}")
    if config.pool_host_layers:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(_pinned_gb(config)))

    import jax

    if imported:  # too late for the environment; not for these, as long as no device was used
        if jax.config.jax_platforms is None:
            jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
        if jax.config.jax_compilation_cache_dir is None:
            jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise ConfigError(
            f"jax cannot start on platform={platform}: {error}; look at the driver, or set "
            "platform=cpu"
        ) from error
    if devices[0].platform != platform or len(devices) < config.num_devices:
        raise ConfigError(
            f"platform={platform} and pool_size={config.pool_size} need {config.num_devices} "
            f"devices of that platform, but jax runs with {len(devices)} ({devices[0].platform})"
            + _remedy(platform, config.num_devices, imported)
        )


def _pinned_gb(config: EngineConfig) -> int:
    """Pinned memory that jax may take, in GB: the host's layers, and its default beside them."""
    model = ModelConfig.from_pretrained(config.model_path)
    layer = layer_shape(model, 1, DTYPE_BYTES[config.dtype]).weight_bytes
    return ceil(config.pool_host_layers * layer / 1e9) + _PINNED_DEFAULT_GB


def _remedy(platform: Platform, num_devices: int, imported: bool) -> str:
    if platform == "gpu":
        return "; lower pool_size, or look at CUDA_VISIBLE_DEVICES and JAX_PLATFORMS"
    flag = xla_flags("cpu", num_devices)[0]
    if imported:
        return (
            "; jax was in use before: build the engine first, or start Python with "
            f"JAX_PLATFORMS=cpu XLA_FLAGS={flag}"
        )
    return f"; unset JAX_PLATFORMS and XLA_FLAGS, or set JAX_PLATFORMS=cpu and XLA_FLAGS={flag}"


def _add_xla_flags(flags: list[str]) -> None:
    """Appends flags to XLA_FLAGS, those left out that the user has set to something."""
    present = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in present}
    added = [flag for flag in flags if flag.partition("=")[0] not in names]
    os.environ["XLA_FLAGS"] = " ".join([*present, *added])


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sidp_jax" / "xla"


def _is_gpu(jax_platforms: str) -> bool:
    return jax_platforms.split(",")[0] in ("cuda", "gpu")
