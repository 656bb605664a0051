"""Owns everything that lives on the devices, and the compiled programs that work on it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sidp_jax import sampling
from sidp_jax.batch import BatchLayout
from sidp_jax.copied_layers import CompiledCopiedForward, LoweredCopiedForward
from sidp_jax.kv_cache import KVCache, allocate, kv_cache_spec
from sidp_jax.pool import kv_bytes_per_page, padded_vocab
from sidp_jax.program_cache import LoweredProgram
from sidp_jax.request import SAMPLERS
from sidp_jax.step import StepProgram
from sidp_jax.weights import Weights

logger = logging.getLogger(__name__)

Step = tuple[str, BatchLayout]
"""What a forward program is compiled for: a mode, and a shape of the batch."""


@dataclass(frozen=True)
class RunnerShapes:
    """The static sizes of a run.

    Attributes:
        batches: Shapes of the batch, ascending in tokens.
        max_num_seqs: Sequences of one replica; also its sampling slots.
        page_size: Tokens of a page of the KV cache.
        num_kv_pages: Pages of one replica.
        kv_dtype: Type of keys and values.
    """

    batches: tuple[BatchLayout, ...]
    max_num_seqs: int
    page_size: int
    num_kv_pages: int
    kv_dtype: jnp.dtype


class Runner:
    """Runs steps: holds weights, KV cache, last tokens and sampler state on the devices.

    All programs are compiled ahead of time by ``warm_up``; a step that would need another one is
    an error, so nothing can recompile in the middle of a job.

    Args:
        program: Model, pool and mesh.
        weights: The weights on their devices.
        shapes: The static sizes.
        steps: The modes and shapes of the batch that a step may have.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: Weights,
        shapes: RunnerShapes,
        steps: tuple[Step, ...],
    ):
        self.program, self.weights, self.shapes, self.steps = program, weights, shapes, steps
        self._forward: dict[Step, jax.stages.Compiled | CompiledCopiedForward] = {}
        self._sampler: dict[str, jax.stages.Compiled] = {}
        self._new_state: jax.stages.Compiled | None = None
        self._kv: KVCache | None = None
        self._last_tokens: jax.Array | None = None
        self._state: sampling.SamplerState | None = None

    def warm_up(self) -> None:
        """Compiles every program, allocates the cache, and runs each program on an empty batch.

        Programs compile side by side, each from when it has been traced, and before the cache is
        allocated: the compiler tries GEMMs out on the device, which takes memory too.
        """
        started = time.monotonic()
        pool = self.program.layout.pool_size
        new_state = jax.jit(
            lambda: jax.tree.map(
                lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._state_spec()
            ),
            out_shardings=self.program.per_replica(),
        ).lower()
        forwards = (self._lower_forward(*step) for step in self.steps)
        samplers = (self._lower_sampler(variant) for variant in SAMPLERS)
        programs = iter(_compile_side_by_side(chain(forwards, samplers, [new_state])))
        self._forward = {step: next(programs) for step in self.steps}
        self._sampler = {variant: next(programs) for variant in SAMPLERS}
        self._new_state = next(programs)
        compiled = time.monotonic()

        self._kv = allocate(self._kv_spec())
        self._last_tokens = jax.device_put(
            np.zeros((pool, self.shapes.max_num_seqs), np.int32), self.program.per_replica()
        )
        # A sampler sees the widest shape after each: every program runs once, not every pair.
        pairs = [(step, SAMPLERS[0]) for step in self.steps]
        pairs += [(self.steps[0], variant) for variant in SAMPLERS[1:]]
        for (mode, batch), variant in pairs:
            self.launch(mode, variant, batch, batch.empty(pool))
        jax.block_until_ready(self._kv)
        logger.info(
            "warm-up: %d forward and %d sampling programs: compiled, or loaded, in %.1f s, "
            "first run in %.1f s",
            len(self._forward),
            len(self._sampler),
            compiled - started,
            time.monotonic() - compiled,
        )

    def launch(
        self, mode: str, variant: str, batch: BatchLayout, buffer: np.ndarray
    ) -> sampling.Sampled:
        """Sends one step to the devices and returns without waiting for it.

        Where the host owns layers it waits for most of the step: see ``CompiledCopiedForward``.

        Args:
            mode: Mode of the step.
            variant: Variant of the sampler.
            batch: Shape of the batch.
            buffer: The packed batch, int32 ``[pool, batch.size]``.

        Returns:
            What was sampled, arrays ``[pool, rows, ...]`` that are still being computed.
        """
        on_device = jax.device_put(buffer, self.program.per_replica())
        forwarded = self._forward[mode, batch](self.weights, self._kv, self._last_tokens, on_device)
        self._kv = forwarded.kv
        if variant == "full" and self._state is None:
            self._state = self._new_state()
        state = self._state if variant == "full" else None
        self._last_tokens, state, sampled = self._sampler[variant](
            forwarded.logits, forwarded.buffer, self._last_tokens, state
        )
        if variant == "full":
            self._state = state
        jax.tree.map(lambda array: array.copy_to_host_async(), sampled)
        return sampled

    def compiled_forward(
        self, mode: str, batch: BatchLayout
    ) -> jax.stages.Compiled | CompiledCopiedForward:
        """The compiled forward program, to read its memory or its HLO."""
        return self._forward[mode, batch]

    def _kv_spec(self) -> KVCache:
        shapes = self.shapes
        return kv_cache_spec(
            self.program.config,
            self.program.mesh,
            num_pages=shapes.num_kv_pages,
            page_size=shapes.page_size,
            dtype=shapes.kv_dtype,
        )

    def _spec(self, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        pool = self.program.layout.pool_size
        return jax.ShapeDtypeStruct((pool, *shape), dtype, sharding=self.program.per_replica())

    def _state_spec(self) -> sampling.SamplerState:
        state = jax.eval_shape(
            lambda: sampling.init_state(self.shapes.max_num_seqs, self._vocab_rows())
        )
        return jax.tree.map(lambda leaf: self._spec(leaf.shape, leaf.dtype), state)

    def _vocab_rows(self) -> int:
        return padded_vocab(self.program.config.vocab_size, self.program.mesh.size)

    def _lower_forward(
        self, mode: str, batch: BatchLayout
    ) -> jax.stages.Lowered | LoweredProgram | LoweredCopiedForward:
        weights = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding),
            self.weights,
        )
        last_tokens = self._spec((self.shapes.max_num_seqs,), jnp.int32)
        buffer = self._spec((batch.size,), jnp.int32)
        forward = self.program.forward(mode, batch, self.shapes.batches[-1], weights)
        return forward.lower(weights, self._kv_spec(), last_tokens, buffer)

    def _lower_sampler(self, variant: str) -> jax.stages.Lowered | LoweredProgram:
        widest = self.shapes.batches[-1]
        logits = self._spec((widest.seqs, self._vocab_rows()), jnp.float32)
        buffer = self._spec((widest.size,), jnp.int32)
        last_tokens = self._spec((self.shapes.max_num_seqs,), jnp.int32)
        state = self._state_spec() if variant == "full" else None
        sampler = self.program.sampler(variant, widest)
        return sampler.lower(logits, buffer, last_tokens, state)


def num_pages_that_fit(
    program: StepProgram,
    weights: Weights,
    shapes: RunnerShapes,
    steps: tuple[Step, ...],
    memory_bytes: int,
) -> int:
    """Pages of KV cache that one replica has room for, beside everything else that a step needs.

    The largest step of each mode is compiled with a small cache, and what the compiler then says
    about arguments, results and temporaries is taken off the memory: nothing is estimated. GEMMs
    are not tuned for it, which on a GPU is most of a compilation and changes no buffer.

    Args:
        program: Model, pool and mesh.
        weights: The weights on their devices.
        shapes: The static sizes; ``num_kv_pages`` is not looked at.
        steps: The modes and shapes of the batch that a step may have.
        memory_bytes: Bytes of one device that may be used.
    """
    probe = Runner(program, weights, replace(shapes, num_kv_pages=1), steps)
    config = program.config
    page = kv_bytes_per_page(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads // program.tensor_size,
        head_dim=config.head_dim,
        page_size=shapes.page_size,
        dtype_bytes=jnp.dtype(shapes.kv_dtype).itemsize,
    )
    largest = dict(sorted(steps, key=lambda step: step[1].tokens))
    untuned = {"xla_gpu_autotune_level": 0} if program.platform == "gpu" else None
    sampler, *forwards = (
        compiled.memory_analysis()
        for compiled in _compile_side_by_side(
            chain(
                [probe._lower_sampler("full")],
                (probe._lower_forward(*step) for step in largest.items()),
            ),
            untuned,
        )
    )
    used = max(m.argument_size_in_bytes - page + m.temp_size_in_bytes for m in forwards)
    # Logits of two steps, the sampler's workspace and its state live beside the forward program.
    used += 2 * sampler.argument_size_in_bytes + sampler.temp_size_in_bytes
    return max(0, (memory_bytes - used) // page)


def _compile_side_by_side(
    lowered: Iterable[jax.stages.Lowered | LoweredProgram | LoweredCopiedForward],
    options: dict[str, int] | None = None,
) -> list[jax.stages.Compiled | CompiledCopiedForward]:
    """Compiles programs in a thread each, while the next ones are being traced."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda program: program.compile(options), lowered))
