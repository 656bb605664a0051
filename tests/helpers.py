"""Small random models for the tests of modes, steps and the engine."""

from itertools import product

import jax
import numpy as np

from sidp_jax.batch import BatchLayout, token_buckets
from sidp_jax.engine import Engine
from sidp_jax.hardware import load_profile
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import layer_spec
from sidp_jax.modes.policy import LayerShape, Policy, PolicyState
from sidp_jax.pace import StepCosts
from sidp_jax.pool import PoolLayout
from sidp_jax.program_cache import ProgramCache
from sidp_jax.runner import Runner, RunnerShapes
from sidp_jax.scheduler import Scheduler, SchedulerConfig
from sidp_jax.step import StepProgram
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


class Alternating(Policy):
    """A policy that changes the mode at every step."""

    def decide(self, state, tokens):
        return PolicyState(self.modes[state.steps % len(self.modes)], state.steps + 1), None


def make_engine(
    *,
    modes: tuple[str, ...] = ("was",),
    policy_type: type[Policy] = Policy,
    config: ModelConfig | None = None,
    pool_size: int = 2,
    tensor_size: int = 1,
    resident_layers: int = 0,
    layer_loop: str = "scan",
    was_fetch: str = "collective",
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 16,
    max_model_len: int = 48,
    page_size: int = 4,
    num_kv_pages: int = 64,
    prefix_caching: bool = True,
    cache: ProgramCache | None = None,
) -> Engine:
    """An engine over a small random model, warmed up."""
    config = config or small_config(5)
    if modes == ("replicated",):
        resident_layers = config.num_layers
    layout = PoolLayout(config.num_layers, pool_size, resident_layers)
    mesh = make_mesh(pool_size, tensor_size)
    shapes = RunnerShapes(
        batches=tuple(
            BatchLayout(tokens, max_num_seqs, max_model_len // page_size, 17)
            for tokens in token_buckets(max_num_batched_tokens)
        ),
        max_num_seqs=max_num_seqs,
        page_size=page_size,
        num_kv_pages=num_kv_pages,
        kv_dtype=np.dtype(np.float32),
    )
    program = StepProgram(config, layout, mesh, "reference", was_fetch, cache)
    weights = random_weights(config, layout, mesh, layer_loop)
    shape = LayerShape(config.num_layers, 1 << 20, 1e6, 128, 512, 128)
    policy = policy_type(modes, pool_size, shape, load_profile("h200"))
    steps = tuple(product(modes, shapes.batches))
    runner = Runner(program, weights, shapes, steps)
    runner.warm_up()
    scheduler = Scheduler(
        SchedulerConfig(
            pool_size,
            max_num_seqs,
            max_num_batched_tokens,
            max_model_len,
            page_size,
            num_kv_pages,
            StepCosts(
                tuple(batch.tokens for batch in shapes.batches),
                tuple(10.0 + batch.tokens for batch in shapes.batches),
            ),
            prefix_caching,
        )
    )
    return Engine(runner, scheduler, policy, max_model_len=max_model_len, seed=0, tokenizer=None)


def run_requests(engine: Engine, requests: dict, *, every_step=lambda: None) -> dict:
    """Runs ``{request_id: (prompt, params)}`` to the end; returns the outputs by id."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    outputs = {}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id] = output
        engine.scheduler.check_integrity()
        every_step()
    assert engine.scheduler.kv_usage == 0
    return outputs
