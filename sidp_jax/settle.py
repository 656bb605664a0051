"""What a configuration leaves open, settled in one place for plan and engine. No jax."""

from __future__ import annotations

from collections.abc import Sequence

from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.estimate import layer_shape
from sidp_jax.hardware import Hardware
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import (
    CAS,
    CAS_STAGGERED,
    COLLECTIVE,
    HOST,
    REPLICATED,
    WAS,
    Policy,
    preferred_fetch,
)
from sidp_jax.pace import StepCosts
from sidp_jax.pool import PoolLayout

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def is_plain(config: EngineConfig) -> bool:
    """Whether all layers are at home: in ``replicated``, and in a pool of one in any mode."""
    return not config.pool_host_layers and (config.mode == REPLICATED or config.pool_size == 1)


def layout_of(config: EngineConfig, model: ModelConfig) -> PoolLayout:
    """Who owns what.

    Raises:
        ValueError: The model has fewer layers than that takes.
    """
    if config.pool_host_layers > model.num_layers:
        raise ConfigError(
            f"pool_host_layers={config.pool_host_layers} must be at most the model's "
            f"{model.num_layers} layers"
        )
    if config.pool_host_layers:
        return PoolLayout(
            model.num_layers, 1, model.num_layers - config.pool_host_layers, on_host=True
        )
    resident = model.num_layers if is_plain(config) else config.resident_layers
    return PoolLayout(model.num_layers, config.pool_size, resident)


def modes_of(config: EngineConfig, hardware: Hardware) -> tuple[str, ...]:
    """The modes that steps may run in; among several the policy picks step by step.

    Args:
        config: The configuration.
        hardware: ``cas_schedule: auto`` tries the staggered schedule only where the profile has an
            indexed GEMM: without one a slab row that differs between devices is copied, and takes
            several layers of memory.
    """
    if is_plain(config):
        return (REPLICATED,)
    if config.mode == WAS or config.pool_host_layers:
        return (WAS,)
    staggered = bool(hardware.indexed_matmul_ratio) and not config.resident_layers
    cas = {
        "lockstep": (CAS,),
        "staggered": (CAS_STAGGERED,),
        "auto": (CAS, CAS_STAGGERED) if staggered else (CAS,),
    }[config.cas_schedule]
    return cas if config.mode == CAS else (WAS, *cas)


def was_fetch_of(config: EngineConfig, hardware: Hardware) -> str:
    """How WaS fetches layers: as configured, from the host, or as the hardware does best."""
    if config.pool_host_layers:
        return HOST
    if config.was_fetch != "auto":
        return config.was_fetch
    if config.layer_loop == "scan" or is_plain(config):
        return COLLECTIVE
    return preferred_fetch(hardware, config.pool_size)


def make_policy(config: EngineConfig, model: ModelConfig, hardware: Hardware) -> Policy:
    """The policy that decides each step of a run.

    Raises:
        ConfigError: Layers lie on the host, and the profile does not know how fast they come.
    """
    modes, layout = modes_of(config, hardware), layout_of(config, model)
    if layout.on_host and not hardware.host_bandwidth:
        raise ConfigError(
            f"pool_host_layers={config.pool_host_layers} needs a hardware profile with "
            f"host_bandwidth, which {hardware.name!r} has not; set hardware=measure"
        )
    return Policy(
        modes,
        config.pool_size,
        layer_shape(model, config.tensor_parallel_size, DTYPE_BYTES[config.dtype]),
        hardware,
        resident_layers=layout.resident_layers,
        was_fetch=was_fetch_of(config, hardware),
    )


def step_costs(policy: Policy, sizes: Sequence[int]) -> StepCosts:
    """Estimated time of the layers at each size of a step, in the mode that the policy prefers."""
    layers = policy.shape.num_layers
    return StepCosts(
        tuple(sizes),
        tuple(layers * min(policy.seconds(mode, size) for mode in policy.modes) for size in sizes),
    )


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence in tokens: as configured, or the model's own limit.

    Raises:
        ConfigError: It is longer than the model was made for.
    """
    longest = model.max_position_embeddings
    if config.max_model_len is None:
        return longest
    if config.max_model_len > longest:
        raise ConfigError(
            f"max_model_len={config.max_model_len} is more than the {longest} positions that the "
            f"model was made for; lower it"
        )
    return config.max_model_len


def check_tensor_parallel(config: EngineConfig, model: ModelConfig) -> None:
    """Looks whether the devices of a replica can share out a layer.

    Raises:
        ConfigError: They cannot.
    """
    size = config.tensor_parallel_size
    for what, count in (
        ("key and value heads", model.num_kv_heads),
        ("columns of the feed-forward layer", model.intermediate_size),
    ):
        if count % size:
            raise ConfigError(
                f"tensor_parallel_size={size} must divide the model's {count} {what}; lower it and "
                f"raise pool_size instead"
            )
