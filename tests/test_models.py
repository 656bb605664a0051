"""Our models say what Hugging Face transformers says, from golden files and live.

The engine is not involved: the layers are run one after the other around a dense attention, which
is also the oracle of the seam between a layer and its attention.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import FAMILIES, GOLDEN, layer_params

from sidp_jax.checkpoint import load_weights
from sidp_jax.mesh import make_mesh
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import bind_layer, embed, head_logits
from sidp_jax.pool import PoolLayout


def dense_attention(q, k, v):
    """Causal attention of one sequence over itself, one head at a time."""
    tokens, heads, size = q.shape
    causal = np.tril(np.ones((tokens, tokens), bool))
    out = []
    for head in range(heads):
        group = head // (heads // k.shape[1])
        scores = q[:, head] @ k[:, group].T / size**0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
        out.append(weights @ v[:, group])
    return jnp.stack(out, axis=1)


class Dense:
    """A model that is loaded as the engine loads it, and run without one."""

    def __init__(self, folder: Path):
        self.config = config = ModelConfig.from_pretrained(folder)
        layout = PoolLayout(config.num_layers, 2)
        self.weights = load_weights(
            folder, config, layout, make_mesh(2), dtype="float32", layer_loop="unrolled"
        )
        self.layers = [layer_params(self.weights, layout, i) for i in range(config.num_layers)]

    def logits(self, tokens) -> np.ndarray:
        """Logits of every position of one sequence, ``[tokens, vocabulary]``."""
        # Padded, so that a growing sequence is one program; causality hides the padding.
        padded = np.zeros(-(-len(tokens) // 64) * 64, np.int32)
        padded[: len(tokens)] = tokens
        return np.asarray(self._forward(padded))[: len(tokens), : self.config.vocab_size]

    def _forward(self, tokens):
        table, norm, head = self.weights.embedding, self.weights.final_norm, self.weights.head
        head = table if head is None else head
        table, norm, head = (np.asarray(array) for array in (table, norm, head))
        return _run(self.config, table, self.layers, norm, head, tokens)

    def greedy(self, prompt, steps: int) -> list[int]:
        """The greedy continuation, everything computed anew for each token."""
        tokens = list(prompt)
        for _ in range(steps):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


@jax.jit(static_argnums=0)
def _run(config, table, layers, norm, head, tokens):
    positions = jnp.arange(len(tokens), dtype=jnp.int32)
    x = embed(table, tokens, 0)
    for params in layers:
        layer = bind_layer(config, params)
        x = layer.post_attention(x, dense_attention(*layer.pre_attention(x, positions)))
    return head_logits(x, norm, head, config.rms_norm_eps)


def assert_close(ours, theirs):
    """Every position's logits agree to 1e-4 of their norm."""
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    assert error.max() <= 1e-4, error


@pytest.fixture(scope="module", params=FAMILIES)
def golden(request):
    folder = GOLDEN / request.param
    return Dense(folder), np.load(folder / "golden.npz")


def prompts_of(golden):
    return [row[row >= 0].tolist() for row in golden["prompts"]]


def test_golden_logits(golden):
    model, golden = golden
    prompts = prompts_of(golden)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    for prompt, theirs in zip(prompts, np.split(golden["logits"], ends[:-1]), strict=True):
        assert_close(model.logits(prompt), theirs)


def test_golden_greedy_tokens(golden):
    model, golden = golden
    for prompt, theirs in zip(prompts_of(golden), golden["greedy"].tolist(), strict=True):
        assert model.greedy(prompt, len(theirs)) == theirs


def test_golden_files_cover_what_differs_between_models():
    configs = [ModelConfig.from_pretrained(GOLDEN / family) for family in FAMILIES]
    assert {config.queries_per_kv_head for config in configs} == {1, 2, 4}
    assert {config.tie_word_embeddings for config in configs} == {True, False}
    assert any(config.head_dim != config.hidden_size // config.num_heads for config in configs)
    (scaling,) = (config.rope_scaling for config in configs if config.rope_scaling)
    assert scaling.original_max_position_embeddings < 48


@pytest.mark.filterwarnings("default")  # those of torch and transformers are not ours
@pytest.mark.parametrize("family", FAMILIES)
def test_live_against_transformers(tmp_path, family):
    pytest.importorskip("torch", reason="the live comparison needs torch, the golden files do not")
    path = Path(__file__).parent.parent / "experiments" / "make_golden.py"
    spec = importlib.util.spec_from_file_location("make_golden", path)
    make_golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_golden)

    for seed in range(1000, 1100):  # other seeds than those of the golden files
        theirs = make_golden.make_model(tmp_path, make_golden.FAMILIES[family], seed)
        tokens = np.random.default_rng(seed).integers(0, 199, 60).tolist()
        continuation = make_golden.greedy(theirs, tokens[:9], 16)
        if continuation is not None:  # none of its choices is too close to call
            break
    ours = Dense(tmp_path)
    assert_close(ours.logits(tokens), make_golden.logits_of(theirs, tokens))
    assert ours.greedy(tokens[:9], 16) == continuation
