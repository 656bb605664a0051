"""Compiles the real step for a node of GPUs on a machine that has none.

The compiler gets a description of the GPU in place of the GPU. What comes out speaks of the target
at its real size: ``memory_analysis()``, and the schedule (``as_text()``; see ``timeline.py``).
Nothing is run, so nothing is said about time, and GEMM algorithms are not tuned.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from sidp_jax.batch import BatchLayout
from sidp_jax.copied_layers import CompiledCopiedForward
from sidp_jax.kv_cache import kv_cache_spec
from sidp_jax.mesh import make_mesh, xla_flags
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import COLLECTIVE
from sidp_jax.pool import PoolLayout
from sidp_jax.step import StepProgram
from sidp_jax.weights import LayerLoop, weights_spec

_PACKAGES = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-runtime-cu12", "absl-py")

_PREALLOCATED = 0.95


@dataclass(frozen=True)
class Target:
    """What the compiler is told about one GPU: the fields of its target configuration that differ.

    Attributes:
        description: The device's name, as CUDA gives it.
        compute_capability: Major and minor.
        cores: Streaming multiprocessors.
        shared_memory_per_core: Bytes of shared memory of one of them.
        shared_memory_per_block: Bytes of it that one block may use.
        l2_bytes: Bytes of the second-level cache.
        clock_ghz: Highest clock.
        memory_bandwidth: Bytes/s of device memory.
        memory_bytes: Bytes of device memory.
        source: Where the figures are from.
    """

    description: str
    compute_capability: tuple[int, int]
    cores: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    l2_bytes: int
    clock_ghz: float
    memory_bandwidth: int
    memory_bytes: int
    source: str

    @property
    def limit_bytes(self) -> int:
        """The memory that makes the compiler plan with as much as a process preallocates.

        With no allocator to ask, XLA takes 80% of a device's memory for the limit of a program,
        and beyond it puts fetches in sequence, or repeats them, to save memory.
        """
        return int(self.memory_bytes * _PREALLOCATED / 0.8)

    @property
    def proto(self) -> str:
        """A ``GpuTargetConfigProto`` in text form."""
        major, minor = self.compute_capability
        return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {self.shared_memory_per_core} threads_per_core_limit: 2048
          core_count: {self.cores} fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {self.memory_bandwidth} l2_cache_size: {self.l2_bytes}
          clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.limit_bytes}
          shared_memory_per_block_optin: {self.shared_memory_per_block}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{self.description}"
        """


_LIMITS = "limits of compute capability {}: CUDA programming guide; "
_HOPPER = _LIMITS.format("9.0")

TARGETS = {
    "h100": Target(
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        cores=132,
        shared_memory_per_core=233472,
        shared_memory_per_block=232448,
        l2_bytes=50 << 20,
        clock_ghz=1.98,
        memory_bandwidth=3_350_000_000_000,
        memory_bytes=84_900_000_000,
        source=_HOPPER + "bandwidth: data sheet (SXM5); memory as in configs/hardware/h100.yaml",
    ),
    "h200": Target(
        "NVIDIA H200 141GB HBM3e",
        (9, 0),
        cores=132,
        shared_memory_per_core=233472,
        shared_memory_per_block=232448,
        l2_bytes=50 << 20,
        clock_ghz=1.98,
        memory_bandwidth=4_800_000_000_000,
        memory_bytes=151_397_597_184,
        source=_HOPPER + "bandwidth: data sheet (SXM)",
    ),
    "h20": Target(
        "NVIDIA H20",
        (9, 0),
        cores=78,
        shared_memory_per_core=233472,
        shared_memory_per_block=232448,
        l2_bytes=60 << 20,
        clock_ghz=1.98,
        memory_bandwidth=4_000_000_000_000,
        memory_bytes=102_000_000_000,
        source=_HOPPER + "bandwidth: data sheet; cores: as Geekbench 6 reported them; cache and "
        "clock: no public source found; memory as in configs/hardware/h20.yaml",
    ),
    "b200": Target(
        "NVIDIA B200",
        (10, 0),
        cores=148,
        shared_memory_per_core=233472,
        shared_memory_per_block=232448,
        l2_bytes=126 << 20,
        clock_ghz=1.965,
        memory_bandwidth=8_000_000_000_000,
        memory_bytes=191_500_000_000,
        source=_LIMITS.format("10.0") + "bandwidth: data sheet; memory as in "
        "configs/hardware/b200.yaml; cores: Chips and Cheese, 'Nvidia's B200' (74 on each die); "
        "cache and clock: public sources differ",
    ),
}
"""The GPUs that programs can be compiled for, by the names of the hardware profiles."""


def compile_only_devices(hardware: str, count: int) -> list:
    """Devices of one node that exist for the compiler alone.

    Call it before jax has looked for devices, in a process with ``JAX_PLATFORMS=cpu``.

    Args:
        hardware: A key of ``TARGETS``.
        count: Devices of the node.

    Raises:
        ValueError: There is no such target.
        RuntimeError: A package is missing, or does not fit the version of jax.
    """
    if hardware not in TARGETS:
        raise ValueError(f"{hardware=} cannot be compiled for; known: {', '.join(sorted(TARGETS))}")
    _check_packages()
    # The plugin asks for the CUDA libraries, which compilation does not need.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    topology = topologies.get_topology_desc(
        f"{hardware}x{count}",
        platform="cuda",
        target_config=TARGETS[hardware].proto,
        topology=f"1x1x{count}",
    )
    return list(topology.devices)


def _check_packages() -> None:
    missing = []
    for package in _PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            missing.append(package)
            continue
        if package.startswith("jax-") and found != jax.__version__:
            raise RuntimeError(
                f"{package} {found} does not fit jax {jax.__version__}; install "
                f"'{package}=={jax.__version__}'"
            )
    if missing:
        raise RuntimeError(
            f"compiling for GPUs that this machine lacks needs {', '.join(missing)}: "
            "pip install -c constraints.txt 'sidp-jax[aot]'"
        )


def compile_forward(
    model_config: ModelConfig,
    hardware: str,
    pool_size: int,
    mode: str,
    tokens: int,
    *,
    num_kv_pages: int,
    layer_loop: LayerLoop = "unrolled",
    attention: str = "mosaic",
    tensor_size: int = 1,
    resident_layers: int = 0,
    was_fetch: str = COLLECTIVE,
    page_size: int = 64,
    max_num_seqs: int = 256,
    max_pages_per_seq: int = 64,
    max_num_batched_tokens: int | None = None,
    stop_ids: int = 17,
    dtype: str = "bfloat16",
) -> jax.stages.Compiled | CompiledCopiedForward:
    """Compiles the forward program of a step as a node of GPUs would run it.

    Args:
        model_config: The model's architecture; fewer layers than the model has compile sooner.
        hardware: A key of ``TARGETS``.
        pool_size: Replicas that share one copy of the layers.
        mode: A key of ``step.RUN_LAYERS``; ``replicated`` needs all layers resident, and gets them.
        tokens: Tokens of one replica in the step.
        num_kv_pages: Pages of one replica's cache. Take as many as the real run would have: what
            else fits beside the cache can change the schedule.
        layer_loop: ``unrolled``, as on GPUs, or ``scan``.
        attention: ``mosaic`` on Hopper; ``reference`` on a B200, for which there are no kernels.
        tensor_size: Devices of one replica.
        resident_layers: Layers that every replica keeps.
        was_fetch: How ``was`` fetches: ``collective``, or ``copies`` between several programs.
        page_size: Tokens of a page.
        max_num_seqs: Sequences of one replica.
        max_pages_per_seq: Pages of the longest sequence.
        max_num_batched_tokens: Tokens of the largest step; by default those of this one.
        stop_ids: Stop tokens of a sequence.
        dtype: Type of weights and cache.

    Raises:
        ValueError: The target is unknown, or has no such attention kernel.
        RuntimeError: A package is missing; the message says how to install it.
    """
    devices = compile_only_devices(hardware, pool_size * tensor_size)
    if attention == "mosaic" and TARGETS[hardware].compute_capability[0] != 9:
        raise ValueError(
            f"{attention=} has kernels for Hopper GPUs alone, not for {hardware=}; compile with "
            "attention='reference'"
        )
    layers = model_config.num_layers
    resident = layers if mode == "replicated" else resident_layers
    mesh = make_mesh(pool_size, tensor_size, devices=devices)
    layout = PoolLayout(layers, pool_size, resident)
    program = StepProgram(model_config, layout, mesh, attention, was_fetch)
    numbers = jnp.dtype(dtype)
    weights = weights_spec(model_config, layout, mesh, layer_loop=layer_loop, dtype=numbers)
    kv = kv_cache_spec(
        model_config, mesh, num_pages=num_kv_pages, page_size=page_size, dtype=numbers
    )
    batch, widest = (
        BatchLayout(count, max_num_seqs, max_pages_per_seq, stop_ids)
        for count in (tokens, max_num_batched_tokens or tokens)
    )
    last_tokens, buffer = (
        jax.ShapeDtypeStruct((pool_size, size), jnp.int32, sharding=program.per_replica())
        for size in (max_num_seqs, batch.size)
    )
    forward = program.forward(mode, batch, widest, weights)
    return forward.lower(weights, kv, last_tokens, buffer).compile(_compiler_options())


def _compiler_options() -> dict[str, bool | str]:
    """The flags of ``mesh.xla_flags``, for this compilation alone; those in XLA_FLAGS beat them."""
    words = {"true": True, "false": False}
    present = {flag.partition("=")[0] for flag in os.environ.get("XLA_FLAGS", "").split()}
    flags = (flag for flag in xla_flags("gpu", 1) if flag.partition("=")[0] not in present)
    pairs = (flag.removeprefix("--").split("=") for flag in flags)
    return {name: words.get(value, value) for name, value in pairs}
