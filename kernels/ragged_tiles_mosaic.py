"""What ragged decode and prefill share: how they are tuned, and the work on one tile of K and V.

A tile is copied page by page, multiplied with queries, and taken into the running softmax. The
functions are traced into the kernels that call them. Those with `interpret` have a second form for
the interpreter, which knows no layouts and takes no operand of a `wgmma` in registers.
"""

import dataclasses
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from sidp_jax.kernels.mosaic import swizzled

ROWS = 64  # rows of one wgmma
PREFILL_PRODUCTS = ("apart", "chained")
PREFILL_ORDERS = ("rows", "longest")
LOG2E = math.log2(math.e)
ROW_LAYOUT = plgpu.Layout.WGMMA.reduce(1)  # one number for each row of an accumulator


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        num_sms: streaming multiprocessors to fill (132 on H100 and H200).
        decode_streams: decode workers in one thread block; each is a producer and a consumer.
        decode_block_kv: keys of one decode tile.
        decode_stages: K tiles in a worker's ring; V, which is needed later, gets one less.
        prefill_block_kv: keys of one prefill tile.
        prefill_stages: tiles in the ring of a prefill block.
        prefill_products: how a prefill consumer multiplies. "apart": scores, softmax, values, one
            after the other; 1 to 2% faster where contexts are long. "chained": the values of a tile
            and the scores of the next at once, across items too; 15% faster for short prompts.
        prefill_order: "rows": row by row, the longest context first, and in a row head by head.
            "longest": the query tiles with the longest contexts first, of whatever row, with all
            their heads; so every block gets the same amount of work, within one tile.
    """

    num_sms: int = 132
    decode_streams: int = 2
    decode_block_kv: int = 64
    decode_stages: int = 3
    prefill_block_kv: int = 128
    prefill_stages: int = 2
    prefill_products: str = "chained"
    prefill_order: str = "longest"

    def __post_init__(self):
        if self.prefill_products not in PREFILL_PRODUCTS:
            raise ValueError(f"{self.prefill_products=} must be one of {PREFILL_PRODUCTS}")
        if self.prefill_order not in PREFILL_ORDERS:
            raise ValueError(f"{self.prefill_order=} must be one of {PREFILL_ORDERS}")
        for name in ("decode_block_kv", "prefill_block_kv"):
            if getattr(self, name) not in (64, 128, 256):
                raise ValueError(f"{name}={getattr(self, name)} must be 64, 128 or 256")
        if min(self.decode_stages, self.prefill_stages) < 2:
            raise ValueError(f"{self.decode_stages=} and {self.prefill_stages=} must be at least 2")
        if not 1 <= self.decode_streams <= 4:
            raise ValueError(f"{self.decode_streams=} must be between 1 and 4")

    @property
    def decode_workers(self) -> int:
        """Pieces that the decode work is cut into."""
        return self.num_sms * self.decode_streams


def cdiv(a, b: int):
    """Divide int32 `a`, rounding up."""
    return lax.div(a + (b - 1), jnp.int32(b))


def row_buffer(shape: tuple[int, ...], dtype, groups: int):
    """Shared memory for tiles of which `groups` rows are copied, swizzled where those are whole."""
    return swizzled(shape, dtype) if groups % 8 == 0 else plgpu.SMEM(shape, dtype)


def copy_tile(
    k_ref, v_ref, tables_ref, k_smem, v_smem, k_barrier, v_barrier, wait, *, at, empty=None
):
    """Start the loads of one tile of K and V, page by page.

    Pages past the context are not looked up: the last page is read again, and masked. A row
    without any context, where `empty` holds, gets the first page of all.
    """
    row, head_base, tile, last_page, block_kv, page_size = at
    chunk = min(page_size, block_kv)
    places = []
    for i in range(block_kv // chunk):
        position = tile * block_kv + i * chunk
        index = jnp.minimum(lax.div(position, jnp.int32(page_size)), last_page)
        offset = lax.rem(position, jnp.int32(page_size)) if page_size > block_kv else 0
        page = tables_ref[row, index]
        page = page if empty is None else jnp.where(empty, 0, page)
        places.append((head_base + page, offset))
    wait[0]()
    for i, (page, offset) in enumerate(places):
        source = k_ref.at[page, pl.ds(offset, chunk)]
        plgpu.copy_gmem_to_smem(source, k_smem.at[pl.ds(i * chunk, chunk)], k_barrier)
    wait[1]()
    for i, (page, offset) in enumerate(places):
        source = v_ref.at[page, pl.ds(offset, chunk)]
        plgpu.copy_gmem_to_smem(source, v_smem.at[pl.ds(i * chunk, chunk)], v_barrier)


def drain(step, stages: int, barriers, first=0):
    """Wait until the consumers have let go of every slot of a ring that was filled `step` times."""
    for i in range(stages):
        for barrier in barriers:
            pl.when(i < step)(
                lambda i=i, barrier=barrier: plgpu.barrier_wait(barrier.at[first + i])
            )


def scores(q, keys, block: int, started=lambda: None, *, interpret: bool):
    """Multiply q @ keys.T; calls `started` once the product is on its way."""
    if interpret:  # the interpreter's wgmma takes no operand in registers
        started()
        q = q if isinstance(q, jax.Array) else q[...]
        return jnp.dot(q, keys[...].T, preferred_element_type=jnp.float32)

    def scope(acc_ref):
        plgpu.wgmma(acc_ref, q, keys.transpose((1, 0)))
        started()
        return acc_ref[...]

    return pl.run_scoped(scope, plgpu.ACC((ROWS, block), jnp.float32))


def add_values(acc, weights, values, *, interpret: bool):
    """Return acc + weights @ values."""
    if interpret:
        return acc + jnp.dot(weights, values[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(plgpu.ACC.init(acc))


def filled(shape, value: float, *, interpret: bool):
    """A constant laid out as an accumulator, or as one number for each of its rows."""
    x = jnp.full(shape, value, jnp.float32)
    if interpret:  # the interpreter knows no layouts
        return x
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA if len(shape) == 2 else ROW_LAYOUT)


def start_state(head_dim: int, *, interpret: bool):
    """No keys seen: (sum of weighted values, running maximum times log2(e), sum of weights)."""
    shapes = ((ROWS, head_dim), 0.0), ((ROWS,), -jnp.inf), ((ROWS,), 0.0)
    return tuple(filled(shape, value, interpret=interpret) for shape, value in shapes)


def over_keys(x, shape):
    """Repeat one number for each row along the row."""
    return lax.broadcast_in_dim(x, shape, [0])


def softmax_step(qk, peak, factor: float):
    """One block of the running softmax, in base 2.

    Returns its weights, the factor that all sums so far shrink by, and the new running maximum.
    """
    new_peak = jnp.maximum(peak, qk.max(axis=1) * factor)
    shrink = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(qk * factor - over_keys(new_peak, qk.shape))
    return weights, shrink, new_peak


def iota(shape, axis: int, *, interpret: bool):
    """Index along `axis`, laid out as an accumulator."""
    if interpret:
        return lax.broadcasted_iota(jnp.int32, shape, axis)
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
