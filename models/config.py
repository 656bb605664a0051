"""The architecture of a model, read from a Hugging Face ``config.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class UnsupportedModelError(ValueError):
    """The checkpoint asks for an architecture or an option that is not implemented."""


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Frequency scaling of Llama 3.1 (``rope_type: llama3``).

    Attributes:
        factor: Wavelengths longer than the original context are stretched by this.
        low_freq_factor: Wavelengths above ``original / low_freq_factor`` are stretched fully.
        high_freq_factor: Wavelengths below ``original / high_freq_factor`` stay as they are.
        original_max_position_embeddings: Context length of the pre-training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise UnsupportedModelError(
                f"rope_scaling needs high_freq_factor > low_freq_factor, got "
                f"{self.high_freq_factor} and {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder-only transformer of the Llama / Qwen kind.

    Attributes:
        architecture: One of ``SUPPORTED_ARCHITECTURES``.
        vocab_size: Rows of the embedding that belong to tokens.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU feed-forward layer.
        num_layers: Decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Width of one head.
        rms_norm_eps: Epsilon of every RMSNorm.
        rope_theta: Base of the rotary embedding.
        rope_scaling: Llama 3.1's scaling, or None.
        qkv_bias: Whether the query, key and value projections have a bias (Qwen2).
        qk_norm: Whether query and key heads are normalised before the rotary embedding (Qwen3).
        tie_word_embeddings: Whether the output head is the token embedding.
        max_position_embeddings: Longest sequence that the model was made for, in tokens.
        eos_token_ids: Tokens that end a sequence.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    qkv_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise UnsupportedModelError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UnsupportedModelError(
                f"num_attention_heads={self.num_heads} must be a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                f"head_dim={self.head_dim} must be even for the rotary embedding"
            )

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one key and value head."""
        return self.num_heads // self.num_kv_heads

    def layer_products(self, tensor_size: int = 1) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of a layer's matrix products on one device, by name.

        Args:
            tensor_size: Devices that share the heads and the feed-forward part.
        """
        heads = self.num_heads // tensor_size * self.head_dim
        kv_heads = self.num_kv_heads // tensor_size * self.head_dim
        ffn, hidden = self.intermediate_size // tensor_size, self.hidden_size
        return {
            "qkv": (heads + 2 * kv_heads, hidden),
            "out": (hidden, heads),
            "gate_up": (2 * ffn, hidden),
            "down": (hidden, ffn),
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ModelConfig:
        """Reads ``config.json``, and the end tokens of ``generation_config.json`` if it exists.

        Raises:
            FileNotFoundError: The folder has no ``config.json``.
            UnsupportedModelError: The model needs something that is not implemented.
        """
        folder = Path(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"no config.json in {folder}: `model` must be a folder with a Hugging Face "
                f"checkpoint"
            )
        values = json.loads(path.read_text())
        generation = folder / "generation_config.json"
        if generation.is_file():
            eos = json.loads(generation.read_text()).get("eos_token_id")
            if eos is not None:
                values = {**values, "eos_token_id": eos}
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Makes a config from the contents of a Hugging Face ``config.json``.

        Raises:
            UnsupportedModelError: The model needs something that is not implemented, or a
                required key is missing.
        """
        architecture = _architecture(values)
        _refuse_unsupported(values, architecture)
        missing = [key for key in _REQUIRED if values.get(key) is None]
        if missing:
            raise UnsupportedModelError(f"config.json lacks {', '.join(missing)}")
        theta, scaling = _rope(values)
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        head_dim = values.get("head_dim")
        if head_dim is None:
            if hidden % heads:
                raise UnsupportedModelError(
                    f"hidden_size={hidden} is no multiple of num_attention_heads={heads} and "
                    f"config.json gives no head_dim"
                )
            head_dim = hidden // heads
        eos = values.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=values["vocab_size"],
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=architecture == "Qwen2ForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
            max_position_embeddings=values["max_position_embeddings"],
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        )


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


def _architecture(values: Mapping[str, Any]) -> str:
    names = values.get("architectures") or []
    if len(names) != 1 or names[0] not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            f"architectures={names!r} is not supported; supported: "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return names[0]


def _refuse_unsupported(values: Mapping[str, Any], architecture: str) -> None:
    """Raises for every option that would change the numbers and is not implemented."""
    layer_types = values.get("layer_types") or []
    sliding = any(kind != "full_attention" for kind in layer_types) or bool(
        # Qwen's configs carry a window that is off unless `use_sliding_window` says otherwise.
        values.get("sliding_window")
        and values.get("use_sliding_window", "Qwen" not in architecture)
    )
    biased = architecture != "Qwen2ForCausalLM" and values.get("attention_bias", False)
    problems = {
        "sliding-window attention": sliding,
        f"quantised weights ({values.get('quantization_config')})": values.get(
            "quantization_config"
        ),
        f"hidden_act={values.get('hidden_act')!r} (only 'silu')": values.get("hidden_act", "silu")
        not in ("silu", "swish"),
        f"attention_bias=true in {architecture}": biased,
        "mlp_bias=true": values.get("mlp_bias", False),
        "mixture of experts": values.get("num_experts") or values.get("num_local_experts"),
        f"partial_rotary_factor={values.get('partial_rotary_factor')}": values.get(
            "partial_rotary_factor", 1.0
        )
        != 1.0,
    }
    found = [name for name, present in problems.items() if present]
    if found:
        raise UnsupportedModelError(f"not supported: {', '.join(found)}")


def _rope(values: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Reads base and scaling, from ``rope_parameters`` (transformers 5) or the older keys."""
    parameters = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    theta = float(parameters.get("rope_theta", values.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"not supported: rope scaling {kind!r} (supported: 'default' and 'llama3')"
        )
    try:
        return theta, Llama3RopeScaling(
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_position_embeddings=int(parameters["original_max_position_embeddings"]),
        )
    except KeyError as missing:
        raise UnsupportedModelError(f"rope scaling 'llama3' lacks {missing}") from None
