"""Starts jax on one GPU that takes itself for one of several, and what that calls for.

Collectives do nothing there, and arrays have one shard in reach. The same benchmark also runs on
virtual CPU devices, where nothing is mocked, and compiles for GPUs that are not there.
"""

from __future__ import annotations

import argparse
import os
from functools import cache

import jax
import jax.numpy as jnp

from sidp_jax import aot, step
from sidp_jax.config import EngineConfig
from sidp_jax.hardware import Hardware, profile_for
from sidp_jax.startup import start_jax


def start(options: argparse.Namespace) -> tuple[list, str, str]:
    """Starts jax.

    Returns:
        The devices of the node, the name of the hardware profile, and what the figures are.
    """
    count = options.pool_size
    if options.platform == "aot":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        devices = aot.compile_only_devices(options.hardware, count)
        return devices, options.hardware, f"compiled for {count} x {options.hardware}, not run"
    if options.platform == "gpu":
        jax.config.update("jax_mock_gpu_topology", f"1x{count}x1")
        step.embedded = local_embedding
        # Else compilation waits for the autotuning of processes that do not exist.
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_shard_autotuning=false".strip()
    start_jax(
        EngineConfig(
            model="unused",
            pool_size=count,
            platform=options.platform,
            gpu_memory_utilization=options.gpu_memory_utilization,
        )
    )
    device = jax.local_devices()[0]
    name = options.hardware or profile_for(device.device_kind, device.platform)
    if options.platform == "cpu":
        return jax.devices(), name, f"{count} virtual CPU devices, nothing mocked: no performance"
    if len(jax.local_devices()) != 1 or len(jax.devices()) != count:
        raise RuntimeError(
            f"one real GPU of {count} was expected, jax has {jax.local_devices()} of "
            f"{jax.devices()}; show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    what = (
        f"measured on one {device.device_kind} as one of {count}: collectives are mocked and take "
        "no time, tokens are meaningless and embedded from this GPU's part of the vocabulary; "
        "columns with the link take its time from the profile"
    )
    return sorted(jax.devices(), key=lambda other: other != device), name, what


def local_embedding(context, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    """Stands for ``forward.embedded``: tokens of this device's part of the vocabulary, for all.

    The sum over the parts would be a mocked collective, which leaves whatever its result's memory
    held: soon NaN, and products of NaN take less power and less time than those of numbers.
    """
    return embedding[tokens % embedding.shape[0]]


def usable_bytes(options: argparse.Namespace, hardware: Hardware) -> int:
    """Bytes of one device that may be used."""
    share = options.gpu_memory_utilization
    if options.memory_gb:
        return int(options.memory_gb * 1e9 * share)
    if options.platform == "aot":
        return int(hardware.memory_bytes * share)
    if options.platform == "cpu":
        raise ValueError("platform=cpu needs --memory-gb, what a virtual device may take")
    # jax tells only the share of the memory that it took.
    limit = jax.local_devices()[0].memory_stats()["bytes_limit"]
    taken = float(os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"])
    return int(min(limit, limit / taken * share))


def randomize_free_memory(nbytes: int, dtype: jnp.dtype) -> None:
    """Leaves small random numbers where a program's temporaries will lie.

    A mocked collective leaves its result as it finds it, and GEMMs are faster on zeros.
    """
    block = jax.random.uniform(jax.random.key(0), (2**20,), dtype, -1e-3, 1e-3)
    repeats = max(1, nbytes // block.nbytes)
    filled = jax.jit(lambda block: jnp.tile(block, repeats))(block)
    jax.block_until_ready(filled).delete()


def finite_share(keys: jax.Array) -> float:
    """Share of finite values among the first page's keys of the last layer, on this device."""
    local = keys.addressable_shards[0].data
    return float(_finite(local))


@cache
def _finite_program() -> jax.stages.Wrapped:
    return jax.jit(lambda keys: jnp.isfinite(keys[0, -1, :, 0]).mean())


def _finite(keys: jax.Array) -> jax.Array:
    return _finite_program()(keys)
