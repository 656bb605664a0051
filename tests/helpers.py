"""Small random models for the tests of modes, steps and the engine."""

import jax
import numpy as np

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.pool import PoolLayout
from sidp_jax.weights import Weights, weights_spec


def small_config(num_layers: int = 6, *, architecture: str = "Qwen3ForCausalLM", **changes):
    """A model of a few thousand parameters, with grouped queries."""
    values = {
        "architectures": [architecture],
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
    }
    return ModelConfig.from_dict({**values, **changes})


def layer_values(config: ModelConfig, layer: int) -> dict[str, np.ndarray]:
    """Random parameters of one layer; the same whatever the pool."""
    rng = np.random.default_rng((17, layer))
    values = {}
    for name, spec in layer_spec(config).items():
        scale = 0.2 if name.endswith("kernel") else 0.3
        centre = 1.0 if "norm" in name else 0.0
        values[name] = (centre + scale * rng.standard_normal(spec.shape)).astype(np.float32)
    return values


def random_weights(config: ModelConfig, layout: PoolLayout, mesh, layer_loop: str) -> Weights:
    """Weights of a random model, placed as the engine would."""
    spec = weights_spec(config, layout, mesh, layer_loop=layer_loop, dtype=np.dtype(np.float32))
    zero = {name: np.zeros(s.shape, np.float32) for name, s in layer_spec(config).items()}
    values = {None: zero} | {i: layer_values(config, i) for i in range(config.num_layers)}

    def stack(layers: list, name: str) -> np.ndarray:
        return np.stack([values[layer][name] for layer in layers])

    pool = range(layout.pool_size)
    grid = [[layout.layer_at(row, owner) for owner in pool] for row in range(layout.rows)]
    by_owner = [[row[owner] for row in grid] for owner in pool]
    if layer_loop == "scan":
        pooled = {n: np.stack([stack(layers, n) for layers in by_owner]) for n in zero if grid}
        resident = {n: stack(list(layout.resident), n) for n in zero if layout.resident}
        pooled, resident = pooled or (), resident or ()
    else:
        pooled = tuple({n: stack(row, n) for n in zero} for row in grid)
        resident = tuple(values[layer] for layer in layout.resident)
    rng = np.random.default_rng(5)

    def table() -> np.ndarray:
        rows = np.zeros(spec.embedding.shape, np.float32)
        rows[: config.vocab_size] = rng.standard_normal((config.vocab_size, config.hidden_size))
        return rows

    embedding, norm = table(), np.ones(config.hidden_size, np.float32)
    head = None if config.tie_word_embeddings else table()
    host = Weights(pooled, resident, embedding, norm, head)
    return jax.tree.map(lambda leaf, value: jax.device_put(value, leaf.sharding), spec, host)
