"""One step of the real forward program, outside the engine: its batch, its compilation, its time.

``bench_replica.py`` runs it on one GPU of a pool whose others do not exist, ``bench_modes.py`` on a
whole pool.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sidp_jax import estimate
from sidp_jax.batch import BatchLayout, build_batch
from sidp_jax.copied_layers import CompiledCopiedForward, LoweredCopiedForward
from sidp_jax.hardware import Hardware
from sidp_jax.kv_cache import KVCache, allocate, kv_cache_spec
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import (
    CAS,
    COLLECTIVE,
    HOST,
    REPLICATED,
    WAS,
    Policy,
    fetch_seconds,
    lockstep_hop_seconds,
    staggered_hop_seconds,
)
from sidp_jax.pool import PoolLayout, kv_bytes_per_page
from sidp_jax.request import SamplingParams, Sequence
from sidp_jax.scheduler import Chunk, StepPlan
from sidp_jax.step import StepProgram
from sidp_jax.weights import LayerLoop, Weights, weights_spec

STOP_IDS = 17


@dataclass(frozen=True)
class Work:
    """What every replica does in a step: sequences with a part of their tokens to compute.

    Attributes:
        name: The work in words.
        rows: For each sequence the tokens before this step, and those of this step.
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, tokens: int, *, context: int, most_decodes: int) -> Work:
        """Decodes up to a number of tokens, prompts of ``context`` tokens beyond it."""
        if tokens <= most_decodes:
            return cls(f"decode {tokens} x {context}", ((context - 1, 1),) * tokens)
        whole, rest = divmod(tokens, context)
        rows = ((0, context),) * whole + ((0, rest),) * bool(rest)
        name = f"prefill {whole} x {context}" if whole else ""
        return cls(" + ".join(filter(None, [name, f"prefill 1 x {rest}" if rest else ""])), rows)

    def pages(self, page_size: int) -> int:
        """Pages of the KV cache of one replica that the work needs."""
        return sum(ceil((start + length) / page_size) for start, length in self.rows)


@dataclass(frozen=True)
class Form:
    """The static side of the steps of one model on one mesh.

    Attributes:
        program: Model, pool and mesh.
        layer_loop: Form of the layers.
        dtype: Type of weights, activations and cache.
        page_size: Tokens of a page.
        max_num_seqs: Sequences of one replica.
        max_model_len: Longest sequence.
    """

    program: StepProgram
    layer_loop: LayerLoop
    dtype: jnp.dtype
    page_size: int
    max_num_seqs: int
    max_model_len: int

    @classmethod
    def make(
        cls,
        model: ModelConfig,
        mesh: Mesh,
        resident_layers: int,
        *,
        attention: str,
        was_fetch: str = COLLECTIVE,
        **rest: Any,
    ) -> Form:
        """The form of a model with so many layers that every replica keeps."""
        on_host = was_fetch == HOST
        layout = PoolLayout(model.num_layers, mesh.shape["pool"], resident_layers, on_host)
        return cls(StepProgram(model, layout, mesh, attention, was_fetch), **rest)

    def batch_layout(self, tokens: int) -> BatchLayout:
        """The shape of a batch of so many tokens."""
        pages = ceil(self.max_model_len / self.page_size)
        return BatchLayout(tokens, self.max_num_seqs, pages, STOP_IDS)

    def weights(self) -> Weights:
        """The abstract weights."""
        program = self.program
        return weights_spec(
            program.config,
            program.layout,
            program.mesh,
            layer_loop=self.layer_loop,
            dtype=self.dtype,
        )

    def kv_spec(self, num_pages: int) -> KVCache:
        """The abstract cache."""
        return kv_cache_spec(
            self.program.config,
            self.program.mesh,
            num_pages=num_pages,
            page_size=self.page_size,
            dtype=self.dtype,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page on one device."""
        model = self.program.config
        return kv_bytes_per_page(
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads // self.program.tensor_size,
            head_dim=model.head_dim,
            page_size=self.page_size,
            dtype_bytes=self.dtype.itemsize,
        )

    def lower(
        self, mode: str, tokens: int, widest: int, num_pages: int
    ) -> jax.stages.Lowered | LoweredCopiedForward:
        """The forward program, lowered from shapes alone: neither weights nor cache are needed.

        Args:
            mode: A key of ``step.RUN_LAYERS``.
            tokens: Tokens of each replica.
            widest: Tokens of the largest step.
            num_pages: Pages of each replica's cache.
        """
        program, layout = self.program, self.batch_layout(tokens)
        weights = self.weights()
        last_tokens, buffer = (
            jax.ShapeDtypeStruct(
                (program.layout.pool_size, size), jnp.int32, sharding=program.per_replica()
            )
            for size in (self.max_num_seqs, layout.size)
        )
        forward = program.forward(mode, layout, self.batch_layout(widest), weights)
        return forward.lower(weights, self.kv_spec(num_pages), last_tokens, buffer)

    def batch(self, work: Work, tokens: int) -> np.ndarray:
        """The packed batch in which every replica does the work, with random token ids.

        Returns:
            int32 ``[pool, size]``. Pages are given out from 0 on, in order of the rows.
        """
        rng = np.random.default_rng(tokens)
        params = SamplingParams(temperature=0, max_tokens=1)
        replicas = []
        for replica in range(self.program.layout.pool_size):
            chunks, page = [], 0
            for slot, (start, length) in enumerate(work.rows):
                prompt = rng.integers(0, self.program.config.vocab_size, start + length).tolist()
                last = page + ceil(len(prompt) / self.page_size)
                sequence = Sequence(slot, f"{replica}-{slot}", 0, prompt, params, 0, 1)
                sequence.slot, sequence.pages = slot, array("i", range(page, last))
                chunks.append(Chunk(sequence, start, length, True))
                page = last
            replicas.append(chunks)
        return build_batch(StepPlan(replicas), self.batch_layout(tokens), self.page_size)


def bytes_per_device(spec: Any) -> int:
    """Bytes that one device holds of abstract arrays."""
    return sum(
        jnp.dtype(leaf.dtype).itemsize * prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(spec)
    )


def compile_all(
    lowerings: dict[Any, Callable[[], jax.stages.Lowered | LoweredCopiedForward]],
    options: dict[str, Any] | None = None,
    threads: int | None = None,
) -> Iterator[tuple[Any, jax.stages.Compiled | CompiledCopiedForward | Exception, float]]:
    """Compiles programs side by side, each as soon as it is lowered.

    Args:
        lowerings: For each key a function that lowers its program.
        options: Compiler options, beyond the flags that jax was started with.
        threads: Compilations at a time; as many as there are cores by default.

    Yields:
        Key, program and seconds that its compilation took; an exception in place of the program
        where it failed. In the order of the keys.
    """

    def compiled(lowered: jax.stages.Lowered | LoweredCopiedForward) -> tuple[Any, float]:
        start = time.perf_counter()
        try:
            result = lowered.compile(options)
        except Exception as error:
            result = error
        return result, time.perf_counter() - start

    with ThreadPoolExecutor(threads) as pool:
        futures = {}
        for key, lower in lowerings.items():
            try:
                futures[key] = pool.submit(compiled, lower())
            except Exception as error:
                futures[key] = pool.submit(lambda error=error: (error, 0.0))
        for key, future in futures.items():
            program, seconds = future.result()
            print(f"compiled {key} in {seconds:.1f} s", flush=True)
            yield key, program, seconds


def put_local(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array on its devices, of which some may be out of this process' reach.

    ``jax.device_put`` would ask the other processes whether they have the same values.
    """
    shards = [
        jax.device_put(array[index], device)
        for device, index in sharding.addressable_devices_indices_map(array.shape).items()
    ]
    return jax.make_array_from_single_device_arrays(array.shape, sharding, shards)


class Stepper:
    """Weights and cache on the devices, on which compiled forward programs are run.

    Args:
        form: What the programs were lowered from.
        weights: The weights on their devices.
        num_pages: Pages of each replica's cache; it is allocated here.
    """

    def __init__(self, form: Form, weights: Weights, num_pages: int):
        self.form, self._weights, self._num_pages = form, weights, num_pages
        self.kv: KVCache | None = None
        self.allocate()
        empty = np.zeros((form.program.layout.pool_size, form.max_num_seqs), np.int32)
        self._last_tokens = put_local(empty, form.program.per_replica())

    def allocate(self) -> None:
        """A new empty cache in place of the one that there may be."""
        self.free()
        self.kv = jax.block_until_ready(allocate(self.form.kv_spec(self._num_pages)))

    def free(self) -> None:
        """Gives the cache's memory back."""
        for leaf in jax.tree.leaves(self.kv):
            if not leaf.is_deleted():
                leaf.delete()
        self.kv = None

    def run(
        self, program: jax.stages.Compiled | CompiledCopiedForward, buffer: jax.Array
    ) -> jax.Array:
        """Sends one step to the devices; the cache is updated.

        Returns:
            The logits, which are still being computed.
        """
        forwarded = program(self._weights, self.kv, self._last_tokens, buffer)
        self.kv = forwarded.kv
        return forwarded.logits


@dataclass(frozen=True)
class Timing:
    """Seconds of a step.

    Attributes:
        in_a_row: Of steps launched one after the other, none waited for but the last.
        blocked: Of one step that is waited for, so with what launching it takes.
        steps: Steps in a row.
    """

    in_a_row: float
    blocked: float
    steps: int


def time_steps(
    launch: Callable[[], Any], target_seconds: float = 0.5, rounds: int = 3, most: int = 64
) -> Timing:
    """Times a step: medians of several rounds, after a warm-up.

    On the CPU every step is waited for: virtual devices share few threads, and the collectives of
    several steps at a time can block them all.

    Args:
        launch: Sends one step and returns what to wait for.
        target_seconds: About how long a round takes.
        rounds: Rounds of steps in a row; single steps are as many.
        most: Most steps of a round.
    """
    one_at_a_time = jax.default_backend() == "cpu"

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            result = launch()
            if one_at_a_time:
                jax.block_until_ready(result)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / steps

    seconds(2)
    blocked = median(seconds(1) for _ in range(rounds))
    steps = int(min(most, max(2, target_seconds / blocked)))
    return Timing(median(seconds(steps) for _ in range(rounds)), blocked, steps)


def layer_policy(form: Form, mode: str, hardware: Hardware) -> Policy:
    """The policy's formulas for one mode and one layer of a form, on some hardware."""
    program = form.program
    shape = estimate.layer_shape(program.config, program.tensor_size, form.dtype.itemsize)
    layout = program.layout
    return Policy(
        (mode,),
        layout.pool_size,
        shape,
        hardware,
        resident_layers=layout.resident_layers,
        was_fetch=program.was_fetch,
    )


def link_seconds(policy: Policy, mode: str, tokens: int) -> float:
    """Seconds that the link is busy for one layer (in staggered CaS: one stage), by the profile."""
    shape, hardware = policy.shape, policy.hardware
    if mode == REPLICATED:
        return 0.0
    if mode == WAS:
        return fetch_seconds(shape, hardware, policy.was_fetch, policy.pool_size)
    if mode == CAS:
        return lockstep_hop_seconds(tokens, policy.pool_size, shape, hardware)
    return staggered_hop_seconds(tokens, shape, hardware)
