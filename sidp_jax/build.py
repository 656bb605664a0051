"""From a configuration to an engine that is ready to generate."""

from __future__ import annotations

import gc
import logging
import os
from dataclasses import replace
from math import ceil

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from sidp_jax.batch import BatchLayout, token_buckets
from sidp_jax.checkpoint import load_weights
from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.engine import Engine
from sidp_jax.hardware import MEASURE, Hardware, as_values, load_profile, profile_for
from sidp_jax.kernels.ragged_attention import TILE_TOKENS
from sidp_jax.kernels.self_check import KernelError, self_check
from sidp_jax.measure import measure_hardware
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import CAS_STAGGERED, COLLECTIVE, WAS, Policy
from sidp_jax.pool import kv_bytes_per_page
from sidp_jax.program_cache import ProgramCache
from sidp_jax.request import MAX_STOP_TOKEN_IDS
from sidp_jax.runner import Runner, RunnerShapes, Step, num_pages_that_fit
from sidp_jax.scheduler import Scheduler, SchedulerConfig
from sidp_jax.settle import (
    check_tensor_parallel,
    layout_of,
    longest_sequence,
    make_policy,
    step_costs,
)
from sidp_jax.step import StepProgram
from sidp_jax.tokenizer import load_tokenizer
from sidp_jax.weights import Weights, nbytes_per_device

logger = logging.getLogger(__name__)

_HOST_SHARE = 0.25
"""Most of the host's free memory that the caches of virtual CPU devices take together."""


def build_engine(config: EngineConfig) -> Engine:
    """Loads the model, sizes the KV cache, compiles every program and returns the engine.

    Args:
        config: What to run, and how.

    Raises:
        ConfigError: Something is missing or does not fit; the message says what to set.
        CheckpointError: The checkpoint is incomplete, damaged, or made for another model.
    """
    model, program, policy = _settle(config)
    max_model_len = longest_sequence(config, model)
    layer_loop = config.layer_loop
    if layer_loop == "auto":
        scan = program.platform == "cpu" and program.was_fetch == COLLECTIVE
        layer_loop = "scan" if scan else "unrolled"
    weights = load_weights(
        config.model_path,
        model,
        program.layout,
        program.mesh,
        dtype=jnp.dtype(config.dtype),
        layer_loop=layer_loop,
        load_format=config.load_format,
        seed=config.seed,
    )
    batches = _batch_layouts(config, model, max_model_len, program.attention)
    # A mode that would never be picked for a shape needs no program, and no memory, for it.
    steps = tuple(
        (mode, batch)
        for mode in policy.modes
        for batch in batches
        if policy.may_run(mode, batch.tokens)
    )
    shapes = RunnerShapes(
        batches=batches,
        max_num_seqs=config.max_num_seqs,
        page_size=config.page_size,
        num_kv_pages=1,
        kv_dtype=jnp.dtype(config.dtype),
    )
    pages = _num_pages(config, program, weights, shapes, steps, max_model_len)
    runner = Runner(program, weights, replace(shapes, num_kv_pages=pages), steps)
    _warm_up(runner, config)
    engine = Engine(
        runner,
        Scheduler(
            SchedulerConfig(
                pool_size=config.pool_size,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_model_len=max_model_len,
                page_size=config.page_size,
                num_kv_pages=pages,
                step_costs=(
                    step_costs(policy, [batch.tokens for batch in batches])
                    if config.prefill == "spread"
                    else None
                ),
                prefix_caching=config.enable_prefix_caching,
            )
        ),
        policy,
        max_model_len=max_model_len,
        seed=config.seed,
        tokenizer=load_tokenizer(config.model_path),
    )
    _log_sizes(engine, weights)
    # What is here now stays: the collector need not look at it again in the middle of a step.
    gc.collect()
    gc.freeze()
    return engine


def _warm_up(runner: Runner, config: EngineConfig) -> None:
    """``Runner.warm_up``, whose failure for want of memory says what to set."""
    try:
        runner.warm_up()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        if "allocat" not in reason and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ConfigError(
            f"gpu_memory_utilization={config.gpu_memory_utilization} leaves too little memory for "
            f"what programs and collectives take beside it ({reason:.200}); lower it, or set fewer "
            "num_kv_pages"
        ) from error


def _settle(config: EngineConfig) -> tuple[ModelConfig, StepProgram, Policy]:
    """Model, programs and policy; every way in which they do not fit is a ``ConfigError``."""
    try:
        model = ModelConfig.from_pretrained(config.model_path)
        layout = layout_of(config, model)
        mesh = make_mesh(config.pool_size, config.tensor_parallel_size)
        check_tensor_parallel(config, model)
        policy = make_policy(config, model, _hardware(config, model, mesh))
        attention = _attention(config, model, mesh, policy.modes)
    except (FileNotFoundError, KernelError, ValueError) as error:
        raise ConfigError(str(error)) from error
    cache = ProgramCache.beside_jax(mesh.local_devices[0].platform)
    if cache is not None:
        cache.forget_unused()
    program = StepProgram(model, layout, mesh, attention, policy.was_fetch, cache)
    return model, program, policy


def _attention(config: EngineConfig, model: ModelConfig, mesh: Mesh, modes: tuple[str, ...]) -> str:
    """The implementation of attention and the other kernels; they are checked before use."""
    device = mesh.local_devices[0]
    chosen = config.attention
    if chosen == "auto":
        chosen = "reference" if device.platform == "cpu" else "mosaic"
    if chosen != "reference":
        products = tuple(model.layer_products(config.tensor_parallel_size).values())
        errors = self_check(
            heads=model.num_heads // config.tensor_parallel_size,
            kv_heads=model.num_kv_heads // config.tensor_parallel_size,
            head_dim=model.head_dim,
            page_size=config.page_size,
            products=products if CAS_STAGGERED in modes else (),
            dtype=jnp.dtype(config.dtype),
            implementation=chosen,
            device=device,
        )
        logger.info("kernels checked: relative errors %s", errors)
    return chosen


def _batch_layouts(
    config: EngineConfig, model: ModelConfig, max_model_len: int, attention: str
) -> tuple[BatchLayout, ...]:
    sizes = token_buckets(config.max_num_batched_tokens, config.max_num_seqs)
    if attention == "mosaic" and config.pool_size == 1:
        # Fewer tokens would be padded to a tile, and cut again, by two kernels in every layer; the
        # products of a tile take no longer. In a pool a small step is less to send.
        sizes = tuple(size for size in sizes if size >= TILE_TOKENS) or sizes
    return tuple(
        BatchLayout(
            tokens=tokens,
            seqs=config.max_num_seqs,
            pages=ceil(max_model_len / config.page_size),
            stop_ids=MAX_STOP_TOKEN_IDS + len(model.eos_token_ids),
        )
        for tokens in sizes
    )


def _num_pages(
    config: EngineConfig,
    program: StepProgram,
    weights: Weights,
    shapes: RunnerShapes,
    steps: tuple[Step, ...],
    max_model_len: int,
) -> int:
    """Pages of one replica: as configured, or as many as there is memory for."""
    wanted = config.num_kv_pages
    longest = shapes.batches[-1].pages
    if wanted is None and program.platform == "cpu":
        # More than this no batch could use; less where the host has not that much to give.
        wanted = min(config.max_num_seqs * longest, _host_pages(config, program))
    elif wanted is None:
        device = program.mesh.local_devices[0]
        memory = _usable_bytes(config, device)
        wanted = num_pages_that_fit(program, weights, shapes, steps, memory)
    if wanted < longest:
        raise ConfigError(
            f"the KV cache of a replica has {wanted} pages of {config.page_size} tokens, too few "
            f"for one sequence of max_model_len={max_model_len}; lower max_model_len to "
            f"{wanted * config.page_size} or less, or raise "
            f"{'num_kv_pages' if config.num_kv_pages else 'pool_size or gpu_memory_utilization'}"
        )
    return wanted


def _usable_bytes(config: EngineConfig, device: jax.Device) -> int:
    """The configured share of a GPU's memory; jax itself tells only the share that it allocated."""
    allocated = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
    limit = device.memory_stats()["bytes_limit"]
    return int(min(limit, limit / allocated * config.gpu_memory_utilization))


def _host_pages(config: EngineConfig, program: StepProgram) -> int:
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    model = program.config
    page = kv_bytes_per_page(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        page_size=config.page_size,
        dtype_bytes=jnp.dtype(config.dtype).itemsize,
    )
    return int(free * _HOST_SHARE) // (page * config.pool_size)


def _hardware(config: EngineConfig, model: ModelConfig, mesh: Mesh) -> Hardware:
    """The profile to decide by: as configured, that of the device, or measured now."""
    if config.hardware == MEASURE:
        hardware = measure_hardware(model, config.tensor_parallel_size, config.dtype)
        logger.info("hardware measured: %s", as_values(hardware))
        return hardware
    if config.hardware != "auto":
        return load_profile(config.hardware)
    device = mesh.devices.flat[0]
    return load_profile(profile_for(device.device_kind, device.platform))


def _log_sizes(engine: Engine, weights: Weights) -> None:
    program = engine.runner.program
    layout = program.layout
    others = "the others on the host" if layout.on_host else f"pool of {layout.pool_size}"
    if layout.pooled and not layout.on_host and WAS in engine.policy.modes:
        others += f", WaS by {program.was_fetch}"
    logger.info(
        "weights: %.2f GB per device, %d of %d layers resident, %s, attention: %s",
        nbytes_per_device(weights) / 1e9,
        layout.resident_layers,
        layout.num_layers,
        others,
        program.attention,
    )
    logger.info(
        "KV cache size: %s tokens, maximum concurrency for %s tokens per request: %.2fx",
        f"{engine.kv_tokens:,}",
        f"{engine.max_model_len:,}",
        engine.kv_tokens / engine.max_model_len,
    )
