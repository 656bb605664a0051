"""Trains the embedded model ``sidp_jax/assets/tiny_adder``: sums of two numbers of 1 to 4 digits.

The model reads ``1234+567=`` one character per token and answers ``1801`` and the end token, most
significant digit first. A program can check every answer, so the model shows whether an engine
computes the right thing. It is a Qwen3 architecture in the Hugging Face format, its weights
stored as bfloat16.

Problems are drawn afresh for each batch; accuracies and ``prompts.jsonl`` are of held-out pairs
alone (``tiny_adder.py`` has the task). Problems and initial weights follow from the seed; on a GPU
the trained weights do so up to the order of floating-point sums. Needs the extra ``train``::

    python experiments/train_tiny_adder.py --steps 5000 --batch 1024 [--max-seconds 300]
    python experiments/train_tiny_adder.py --smoke --out outputs/adder --results outputs/adder.json
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tiny_adder import (
    EOS,
    MAX_DIGITS,
    PAD,
    PROMPTS_SEED,
    VOCABULARY,
    Params,
    carry_chain_problems,
    export,
    held_out_problems,
    is_held_out,
    model_values,
    prompt_problems,
    sample_problems,
    to_tokens,
)

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.decoder import bind_layer, head_logits, layer_spec
from sidp_jax.models.hf import EMBEDDING, FINAL_NORM, outer_shapes

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps; the learning rate falls along a cosine to 0 at the last one.
        batch: Problems per step.
        seed: Seed of the initial weights and of the problems.
        learning_rate: Highest learning rate, after the warm-up.
        warmup_steps: Steps of linear warm-up, at most a tenth of all steps.
        weight_decay: AdamW's decay of the kernels; norms and embedding do not decay.
        log_every: Steps between two log lines.
        eval_every: Steps between two accuracies on held-out problems.
        eval_prompts: Held-out problems of the last evaluation.
        max_seconds: Training stops early after this time, in seconds.
    """

    steps: int = 5_000
    batch: int = 1024
    seed: int = 0
    learning_rate: float = 1.5e-3
    warmup_steps: int = 500
    weight_decay: float = 0.1
    log_every: int = 250
    eval_every: int = 2_500
    eval_prompts: int = 4_096
    max_seconds: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "eval_every", "eval_prompts", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draws float32 parameters: normal with variance 1 / fan-in, norms 1.

    The projections that write to the residual stream are smaller by sqrt(2 layers), as in GPT-2
    (Radford et al. 2019, section 2.3).
    """
    rng = np.random.default_rng(seed)
    layers = {}
    for name, spec in layer_spec(config).items():
        shape = (config.num_layers, *spec.shape)
        if name.endswith(".scale"):
            layers[name] = np.ones(shape, np.float32)
            continue
        writes = name in ("out.kernel", "down.kernel")
        fan_in = int(np.prod(spec.shape[1:])) if writes else config.hidden_size
        scale = (fan_in * (2 * config.num_layers if writes else 1)) ** -0.5
        layers[name] = rng.normal(0.0, scale, shape).astype(np.float32)
    outer = {
        name: rng.normal(0.0, config.hidden_size**-0.5, shape).astype(np.float32)
        if name == EMBEDDING
        else np.ones(shape, np.float32)
        for name, shape in outer_shapes(config).items()
    }
    return jax.tree.map(jnp.asarray, {"layers": layers, "outer": outer})


def causal_attention(
    q: Float[Array, "rows length heads head_dim"],
    k: Float[Array, "rows length kv_heads head_dim"],
    v: Float[Array, "rows length kv_heads head_dim"],
) -> Float[Array, "rows length heads head_dim"]:
    """Dense causal attention with grouped query heads; no sequence is longer than a line here."""
    rows, length, heads, head_dim = q.shape
    grouped = q.reshape(rows, length, k.shape[2], -1, head_dim)
    scores = jnp.einsum("bqkgh,bskh->bkgqs", grouped, k) * head_dim**-0.5
    mask = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bkgqs,bskh->bqkgh", weights, v).reshape(rows, length, heads, head_dim)


def forward(
    config: ModelConfig, params: Params, tokens: Int[Array, "rows length"]
) -> Float[Array, "rows length vocab"]:
    """Logits of every position of a batch of sequences that start at position 0."""
    rows, length = tokens.shape
    positions = jnp.tile(jnp.arange(length), rows)
    embedding = params["outer"][EMBEDDING]
    # `decoder.embed` as a product: its gradient would be a scatter-add of all tokens into 16
    # rows, which is slow on a GPU and sums in no fixed order.
    x = jax.nn.one_hot(tokens.reshape(-1), len(embedding)) @ embedding

    def layer_step(x, layer_params):
        layer = bind_layer(config, layer_params)
        q, k, v = layer.pre_attention(x, positions)
        q, k, v = (y.reshape(rows, length, *y.shape[1:]) for y in (q, k, v))
        attended = causal_attention(q, k, v)
        return layer.post_attention(x, attended.reshape(rows * length, *attended.shape[2:])), None

    x, _ = jax.lax.scan(layer_step, x, params["layers"])
    logits = head_logits(x, params["outer"][FINAL_NORM], embedding, config.rms_norm_eps)
    return logits.reshape(rows, length, -1)


def loss_of(
    config: ModelConfig, params: Params, a: Int[Array, "batch"], b: Int[Array, "batch"]
) -> Float[Array, ""]:
    """Mean cross-entropy of the answers' tokens, in nats; held-out problems weigh nothing."""
    tokens, answer = to_tokens(a, b)
    logits = forward(config, params, tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    weights = answer[:, 1:] & ~is_held_out(a, b)[:, None]
    return jnp.sum(losses * weights) / jnp.maximum(1, jnp.sum(weights))


def make_optimizer(train: TrainConfig) -> optax.GradientTransformation:
    """AdamW with linear warm-up, a cosine to 0 and clipped gradients; only kernels decay."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, train.learning_rate, min(train.warmup_steps, 1 + train.steps // 10), train.steps
    )

    def decays(params: Params) -> Params:
        return {part: {name: name.endswith(".kernel") for name in params[part]} for part in params}

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=train.weight_decay, mask=decays),
    )


@partial(jax.jit, static_argnames=("config", "train"), donate_argnames=("params", "state"))
def train_step(
    config: ModelConfig, train: TrainConfig, params: Params, state, step: Int[Array, ""]
):
    """Draws a batch and makes one optimizer step; returns ``(params, state, loss)``."""
    key = jax.random.fold_in(jax.random.key(train.seed), step)
    a, b = sample_problems(key, train.batch, step / train.steps)
    loss, gradients = jax.value_and_grad(partial(loss_of, config))(params, a, b)
    updates, state = make_optimizer(train).update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


@partial(jax.jit, static_argnames="config")
def next_tokens(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, "rows"],
) -> Int[Array, "rows"]:
    """The likeliest token after the first ``lengths`` tokens of each row, in full float32."""
    with jax.default_matmul_precision("highest"):
        logits = forward(config, params, tokens)
    return jnp.argmax(logits[jnp.arange(len(tokens)), lengths - 1], axis=-1)


def greedy_answers(
    config: ModelConfig, params: Params, problems: np.ndarray, rows: int = 256
) -> list[str | None]:
    """Answers problems greedily, by recomputation and without a cache.

    Args:
        config: The model's architecture.
        params: Its parameters, float32.
        problems: Int ``[n, 2]``, the two numbers.
        rows: Problems per call of the model.

    Returns:
        The text before the end token; None where none came in time.
    """
    answers: list[str | None] = []
    for first in range(0, len(problems), rows):
        batch = problems[first : first + rows]
        padded = jnp.asarray(np.resize(batch, (rows, 2)))  # one shape, one compilation
        tokens, answer = (np.array(x) for x in to_tokens(padded[:, 0], padded[:, 1]))
        tokens[answer] = PAD
        starts = answer.argmax(axis=1)
        for made in range(MAX_DIGITS + 2):
            tokens[np.arange(rows), starts + made] = next_tokens(
                config, params, tokens, starts + made
            )
        for row, start in zip(tokens[: len(batch)].tolist(), starts, strict=False):
            made = row[start : start + MAX_DIGITS + 2]
            text = (
                "".join(VOCABULARY[token] for token in made[: made.index(EOS)])
                if EOS in made
                else None
            )
            answers.append(text)
    return answers


def accuracies(config: ModelConfig, params: Params, problems: np.ndarray) -> dict[str, list[int]]:
    """Right answers and problems, ``{"all": [right, problems], "1+1": ..., "4+4": ...}``."""
    counts: dict[str, list[int]] = {"all": [0, 0]}
    for (a, b), answer in zip(
        problems.tolist(), greedy_answers(config, params, problems), strict=True
    ):
        for key in ("all", f"{len(str(a))}+{len(str(b))}"):
            right, total = counts.setdefault(key, [0, 0])
            counts[key] = [right + (answer == str(a + b)), total + 1]
    return dict(sorted(counts.items()))


def run_training(config: ModelConfig, train: TrainConfig) -> Iterator[tuple[int, Params, float]]:
    """Trains; yields ``(steps done, params, loss)`` at each log step and at the end.

    What is yielded is donated to the next step: use it before asking for more.
    """
    params = init_params(config, train.seed)
    state = make_optimizer(train).init(params)
    begin = time.monotonic()
    for step in range(train.steps):
        params, state, loss = train_step(config, train, params, state, jnp.int32(step))
        done = step + 1
        if done % train.log_every == 0 or done == train.steps:
            late = time.monotonic() - begin > train.max_seconds
            yield done, params, float(loss)
            if late:
                print(f"stopped after {train.max_seconds:.0f} s, at step {done} of {train.steps}")
                return


def round_to_stored(params: Params) -> Params:
    """The parameters as float32 values of what the checkpoint stores, bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params)


def report(
    config: ModelConfig, train: TrainConfig, params: Params, steps: int, seconds: float
) -> dict[str, Any]:
    """Evaluates the stored weights; returns the contents of ``training.json``."""
    rounded = round_to_stored(params)
    rng = np.random.default_rng(PROMPTS_SEED + 1)
    counts = {
        "held_out": accuracies(config, rounded, held_out_problems(rng, train.eval_prompts)),
        "carry_chains": accuracies(config, rounded, carry_chain_problems(rng, train.eval_prompts)),
        "prompts": accuracies(config, rounded, prompt_problems()),
    }
    counts["carry_chains"] = {"all": counts["carry_chains"]["all"]}
    return {
        "train": {**asdict(train), "max_seconds": None},
        "steps_done": steps,
        "seconds": round(seconds, 1),
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "right_of_held_out": counts,
        "accuracy": {name: rows["all"][0] / rows["all"][1] for name, rows in counts.items()},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
        },
        "platform": jax.devices()[0].device_kind,
    }


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model tiny_adder.")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig.learning_rate)
    parser.add_argument("--weight-decay", type=float, default=TrainConfig.weight_decay)
    parser.add_argument("--max-seconds", type=float, default=TrainConfig.max_seconds)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--ffn", type=int, default=192)
    parser.add_argument("--out", type=Path, default=ROOT / "sidp_jax/assets/tiny_adder")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "experiments/results/tiny_adder_training.json"
    )
    parser.add_argument("--smoke", action="store_true", help="a very small model and few steps")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Trains, evaluates and exports; returns the contents of ``training.json``."""
    args = parse_arguments(arguments)
    train = TrainConfig(
        steps=args.steps,
        batch=args.batch,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        max_seconds=args.max_seconds,
    )
    values = model_values(args.layers, args.hidden, args.head_dim, args.ffn)
    if args.smoke:
        values = model_values(3, 32, 8, 64)
        train = replace(train, steps=60, batch=64, log_every=10, eval_every=60, eval_prompts=128)
    config = ModelConfig.from_dict(values)
    watched = held_out_problems(np.random.default_rng(PROMPTS_SEED + 2), train.eval_prompts // 4)
    begin, losses = time.monotonic(), []
    for steps, params, loss in run_training(config, train):
        losses.append(loss)
        line = f"step {steps:6d}  loss {loss:.5f}  {time.monotonic() - begin:6.1f} s"
        if steps % train.eval_every == 0:
            right, total = accuracies(config, params, watched)["all"]
            line += f"  held out {right}/{total}"
        print(line, flush=True)
    result = {**report(config, train, params, steps, time.monotonic() - begin), "losses": losses}
    export(args.out, values, params)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=2) + "\n")
    for name, counts in result["right_of_held_out"].items():
        for lengths, (right, total) in counts.items():
            print(f"{name:13s} {lengths:4s} {right:5d} / {total:5d}  {right / total:8.4%}")
    return result


if __name__ == "__main__":
    main()
