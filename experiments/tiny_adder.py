"""The task and the files of the embedded model: sums of two numbers of one to four digits.

A problem is a pair of numbers, its prompt ``1234+567=``, its answer ``1801`` and the end token: one
token per character, most significant digit first. One in 16 pairs, chosen by a hash that ignores
the order of the two, is held out: it never enters the loss of ``train_tiny_adder.py``.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import tokenizers
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray
from safetensors.numpy import save_file

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.hf import export_tensors

Params = dict[str, Any]
"""``layers``: the parameters of ``layer_spec``, stacked over layers; ``outer``: the others."""

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
VOCABULARY = (*SPECIAL_TOKENS, *"0123456789+=")
PAD, BOS, EOS = 0, 1, 2
ZERO, PLUS, EQUALS = (VOCABULARY.index(token) for token in "0+=")

MAX_DIGITS = 4
# "9999+9999=" + "19998" + <eos>.
SEQUENCE = 2 * MAX_DIGITS + 2 + MAX_DIGITS + 2
POWERS = 10 ** np.arange(MAX_DIGITS + 2, dtype=np.int32)

HELD_OUT_SHARE = 16
# The first residue that leaves every sum a pair to learn it from. Residue 0, for one, holds out
# 0+1 and 1+0 and with them the answer 1, which no model can then give: an answer that starts with
# 1 would always be longer in training.
HELD_OUT_RESIDUE = 2
PROMPTS_SEED = 2026
NUM_PROMPTS = 512

# How often a number has 1, 2, 3, 4 digits: nearly even at the start, then like the size of the
# task. One digit stays rare: there are 100 such pairs, and often seen they are learned by heart.
EARLY_LENGTHS = np.array([0.20, 0.25, 0.25, 0.30], np.float32)
LATE_LENGTHS = np.array([0.10, 0.15, 0.25, 0.50], np.float32)
# Share of problems with long runs of digits that sum to 9, where one carry decides every digit.
CARRY_ROWS = 0.25
CARRY_DIGITS = 0.7


def is_held_out(
    a: Int[Array | np.ndarray, "n"], b: Int[Array | np.ndarray, "n"]
) -> Bool[Array | np.ndarray, "n"]:
    """Whether a pair is kept from training; a + b and b + a share their fate.

    The hash is the finalizer of MurmurHash3 over the ordered pair. Takes numpy and jax arrays.
    """
    low, high = (a + b - abs(a - b)) // 2, (a + b + abs(a - b)) // 2
    x = low.astype(np.uint32) * np.uint32(10**MAX_DIGITS) + high.astype(np.uint32)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(multiplier)
    return (x ^ (x >> np.uint32(16))) % np.uint32(HELD_OUT_SHARE) == HELD_OUT_RESIDUE


def sample_problems(
    key: PRNGKeyArray, batch: int, progress: Float[Array, ""]
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """Draws problems: digit lengths first, then digits, then longer carry chains for some rows.

    Args:
        key: Random key.
        batch: Number of problems.
        progress: From 0 at the first step to 1 at the last; moves the mix of lengths.
    """
    uniform = jax.random.uniform(key, (batch, 5 + MAX_DIGITS))
    weights = (1 - progress) * EARLY_LENGTHS + progress * LATE_LENGTHS
    shorter = uniform[:, 0:2, None] >= jnp.cumsum(weights)[:-1]
    lengths = 1 + jnp.sum(shorter, axis=-1)
    powers = jnp.asarray(POWERS)
    lowest, highest = jnp.where(lengths == 1, 0, powers[lengths - 1]), powers[lengths]
    numbers = lowest + jnp.floor(uniform[:, 2:4] * (highest - lowest)).astype(jnp.int32)
    place = powers[:MAX_DIGITS]
    a_digits, b_digits = jnp.moveaxis(numbers[:, :, None] // place % 10, 1, 0)
    # Leading zeros are no digits to chain: both numbers keep at most their length.
    chained = (uniform[:, 5:] < CARRY_DIGITS) & (place < highest.min(axis=1, keepdims=True))
    chained &= uniform[:, 4:5] < CARRY_ROWS
    b_digits = jnp.where(chained, 9 - a_digits, b_digits)
    return numbers[:, 0], jnp.sum(b_digits * place, axis=1)


def to_tokens(
    a: Int[Array, "n"], b: Int[Array, "n"]
) -> tuple[Int[Array, "n sequence"], Bool[Array, "n sequence"]]:
    """Writes problems with their answers and the end token, padded on the right.

    Returns:
        The tokens, and which of them belong to the answer (the end token among them).
    """
    powers, total = jnp.asarray(POWERS), a + b
    position = jnp.arange(SEQUENCE)[None, :]
    tokens = jnp.full((a.shape[0], SEQUENCE), PAD)
    end = 0
    for number, end_mark in ((a, PLUS), (b, EQUALS), (total, EOS)):
        start, number = end, number[:, None]
        length = jnp.maximum(1, jnp.sum(number >= powers, axis=1, keepdims=True))
        exponent = start + length - 1 - position
        digit = number // powers[jnp.clip(exponent, 0, len(POWERS) - 1)] % 10
        tokens = jnp.where((position >= start) & (exponent >= 0), ZERO + digit, tokens)
        tokens = jnp.where(exponent == -1, end_mark, tokens)
        end = start + length + 1
    return tokens, (position >= start) & (position < end)


def held_out_problems(rng: np.random.Generator, count: int) -> np.ndarray:
    """Different held-out problems, int32 ``[count, 2]``, as even over digit lengths as there are.

    Args:
        rng: Source of the numbers.
        count: Number of problems; lengths with few problems, such as (1, 1), give what they have.
    """
    found: list[list[tuple[int, int]]] = []
    for lengths in np.ndindex(MAX_DIGITS, MAX_DIGITS):
        lowest = [10**n if n else 0 for n in lengths]
        highest = [10 ** (n + 1) for n in lengths]
        draws = rng.integers(lowest, highest, (max(1_000, 3 * HELD_OUT_SHARE * count), 2), np.int32)
        draws = draws[is_held_out(draws[:, 0], draws[:, 1])]
        found.append(list(dict.fromkeys(map(tuple, draws.tolist()))))
    found.sort(key=len)
    problems: list[tuple[int, int]] = []
    for place, candidates in enumerate(found):
        problems += candidates[: -(-(count - len(problems)) // (len(found) - place))]
    if len(problems) != count:
        raise ValueError(f"{count=} held-out problems asked for, {len(problems)} found")
    return rng.permutation(np.array(problems, np.int32))


def carry_chain_problems(rng: np.random.Generator, count: int) -> np.ndarray:
    """Up to ``count`` different held-out problems whose sum is within 2 of 100, 1000 or 10000."""
    total = 10 ** rng.integers(2, MAX_DIGITS + 1, 4 * HELD_OUT_SHARE * count)
    total = total + rng.integers(-2, 3, total.size)
    a = np.minimum(rng.integers(0, total), 10**MAX_DIGITS - 1)
    problems = np.stack([a, total - a], axis=1).astype(np.int32)
    problems = problems[(problems.max(axis=1) < 10**MAX_DIGITS) & (problems.min(axis=1) >= 0)]
    problems = np.unique(problems[is_held_out(problems[:, 0], problems[:, 1])], axis=0)
    return rng.permutation(problems)[:count]


def prompt_problems() -> np.ndarray:
    """The problems of ``prompts.jsonl``, int32 ``[512, 2]``, whatever the model."""
    return held_out_problems(np.random.default_rng(PROMPTS_SEED), NUM_PROMPTS)


def model_values(num_layers: int, hidden: int, head_dim: int, ffn: int) -> dict[str, Any]:
    """The contents of ``config.json``: four query heads, two key and value heads."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 256,
        "initializer_range": 0.02,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def make_tokenizer() -> tokenizers.Tokenizer:
    """One token per character and nothing added; what is not in the vocabulary is ``<unk>``."""
    model = tokenizers.models.BPE(
        vocab={token: index for index, token in enumerate(VOCABULARY)},
        merges=[],
        unk_token="<unk>",
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "pad_token": "<pad>",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 256,
    # The last message is the prompt: the model knows sums and no conversations.
    "chat_template": "{{ messages[-1]['content'] }}",
}


def export(folder: Path, values: dict, params: Params) -> None:
    """Writes the checkpoint, its tokenizer and the prompts to ``folder``, all in one level."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(values)
    stored = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    layers = [
        {name: stacked[i] for name, stacked in stored["layers"].items()}
        for i in range(config.num_layers)
    ]
    save_file(
        export_tensors(config, layers, stored["outer"]),
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    for name, contents in (
        ("config.json", values),
        ("generation_config.json", generation),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n")
    make_tokenizer().save(str(folder / "tokenizer.json"))
    rows = [
        {"custom_id": f"sum-{i:03d}", "prompt": f"{a}+{b}=", "expected": str(a + b)}
        for i, (a, b) in enumerate(prompt_problems().tolist())
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
