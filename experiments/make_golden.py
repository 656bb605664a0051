"""Makes ``tests/golden``: tiny random checkpoints and what Hugging Face transformers says of them.

One folder for each family, in the files' published form: ``config.json`` with the keys of the
released models, safetensors in one file or in shards with an index, and ``golden.npz``:

- ``prompts`` int32 ``[prompts, longest]``, padded with -1;
- ``logits`` float32 ``[all prompt tokens, vocabulary]``, of every prompt position, in order;
- ``greedy`` int32 ``[prompts, 24]``, the greedy continuation, end tokens ignored.

Everything is float32 on the CPU. Needs torch and transformers, which the tests do not::

    python experiments/make_golden.py [--output tests/golden]
"""

import argparse
import itertools
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

PROMPT_LENGTHS = (1, 7, 33, 48)
GREEDY_TOKENS = 24
# A greedy choice closer than this could go either way in another summation order.
MIN_GAP = 5e-3
# Fewer different tokens in the continuations would let a wrong model pass by luck.
MIN_DISTINCT = 30


@dataclass(frozen=True)
class Family:
    """One checkpoint to make.

    Attributes:
        config: Contents of its ``config.json``.
        shard_size: Largest file, as transformers writes it; a model above it gets an index.
        common: The keys that all families share.
    """

    config: dict[str, Any]
    shard_size: str = "1GB"
    common: dict[str, Any] = field(
        default_factory=lambda: {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "torch_dtype": "float32",
            "max_position_embeddings": 128,
        }
    )


# Between them: 1, 2 and 4 query heads for each key head; a head_dim that is derived or given and
# then is not hidden / heads; tied and untied embeddings; vocabularies and layer counts that the
# pool sizes of the tests do not divide; all three branches of Llama 3.1's frequency scaling.
FAMILIES = {
    "qwen2": Family(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 199,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "sliding_window": 64,
            "use_sliding_window": False,
            "tie_word_embeddings": True,
        }
    ),
    "qwen3": Family(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 203,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 5,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "attention_bias": False,
            "tie_word_embeddings": False,
        }
    ),
    "llama": Family(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 200,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
        },
        shard_size="70KB",
    ),
}


def randomize(model: PreTrainedModel, seed: int) -> None:
    """Draws weights that make every parameter matter: norms off 1, biases off 0, sharp logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith(".bias"):
                parameter.copy_(0.5 * noise)
            elif "embed_tokens" in name:
                # Small, or the residual stream is the last token and a tied head repeats it.
                parameter.copy_(0.3 * noise)
            elif "lm_head" in name:
                parameter.copy_(4.0 * noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)


def make_model(folder: Path, family: Family, seed: int) -> PreTrainedModel:
    """Writes a family's random checkpoint to ``folder`` and returns the model, in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**family.common, **family.config}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    randomize(model, seed)
    with tempfile.TemporaryDirectory() as scratch:
        # transformers rewrites config.json in its own newest form; keep the published one.
        model.save_pretrained(scratch, max_shard_size=family.shard_size)
        for file in Path(scratch).glob("model*.safetensors*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return model


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits of every position of one sequence, ``[tokens, vocabulary]``, without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def greedy(model: PreTrainedModel, prompt: list[int], steps: int) -> list[int] | None:
    """The greedy continuation, from full recomputation; None if a choice is too close to call."""
    tokens = list(prompt)
    for _ in range(steps):
        last = logits_of(model, tokens)[-1]
        second, first = np.sort(last)[-2:]
        if first - second < MIN_GAP:
            return None
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


def make_golden(folder: Path, family: Family, seed: int) -> dict[str, np.ndarray] | None:
    """Writes one family's checkpoint; returns the golden arrays, None if the seed does not do."""
    shutil.rmtree(folder, ignore_errors=True)
    model = make_model(folder, family, seed)
    rng = np.random.default_rng(seed)
    prompts = [
        rng.integers(3, family.config["vocab_size"], length).tolist() for length in PROMPT_LENGTHS
    ]
    continuations = [greedy(model, prompt, GREEDY_TOKENS) for prompt in prompts]
    if None in continuations or len(np.unique(continuations)) < MIN_DISTINCT:
        return None
    padded = np.full((len(prompts), max(PROMPT_LENGTHS)), -1, np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {
        "prompts": padded,
        "logits": np.concatenate([logits_of(model, prompt) for prompt in prompts]),
        "greedy": np.array(continuations, np.int32),
    }


def main() -> None:
    """Writes all families, each from the first seed that does."""
    parser = argparse.ArgumentParser(description="Make the golden files of the tests.")
    parser.add_argument("--output", type=Path, default=Path("tests/golden"))
    output = parser.parse_args().output
    for name, family in FAMILIES.items():
        folder = output / name
        for seed in itertools.count():
            golden = make_golden(folder, family, seed)
            if golden is not None:
                break
        np.savez_compressed(folder / "golden.npz", **golden)
        size = sum(file.stat().st_size for file in folder.iterdir())
        distinct = len(np.unique(golden["greedy"]))
        print(
            f"{name}: seed {seed}, {size / 1e3:.0f} kB, "
            f"logits std {golden['logits'].std():.2f}, {distinct} different tokens"
        )


if __name__ == "__main__":
    main()
