"""The device mesh, what lies on which axis, and the XLA flags that the modes rely on.

Importing this module does not import jax, since the flags must be set before jax starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh, PartitionSpec

POOL = "pool"
TENSOR = "tensor"

# Which mesh axis each logical parameter axis lies on; other logical axes are not sharded.
PARAMETER_AXES = {"kv_heads": TENSOR, "ffn": TENSOR}

# Without these, XLA copies every layer's slice of a stacked weight before its GEMMs, and runs
# the fetches of a layer one after another in front of the compute instead of beneath it. XLA's
# rematerialization counts the donated cache twice, and repeats fetches to save what it thinks too
# much.
_GPU_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_experimental_parallel_collective_overlap_limit=4",
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_disable_hlo_passes=rematerialization",
)


def xla_flags(platform: str, num_devices: int) -> list[str]:
    """The flags that jax has to be started with.

    Args:
        platform: ``cpu`` or ``gpu``.
        num_devices: Devices of the mesh; virtual ones on the CPU.
    """
    if platform == "cpu":
        return [f"--xla_force_host_platform_device_count={num_devices}"]
    return list(_GPU_FLAGS)


def make_mesh(pool_size: int, tensor_size: int = 1, *, devices: list | None = None) -> Mesh:
    """A mesh with the axes ``pool`` and ``tensor`` over the first devices.

    Args:
        pool_size: Replicas that share one copy of the layers.
        tensor_size: Devices of one replica.
        devices: Devices to use; all of the process by default.

    Raises:
        ValueError: There are fewer devices than the mesh needs.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    devices = jax.devices() if devices is None else devices
    needed = pool_size * tensor_size
    if len(devices) < needed:
        raise ValueError(
            f"pool_size={pool_size} x tensor_parallel_size={tensor_size} needs {needed} devices, "
            f"but jax has {len(devices)} ({devices[0].platform}); lower pool_size, or for virtual "
            f"CPU devices set XLA_FLAGS={xla_flags('cpu', needed)[0]} before jax starts"
        )
    grid = np.asarray(devices[:needed]).reshape(pool_size, tensor_size)
    return Mesh(grid, (POOL, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


def parameter_partition(axes: tuple[str | None, ...], *leading: str | None) -> PartitionSpec:
    """Where a parameter lies: leading mesh axes, then those of its logical axes."""
    from jax.sharding import PartitionSpec

    return PartitionSpec(*leading, *(PARAMETER_AXES.get(axis) for axis in axes))
