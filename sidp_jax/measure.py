"""Times this machine: the hardware profile of ``hardware: measure``, in seconds of measurements.

Copy, the dense part of one decoder layer at the token ladder, attention where the device has the
kernels, the copy from the host's memory, and the link where there is more than one device. What
could not be measured here is said in the profile's ``assumptions``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from math import ceil, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sidp_jax.estimate import layer_shape
from sidp_jax.hardware import Hardware, LayerTimes, load_profile, profile_for
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kernels.self_check import KernelError, require_hopper
from sidp_jax.models.config import ModelConfig
from sidp_jax.weights import HOST_MEMORY

TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_CPU_TOKENS = (1, 16, 64, 256)
_CPU_LAYER_BYTES = 4 << 20
_CACHE_BYTES = 256 << 20
"""GPU weights that are timed together are at least as many, so that no cache holds them."""

_PAGE = 64
_REPEATS = 3


def measure_hardware(model: ModelConfig, tensor_size: int, dtype: str) -> Hardware:
    """Times the devices of this process.

    Args:
        model: Its layers' shapes are timed; on the CPU in a smaller copy.
        tensor_size: Devices of one replica, which share a layer out.
        dtype: ``bfloat16`` or ``float32``.

    Returns:
        A profile named ``measure``.
    """
    device = jax.devices()[0]
    on_gpu = device.platform != "cpu"
    kind = jnp.dtype(dtype)
    copy = _copy_bandwidth((1 << 30) if on_gpu else (16 << 20))
    times = _layer_times(model, tensor_size, kind, on_gpu)
    rates = [t * times.flops_per_token / (ms / 1e3) for t, ms in times.milliseconds]
    link, assumed = _link(device)
    host = host_bandwidth(device, (1 << 30) if on_gpu else (16 << 20))
    attention, missing = _attention(model, tensor_size, kind, device)
    in_steps, told = _in_steps(device)
    assumptions = [*assumed, *missing, *told]
    if not on_gpu:
        assumptions.append(f"the layer timed is a copy of {times.weight_bytes / 1e6:.1f} MB")
    return Hardware(
        name="measure",
        flops=max(rates),
        memory_bandwidth=max(copy, times.weight_bytes / (times.milliseconds[0][1] / 1e3)),
        memory_bytes=_memory_bytes(device),
        host_bandwidth=host,
        layer_ms=(times,),
        source=f"measured on {jax.device_count()} x {device.device_kind} with jax {jax.__version__}"
        + f", layers of {model.architecture} in {dtype}",
        assumptions="; ".join(assumptions),
        **link,
        **attention,
        **in_steps,
    )


def seconds_of(function: Callable[..., Any], *arguments: Any, calls: int = 4) -> float:
    """Seconds of one call, the best of a few rounds of calls in a row.

    Args:
        function: Launches work on the devices and returns what to wait for.
        arguments: What it is called with.
        calls: Calls of a round; none is waited for but the last.
    """
    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        results = [function(*arguments) for _ in range(calls)]
        jax.block_until_ready(results)
        rounds.append((time.perf_counter() - start) / calls)
    return min(rounds)


def _copy_bandwidth(nbytes: int) -> float:
    """Bytes/s, read plus written."""
    block = jnp.ones(nbytes // 4, jnp.float32)
    return 2 * nbytes / seconds_of(jax.jit(lambda x: x + 1), block)


def host_bandwidth(device: jax.Device, nbytes: int) -> float:
    """Bytes/s of a copy of so many bytes from the host's pinned memory to a device."""
    here = SingleDeviceSharding(device)
    pinned = jax.device_put(np.ones(nbytes, np.int8), here.with_memory_kind(HOST_MEMORY))
    return nbytes / seconds_of(lambda: jax.device_put(pinned, here))


def _layer_times(model: ModelConfig, tensor_size: int, dtype: np.dtype, on_gpu: bool) -> LayerTimes:
    """The four projections of a layer on one device, one after another, at the token ladder."""
    shape = layer_shape(model, tensor_size, dtype.itemsize)
    scale = 1.0 if on_gpu else min(1.0, sqrt(_CPU_LAYER_BYTES / shape.weight_bytes))
    hidden, qkv, attended, ffn = (
        max(16, int(size * scale) // 16 * 16)
        for size in (
            model.hidden_size,
            shape.qkv_bytes // dtype.itemsize,
            shape.attended_bytes // dtype.itemsize,
            model.intermediate_size // tensor_size,
        )
    )
    sizes = [(qkv, hidden), (hidden, attended), (2 * ffn, hidden), (hidden, ffn)]
    values = sum(a * b for a, b in sizes)
    nbytes = values * dtype.itemsize
    rows = ceil(_CACHE_BYTES / nbytes) if on_gpu else 1
    layers = [[_random(size, dtype) for size in sizes] for _ in range(rows)]

    def layer(x: jax.Array, weights: list[jax.Array]) -> jax.Array:
        into, out, gate_up, down = weights
        x = x + (x @ into.T)[:, :attended] @ out.T
        gate, up = jnp.split(x @ gate_up.T, 2, axis=1)
        return x + (jax.nn.silu(gate) * up) @ down.T

    def run(x: jax.Array, layers: list[list[jax.Array]]) -> jax.Array:
        for weights in layers:
            x = layer(x, weights)
        return x

    points = []
    for tokens in TOKENS if on_gpu else _CPU_TOKENS:
        x = _random((tokens, hidden), dtype)
        points.append((float(tokens), 1e3 * seconds_of(jax.jit(run), x, layers) / rows))
    return LayerTimes(float(nbytes), 2.0 * values, tuple(points))


def _random(shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    """Values in +-1e-2: the speed of a GPU's products depends on them. Quick to compile, too."""
    key = jax.random.key(0, impl="rbg")
    return jax.random.uniform(key, shape, dtype, -1e-2, 1e-2)


def _link(device: jax.Device) -> tuple[dict[str, float], list[str]]:
    """Bandwidth into one device of a gather and of a permutation, and a collective's latency."""
    count = jax.device_count()
    if count == 1:
        try:
            known = load_profile(profile_for(device.device_kind, device.platform))
        except ValueError as error:
            raise ValueError(
                f"{error}; hardware=measure times the link only where there is more than one device"
            ) from None
        figures = {
            "link_bandwidth": known.link_bandwidth,
            "hop_latency": known.hop_latency,
            "permute_bandwidth": known.permute_bandwidth,
            "copy_bandwidth": known.copy_bandwidth,
        }
        return figures, [f"the link, of which one device shows nothing, is that of {known.name}"]
    mesh = Mesh(np.array(jax.devices()), ("pool",))
    mapped = partial(
        jax.shard_map, mesh=mesh, in_specs=P("pool"), out_specs=P("pool"), check_vma=False
    )
    ring = [(i, (i + 1) % count) for i in range(count)]
    permute = jax.jit(mapped(lambda x: jax.lax.ppermute(x, "pool", ring)))
    gather = jax.jit(mapped(lambda x: jax.lax.all_gather(x, "pool", tiled=True)))
    size = 64 << 20 if device.platform != "cpu" else 1 << 18
    where = NamedSharding(mesh, P("pool"))
    small, large = (
        jax.device_put(np.ones(n, np.float32), where) for n in (count * 64, count * size // 4)
    )
    latency = seconds_of(permute, small)
    moved = max(seconds_of(permute, large) - latency, latency / 10)
    gathered = max(seconds_of(gather, large) - latency, latency / 10)
    figures = {
        "link_bandwidth": size * (count - 1) / gathered,
        "permute_bandwidth": size / moved,
        "copy_bandwidth": copy_bandwidth(size) if device.platform != "cpu" else 0.0,
        "hop_latency": latency,
    }
    return figures, []


def _in_steps(device: jax.Device) -> tuple[dict[str, float], list[str]]:
    """What the link costs inside of steps, which takes steps of a whole pool to measure."""
    try:
        known = load_profile(profile_for(device.device_kind, device.platform))
    except ValueError:
        return {}, ["a fetch is taken not to disturb the compute above it"]
    figures = {
        "fetch_interference": known.fetch_interference,
        "copy_interference": known.copy_interference,
        "permute_latency": known.permute_latency,
    }
    costs = "what a fetch costs the compute above it, and the latency of a permutation in a step"
    return figures, [f"{costs}, are those of {known.name}"]


def copy_bandwidth(nbytes: int) -> float:
    """Bytes/s of copies of so many bytes from every device to the next, all at once."""
    devices = jax.devices()
    held = [jax.device_put(np.ones(nbytes, np.int8), device) for device in devices]
    onward = [*devices[1:], devices[0]]
    return nbytes / seconds_of(lambda: list(map(jax.device_put, held, onward)))


def _attention(
    model: ModelConfig, tensor_size: int, dtype: np.dtype, device: jax.Device
) -> tuple[dict[str, Any], list[str]]:
    """Rates of decode and prefill by the Hopper kernels."""
    try:
        require_hopper(device)
    except KernelError:
        return {}, ["attention runs at the rates of the copy and of the products"]
    if dtype != jnp.bfloat16:
        return {}, ["attention, timed in bfloat16 alone, runs at the rates of copy and products"]
    heads, kv_heads = model.num_heads // tensor_size, model.num_kv_heads // tensor_size
    seconds = partial(_attention_seconds, heads, kv_heads, model.head_dim)
    read = 128 * 4096 * kv_heads * model.head_dim * 2 * dtype.itemsize
    prefill = {
        context: count * 2 * heads * model.head_dim * context**2 / seconds(count, context, context)
        for count, context in ((16, 1024), (4, 4096), (1, 16384))
    }
    figures = {
        "decode_bandwidth": read / seconds(128, 1, 4096),
        "prefill_flops": tuple((float(c), rate) for c, rate in sorted(prefill.items())),
    }
    return figures, []


def _attention_seconds(
    heads: int, kv_heads: int, head_dim: int, count: int, queries: int, context: int
) -> float:
    """One call for ``count`` rows of so many queries at the end of so long a context."""
    pages = ceil(context / _PAGE)
    shape = (1, kv_heads, count * pages, _PAGE, head_dim)
    k, v = _random(shape, jnp.dtype("bfloat16")), _random(shape, jnp.dtype("bfloat16"))
    q = _random((count * queries, heads, head_dim), jnp.dtype("bfloat16"))
    run = jax.jit(partial(ragged_attention, scale=head_dim**-0.5, implementation="mosaic"))
    tables = jnp.arange(count * pages, dtype=jnp.int32).reshape(count, pages)
    starts = jnp.arange(count + 1, dtype=jnp.int32) * queries
    lengths = jnp.full(count, context, jnp.int32)
    return seconds_of(run, q, k, v, jnp.int32(0), tables, starts, lengths)


def _memory_bytes(device: jax.Device) -> float:
    """All that a process could use; 0 on the CPU, whose memory all virtual devices share."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    # jax itself tells only the share that it allocated.
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    return stats["bytes_limit"] / share if stats else 0.0
