"""Offline LLM inference in JAX that pools the weights of a data-parallel group.

Importing this package does not import jax: the command line has to choose the platform, the
number of virtual devices and the XLA flags before jax starts.
"""

import importlib
from typing import Any

_EXPORTS = {
    "LLM": "sidp_jax.llm",
    "CompletionOutput": "sidp_jax.request",
    "Logprob": "sidp_jax.request",
    "RequestOutput": "sidp_jax.request",
    "SamplingParams": "sidp_jax.request",
}

__all__ = ["LLM", "CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'sidp_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)
