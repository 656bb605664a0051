"""``python -m sidp_jax.convert --model FOLDER --output FOLDER [key=value ...]``.

Writes a Hugging Face checkpoint as a pooled Orbax checkpoint, with its config and tokenizer, in a
folder that ``model`` may then name. It restores onto any pool size, whatever it was made with.

Keys: ``pool_size`` (1) and ``tensor_parallel_size`` (1) say over how many devices the weights are
spread meanwhile; together these need room for the whole model. ``platform`` (cpu) is where, and
``dtype`` the type to store: by default bfloat16 if the checkpoint is all bfloat16, else float32.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.pool import PoolLayout
from sidp_jax.safetensors_files import CheckpointError, find_tensors
from sidp_jax.startup import check, start_jax

logger = logging.getLogger("sidp_jax.convert")  # __name__ is __main__ with -m

KEYS = ("pool_size", "tensor_parallel_size", "dtype", "platform")

# What goes along with the weights: config, tokenizer, chat template; not weights or their index.
_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model")
_INDEX_SUFFIX = ".index.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code: 0, 1 for a failure, 2 for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m sidp_jax.convert",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--output", required=True, type=Path, help="folder to write; new or empty")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=", ".join(KEYS))
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sidp_jax").setLevel(logging.INFO)  # ours, not what orbax tells
    try:
        config = _config(parsed.model, parsed.overrides)
        check(config)
        start_jax(config)
        convert(config, parsed.output)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def convert(config: EngineConfig, output: Path) -> None:
    """Converts the model of a config, on the devices that jax has.

    Args:
        config: Its ``model``, ``pool_size``, ``tensor_parallel_size`` and ``dtype`` are used.
        output: Folder to write; new or empty.

    Raises:
        ConfigError: ``output`` has files in it, or is the model's own folder.
        CheckpointError: The checkpoint is incomplete or damaged.
    """
    # Imported here: jax must not start before `main` has set the number of devices.
    from sidp_jax.checkpoint import ORBAX_FOLDER, load_weights
    from sidp_jax.pooled_checkpoint import save_pooled

    source = config.model_path
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} is not empty; name a new folder, or empty it")
    model = ModelConfig.from_pretrained(source)
    layout = PoolLayout(model.num_layers, config.pool_size)
    mesh = make_mesh(config.pool_size, config.tensor_parallel_size)
    weights = load_weights(
        source,
        model,
        layout,
        mesh,
        dtype=config.dtype,
        layer_loop="unrolled",
        load_format="safetensors",
    )
    output.mkdir(parents=True, exist_ok=True)
    for file in _companions(source):
        shutil.copyfile(file, output / file.name)
    # Last: a folder with weights is a complete one.
    save_pooled(output / ORBAX_FOLDER, model, layout, mesh, weights)
    logger.info("wrote %s", output)


def _config(model: str, overrides: Sequence[str]) -> EngineConfig:
    values = {"model": model, "platform": "cpu"}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or key not in KEYS:
            raise ConfigError(f"{override!r} must be key=value with one of {', '.join(KEYS)}")
        values[key] = yaml.safe_load(value)
    config = EngineConfig.from_mapping({"dtype": "float32", **values})
    if "dtype" not in values and config.model_path.is_dir():
        stored = {str(tensor.dtype) for tensor in find_tensors(config.model_path).values()}
        if stored == {"bfloat16"}:
            config = EngineConfig.from_mapping({"dtype": "bfloat16", **values})
    return config


def _companions(folder: Path) -> list[Path]:
    files = {file for pattern in _COMPANIONS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in files if not file.name.endswith(_INDEX_SUFFIX))


if __name__ == "__main__":
    sys.exit(main())
