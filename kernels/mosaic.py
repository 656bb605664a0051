"""What the Mosaic GPU kernels share: how one is built, and the version trap they avoid."""

import functools
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import nvvm


def gpu_kernel(
    body: Callable[..., None],
    *,
    name: str,
    grid: int,
    scratch: Sequence[Any],
    out_type: Sequence[Any] = (),
    warpgroups: int = 1,
    cluster: int = 1,
    reduction_bytes: int = 0,
    interpret: Any = None,
) -> Callable[..., Any]:
    """Build a kernel over a line of thread blocks, called "block"; its threads are "wg".

    With `cluster` above 1, "block" counts clusters of so many blocks, and a block's place in its
    cluster is "cluster". Reductions over a whole array need `reduction_bytes` of shared memory;
    those along the rows of an accumulator, which lie within four lanes, need none.

    The same as `plgpu.kernel` without its rule for `vmap`, which in jax 0.10 loses the effect on a
    mutable array that is passed in. Arguments may be such arrays (`in_place`); they are written in
    place. Inside `jax.shard_map` these kernels need `check_vma=False`.
    """
    threads = {} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "wg"}
    clusters = {} if cluster == 1 else {"cluster": (cluster,), "cluster_names": ("cluster",)}
    mesh = plgpu.Mesh(grid=(grid,), grid_names=("block",), **threads, **clusters)

    def scoped(*refs):
        axes = "wg" if warpgroups > 1 else ()
        pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes=axes)

    return pl.kernel(
        scoped,
        out_type=tuple(out_type),
        mesh=mesh,
        name=name,
        interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=reduction_bytes,
        ),
    )


def load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of all of `ref`, as its swizzle allows.

    It wants an index in jax 0.10, which 0.11 deprecates: index with `ref.at` instead.
    """
    return plgpu.load(ref, *_WHOLE, layout=layout, optimized=False)


_WHOLE = ((),) if signature(plgpu.load).parameters["idx"].default is Parameter.empty else ()


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory whose rows of 128 bytes are swizzled: no bank conflicts in `wgmma`'s layout."""
    line = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def in_place(x: jax.Array, *, interpret: bool) -> Any:
    """A mutable array that starts as `x`, for a kernel to write into.

    XLA gives it the memory of `x` if nothing else reads `x` later. The interpreter wants to know
    the memory space, which the compiled path does not take.
    """
    return jax.new_ref(x, memory_space=plgpu.GMEM) if interpret else jax.new_ref(x)


def raise_flag(flag: Any, *, interpret: bool) -> None:
    """Set an int32 in global memory, which is 0, to 1: what this warpgroup has written is there.

    Results of copies from shared memory count as written once they have been waited for.
    """
    if interpret:
        flag[...] = jnp.int32(1)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, ref):
        mgpu.SemaphoreRef(mgpu.utils.memref_ptr(ref)).signal(1, memory_scope="gpu")

    signal(flag)


def await_flag(flag: Any, *, interpret: bool) -> None:
    """Wait until `raise_flag`; then the warpgroup sees, and may copy, what was written before."""
    if interpret:
        lax.while_loop(lambda value: value == 0, lambda _: flag[...], flag[...])
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def wait(_, ref):
        semaphore = mgpu.SemaphoreRef(mgpu.utils.memref_ptr(ref))
        semaphore.wait(1, decrement=False, memory_scope="gpu")
        nvvm.fence_proxy(nvvm.ProxyKind.async_)  # copies read past the caches' usual order

    wait(flag)
