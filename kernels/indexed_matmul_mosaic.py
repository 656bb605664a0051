"""Indexed matrix products for Hopper, in Pallas' Mosaic GPU dialect.

One kernel for all numbers of tokens. Thread blocks stay, and take tiles of the result in turn: one
producer warpgroup moves tiles of activations and weights through a deep ring in shared memory (the
row of the weights is a coordinate, or a choice among arrays, of those loads), one or two
consumers multiply. Activations are the rows of a `wgmma` and weights its columns, because columns
may be any multiple of eight: so tiles can be cut such that all multiprocessors carry equal bytes.

- Few tokens: weights stream by once. Rows of a tile past the last token are never loaded; what
  they multiply to is never stored.
- The blocks of a cluster can share the loads of what they have in common (multicast).
- `splits` cuts the inputs: each part writes float32, and XLA adds the parts up, always in the same
  order, in whatever it fuses with the sum.

Tiles that reach past the end of a dimension are moved back: they compute a few results twice, to
the same bits.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.indexed_matmul import Weights
from sidp_jax.kernels.mosaic import gpu_kernel, swizzled

ROWS = 64  # rows of one wgmma
SHARED_BYTES = 232_448 - 2048  # of one block, less barriers and what the compiler takes
MAX_STAGES = 12
SHARES = ("inputs", "weights")


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the work is cut.

    Attributes:
        block_tokens: tokens of a tile: 64 (one consumer warpgroup), 128 or 256 (two).
        block_outputs: outputs of a tile, a multiple of 16 up to 256 (128 with 256 tokens).
        block_inputs: inputs of one step of the ring: 64, 128 or 256.
        splits: parts that the inputs are cut into.
        cluster: blocks that share loads: 1, 2 or 4.
        share: what they share: "inputs" (one tile of tokens, neighbours in outputs) or "weights".
        group_tokens: tiles of tokens (of a cluster) that run beside each other, to meet in L2.
        stages: steps of the ring; as many as fit, up to 12, if not given.
        num_sms: streaming multiprocessors to fill (132 on H100 and H200).
    """

    block_tokens: int = 64
    block_outputs: int = 64
    block_inputs: int = 64
    splits: int = 1
    cluster: int = 1
    share: str = "inputs"
    group_tokens: int = 16
    stages: int | None = None
    num_sms: int = 132

    def __post_init__(self):
        _choice("block_tokens", self.block_tokens, (64, 128, 256))
        _choice("block_inputs", self.block_inputs, (64, 128, 256))
        _choice("cluster", self.cluster, (1, 2, 4))
        _choice("share", self.share, SHARES)
        most = 128 if self.block_tokens == 256 else 256
        if self.block_outputs % 16 or not 16 <= self.block_outputs <= most:
            raise ValueError(f"{self.block_outputs=} must be a multiple of 16 from 16 to {most}")
        if self.share == "weights" and self.block_outputs % (8 * self.cluster):
            raise ValueError(f"{self.block_outputs=} must be a multiple of 8 * {self.cluster=}")
        for name in ("splits", "group_tokens", "num_sms"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_sms < self.cluster:
            raise ValueError(f"{self.num_sms=} must be at least {self.cluster=}")
        if self.stages is not None and not 2 <= self.stages <= self.most_stages:
            raise ValueError(f"{self.stages=} must be from 2 to {self.most_stages} for {self}")
        if self.most_stages < 2:
            raise ValueError(f"two steps of {self} do not fit into {SHARED_BYTES} bytes")

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 1 if self.block_tokens == ROWS else 2

    @property
    def consumer_rows(self) -> int:
        """Tokens of one of them."""
        return self.block_tokens // self.consumers

    @property
    def most_stages(self) -> int:
        """Steps of the ring that fit into shared memory."""
        step = (self.block_tokens + self.block_outputs) * self.block_inputs * 2
        out = 2 * self.block_tokens * 128  # two slots of at most 128 bytes a token
        return min((SHARED_BYTES - out) // step, MAX_STAGES)

    @property
    def depth(self) -> int:
        """Steps of the ring."""
        return self.stages or self.most_stages

    def out_chunk(self, itemsize: int) -> int:
        """Outputs that are written at a time, in lines of at most 128 bytes."""
        sizes = (128 // itemsize, 64 // itemsize, 32 // itemsize)
        return next(n for n in sizes if self.block_outputs % n == 0)


def _choice(name: str, value: Any, known: tuple) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {known}")


# --------------------------------------------------------------------------------- the heuristic

# Rates that the choice rests on, per second, of one H200; ratios are what counts.
HBM_BYTES = 4.28e12  # read by all multiprocessors together
L2_BYTES = 6.5e12
FLOPS = 7.3e14
TILE_SECONDS = 1.0e-6  # of a tile's start and end that nothing hides
SPLIT_SECONDS = 2.0e-6  # of the sum over parts


def choose(tokens: int, outputs: int, inputs: int, num_sms: int = 132) -> TuningConfig:
    """The config whose modelled time (`modelled_seconds`) is least."""
    cost = functools.partial(modelled_seconds, tokens=tokens, outputs=outputs, inputs=inputs)
    return min(_candidates(tokens, outputs, inputs, num_sms), key=cost)


def _candidates(tokens: int, outputs: int, inputs: int, num_sms: int) -> Iterator[TuningConfig]:
    if tokens <= 64:
        blocks = ((64, 256),)
    elif tokens <= 128:
        blocks = ((128, 256),)
    else:
        blocks = ((128, 256), (256, 128))
    for block_tokens, most in blocks:
        for block_outputs in range(16, min(most, outputs) + 1, 16):
            for splits in (1, 2, 3, 4) if tokens <= 256 else (1,):
                if splits > 1 and inputs // 64 < 8 * splits:
                    continue
                for cluster, share in ((1, "inputs"), (2, "inputs"), (2, "weights")):
                    if cluster > 1 and (tokens < 64 or outputs < 2 * block_outputs):
                        continue
                    if share == "weights" and tokens <= block_tokens:
                        continue
                    # Narrow tiles take longer steps, each has a cost of its own; but with few
                    # tokens shorter ones were as fast or faster.
                    narrow = block_tokens + block_outputs <= 192 and inputs % 128 == 0
                    long = narrow and tokens > 32
                    yield TuningConfig(
                        block_tokens,
                        block_outputs,
                        128 if long else 64,
                        splits=splits,
                        cluster=cluster,
                        share=share,
                        group_tokens=group_of(tokens, block_tokens, cluster, share),
                        num_sms=num_sms,
                    )


def group_of(tokens: int, block_tokens: int, cluster: int, share: str) -> int:
    """A `group_tokens` of about 2048 tokens, whose activations stay in the L2 cache."""
    item = block_tokens * (cluster if share == "weights" else 1)
    return max(1, min(2048, tokens) // item)


def modelled_seconds(config: TuningConfig, *, tokens: int, outputs: int, inputs: int) -> float:
    """Time of the slowest multiprocessor: per tile the scarcest of HBM, L2 and tensor cores."""
    c = config
    grid = _Grid.of(c, tokens, outputs, inputs)
    waves = -(-grid.items // grid.workers)
    loaded = min(c.block_tokens, tokens)
    shared = [c.cluster if c.share == what else 1 for what in SHARES]
    from_l2 = loaded / shared[0] + c.block_outputs / shared[1]
    readers = min(grid.token_items * (c.cluster if c.share == "weights" else 1), 16)
    wasted = 1.02 if c.cluster > 1 else 1.0  # blocks of a cluster wait for each other
    per_input = wasted * max(
        2 * from_l2 / L2_BYTES,
        2 * c.block_outputs / readers / HBM_BYTES,
        2 * c.block_tokens * c.block_outputs / FLOPS,
    )
    itemsize = 2 if c.splits == 1 else 4
    end = 2 * loaded * c.block_outputs * itemsize / L2_BYTES
    tile = c.num_sms * (per_input * inputs / c.splits + end) + TILE_SECONDS
    return waves * tile + (SPLIT_SECONDS if c.splits > 1 else 0.0)


class _Grid(NamedTuple):
    """How many items of work there are; a cluster takes one item at a time."""

    output_items: int
    token_items: int
    items: int
    workers: int

    @classmethod
    def of(cls, config: TuningConfig, tokens: int, outputs: int, inputs: int) -> "_Grid":
        c = config
        by = dict.fromkeys(SHARES, 1) | {c.share: c.cluster}
        output_items = pl.cdiv(outputs, c.block_outputs * by["inputs"])
        token_items = pl.cdiv(tokens, c.block_tokens * by["weights"])
        return cls(
            output_items, token_items, output_items * token_items * c.splits, c.num_sms // c.cluster
        )


# ------------------------------------------------------------------------------------ the kernel


class _Place(NamedTuple):
    """Where one block's part of an item begins; `steps` of the ring lead through its inputs."""

    token: Any
    output: Any
    part: Any
    first_step: Any
    steps: Any


def _place_of(item, rank, grid: _Grid, config: TuningConfig, shape: tuple[int, int, int]) -> _Place:
    """Tiles of tokens run side by side in groups; then come the next outputs, then the next group.

    Args:
        item: number of the item.
        rank: the block's place in its cluster.
        grid: all items.
        config: how the work is cut.
        shape: tokens, outputs and inputs.
    """
    c, (tokens, outputs, inputs) = config, shape
    part = lax.rem(item, jnp.int32(c.splits))
    tile = lax.div(item, jnp.int32(c.splits))
    group = lax.div(tile, jnp.int32(c.group_tokens * grid.output_items))
    rest = tile - group * (c.group_tokens * grid.output_items)
    size = jnp.minimum(c.group_tokens, grid.token_items - group * c.group_tokens)
    output = lax.div(rest, size)
    token = group * c.group_tokens + rest - output * size
    if c.share == "inputs":
        output = output * c.cluster + rank
    else:
        token = token * c.cluster + rank
    all_steps = inputs // c.block_inputs
    first = lax.div(part * all_steps, jnp.int32(c.splits))
    end = lax.div((part + 1) * all_steps, jnp.int32(c.splits))
    return _Place(
        jnp.minimum(token * c.block_tokens, max(tokens - c.block_tokens, 0)),
        jnp.minimum(output * c.block_outputs, outputs - c.block_outputs),
        part,
        first,
        end - first,
    )


def _kernel(
    x_ref,  # [tokens, inputs]
    row_ref,  # [1]
    *refs,
    config: TuningConfig,
    grid: _Grid,
    rows: int,
    stacked: bool,
    shape: tuple[int, int, int],
    interpret: bool,
):
    weight_refs, refs = refs[: 1 if stacked else rows], refs[1 if stacked else rows :]
    out_ref, x_smem, w_smem, out_smem, full, free = refs
    c, stages = config, config.depth
    wg = lax.axis_index("wg")
    worker = lax.axis_index("block")
    rank = lax.axis_index("cluster") if c.cluster > 1 else jnp.int32(0)
    loaded = min(c.consumer_rows, shape[0])  # rows of a consumer that hold tokens
    count = lax.div(grid.items - 1 - worker, jnp.int32(grid.workers)) + 1
    place_of = functools.partial(_place_of, rank=rank, grid=grid, config=c, shape=shape)

    @pl.when(wg == c.consumers)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        row = jnp.clip(row_ref[0], 0, rows - 1)

        def load_weights(output, first, slot):
            part = (pl.ds(output, c.block_outputs), pl.ds(first, c.block_inputs))
            to = (w_smem.at[slot], full.at[slot])
            if stacked:
                _copy(weight_refs[0].at[(row, *part)], *to, shared=c, what="weights")
                return
            for i, ref in enumerate(weight_refs):

                @pl.when(row == i)
                def _load(ref=ref):
                    _copy(ref.at[part], *to, shared=c, what="weights")

        def item(i, done):
            place = place_of(worker + i * grid.workers)

            def step(k, _):
                n = done + k
                slot = lax.rem(n, jnp.int32(stages))
                pl.when(n >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                first = (place.first_step + k) * c.block_inputs
                load_weights(place.output, first, slot)
                for j in range(c.consumers):
                    tokens = pl.ds(place.token + j * c.consumer_rows, loaded)
                    source = x_ref.at[tokens, pl.ds(first, c.block_inputs)]
                    target = x_smem.at[slot, j, pl.ds(0, loaded)]
                    _copy(source, target, full.at[slot], shared=c, what="inputs")

            lax.fori_loop(0, place.steps, step, None)
            return done + place.steps

        done = lax.fori_loop(0, count, item, jnp.int32(0))
        # Nobody leaves before all have let go of what was loaded here.
        for slot in range(stages):
            pl.when(slot < done)(lambda slot=slot: plgpu.barrier_wait(free.at[slot]))

    @pl.when(wg < c.consumers)
    def _consumer():
        plgpu.set_max_registers(232, action="increase")

        def item(i, done):
            place = place_of(worker + i * grid.workers)
            acc = _multiply(
                *(x_smem, w_smem, full, free, wg, done, place.steps),
                config=c,
                interpret=interpret,
            )
            _write(acc, out_ref, out_smem, wg, place, config=c, loaded=loaded)
            return done + place.steps

        lax.fori_loop(0, count, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)


def _copy(source, target, barrier, *, shared: TuningConfig, what: str) -> None:
    """Start a load; of what a cluster shares, each block loads a part and sends it to all."""
    collective = {}
    if shared.cluster > 1 and shared.share == what:
        collective = {"collective_axes": "cluster"}
    plgpu.copy_gmem_to_smem(source, target, barrier, **collective)


def _multiply(x_smem, w_smem, full, free, wg, done, steps, *, config, interpret: bool):
    """Products of `steps` slots of the ring, added up; lets go of each as soon as it can."""
    stages, shape = config.depth, (config.consumer_rows, config.block_outputs)

    def slot_of(k):
        return lax.rem(done + k, jnp.int32(stages))

    if interpret:  # the interpreter's wgmma does not take bfloat16

        def plain_step(k, acc):
            slot = slot_of(k)
            plgpu.barrier_wait(full.at[slot])
            x, w = x_smem[slot, wg], w_smem[slot]
            acc = acc + jnp.dot(x, w.T, preferred_element_type=jnp.float32)
            plgpu.barrier_arrive(free.at[slot])
            return acc

        return lax.fori_loop(0, steps, plain_step, jnp.zeros(shape, jnp.float32))

    def scope(acc_ref):
        def step(k, _):
            slot = slot_of(k)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(acc_ref, x_smem.at[slot, wg], w_smem.at[slot].transpose((1, 0)))
            plgpu.wgmma_wait(1)  # this product runs on; the one before is done
            pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[slot_of(k - 1)]))

        lax.fori_loop(0, steps, step, None)
        return acc_ref[...]

    acc = pl.run_scoped(scope, plgpu.ACC(shape, jnp.float32))
    plgpu.barrier_arrive(free.at[slot_of(steps - 1)])
    return acc


def _write(acc, out_ref, out_smem, wg, place: _Place, *, config, loaded: int) -> None:
    """Round a tile and write it, a few columns at a time, through two slots."""
    chunk = out_smem.shape[-1]
    tokens = pl.ds(place.token + wg * config.consumer_rows, loaded)
    for j in range(config.block_outputs // chunk):
        slot = j % 2
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)
        part = acc[:, j * chunk : (j + 1) * chunk].astype(out_smem.dtype)
        out_smem[wg, slot] = part
        plgpu.commit_smem()
        columns = pl.ds(place.output + j * chunk, chunk)
        source = out_smem.at[wg, slot, pl.ds(0, loaded)]
        if config.splits == 1:
            plgpu.copy_smem_to_gmem(source, out_ref.at[tokens, columns])
        else:
            plgpu.copy_smem_to_gmem(source, out_ref.at[place.part, tokens, columns])


# ----------------------------------------------------------------------------------------- entry


def check_fits(outputs: int, inputs: int, config: TuningConfig) -> None:
    """Raise ValueError if the kernel cannot cut these dimensions so."""
    if inputs % config.block_inputs:
        raise ValueError(f"{inputs=} must be a multiple of {config.block_inputs=}")
    if outputs % 16 or outputs < config.block_outputs:
        raise ValueError(
            f"{outputs=} must be a multiple of 16 and at least {config.block_outputs=}"
        )
    if inputs // config.block_inputs < config.splits:
        raise ValueError(f"{inputs=} are too few for {config.splits=} of {config.block_inputs=}")


def indexed_matmul_mosaic(
    x: Float[Array, "tokens inputs"],
    weights: Weights,
    row: Int[Array, ""],
    *,
    config: TuningConfig | None = None,
    interpret: Any = None,
) -> Float[Array, "tokens outputs"]:
    """`indexed_matmul` with the Hopper kernel; `interpret` runs it on the CPU (tests)."""
    kernel = weights[0] if isinstance(weights, tuple) else weights
    outputs, inputs = kernel.shape[-2:]
    if x.dtype != jnp.bfloat16 or kernel.dtype != jnp.bfloat16:
        raise ValueError(
            f"{x.dtype=} and weights of {kernel.dtype} must both be bfloat16 for the mosaic "
            "kernel; use 'reference'"
        )
    if config is None:
        if inputs % 64 or outputs % 16:
            raise ValueError(
                f"{inputs=} must be a multiple of 64 and {outputs=} of 16 for the mosaic kernel; "
                "use 'reference'"
            )
        config = choose(x.shape[0], outputs, inputs)
    check_fits(outputs, inputs, config)
    return _matmul(x, weights, row, config=config, interpret=interpret)


def _padded(tokens: int, config: TuningConfig) -> int:
    """Tokens that the copy engine can address: whole tiles, or one tile's first rows by eights."""
    eights = -(-tokens // 8) * 8
    one_part = config.consumers == 1 and config.cluster == 1
    return eights if one_part else max(eights, config.block_tokens)


# A function of its own, so that a program with many layers lowers the kernel once for each shape.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _matmul(x, weights, row, *, config: TuningConfig, interpret):
    stacked = not isinstance(weights, tuple)
    refs = (weights,) if stacked else weights
    outputs, inputs = refs[0].shape[-2:]
    tokens, padded = x.shape[0], _padded(x.shape[0], config)
    if padded != tokens:
        x = jnp.pad(x, ((0, padded - tokens), (0, 0)))
    grid = _Grid.of(config, padded, outputs, inputs)
    grid = grid._replace(workers=min(grid.workers, grid.items))
    dtype, lead = (x.dtype, ()) if config.splits == 1 else (jnp.float32, (config.splits,))
    out = jax.ShapeDtypeStruct((*lead, padded, outputs), dtype)
    kernel = gpu_kernel(
        functools.partial(
            _kernel,
            config=config,
            grid=grid,
            rows=weights.shape[0] if stacked else len(weights),
            stacked=stacked,
            shape=(padded, outputs, inputs),
            interpret=bool(interpret),
        ),
        out_type=[out],
        scratch=_scratch(config, x.dtype, dtype),
        grid=grid.workers,
        warpgroups=config.consumers + 1,
        cluster=config.cluster,
        name="indexed_matmul",
        interpret=interpret,
    )
    (result,) = kernel(x, row.astype(jnp.int32).reshape(1), *refs)
    if config.splits > 1:
        result = functools.reduce(jnp.add, [result[i] for i in range(config.splits)])
    return result[:tokens].astype(x.dtype)


def _scratch(config: TuningConfig, dtype, out_dtype) -> list:
    c, stages = config, config.depth
    itemsize = jnp.dtype(out_dtype).itemsize
    chunk = c.out_chunk(itemsize)
    lines = (plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(chunk * itemsize))
    slots = (c.consumers, 2, c.consumer_rows, chunk)
    if c.cluster > 1:
        free = plgpu.ClusterBarrier(
            collective_axes=("cluster",), num_arrivals=c.consumers, num_barriers=stages
        )
    else:
        free = plgpu.Barrier(num_arrivals=c.consumers, num_barriers=stages)
    return [
        swizzled((stages, c.consumers, c.consumer_rows, c.block_inputs), dtype),
        swizzled((stages, c.block_outputs, c.block_inputs), dtype),
        plgpu.SMEM(slots, out_dtype, transforms=lines),
        plgpu.Barrier(num_arrivals=1 + c.consumers, num_barriers=stages),
        free,
    ]
