"""Flax NNX modules that every decoder layer is made of.

Kernels keep Hugging Face's ``[out, in]`` order, so loading a checkpoint transposes nothing. Every
parameter carries ``axes``, one logical name (or None) per dimension; ``sidp_jax.mesh`` maps
the names to mesh axes in one place.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sidp_jax.kernels.turn_heads import rms_norm
from sidp_jax.models.config import Llama3RopeScaling

Axes = tuple[str | None, ...]


@runtime_checkable
class Multiplier(Protocol):
    """What may stand in the place of a kernel ``[*out, *in]`` and is no array."""

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the kernel's values."""

    def multiply(self, x: jax.Array, num_in: int) -> jax.Array:
        """The product ``[tokens, *out]`` over the ``num_in`` inputs of ``x``, ``[tokens, *in]``."""


@runtime_checkable
class HeadTurner(Protocol):
    """What may stand in the place of positions, and turns heads by them itself."""

    def turn(
        self,
        qkv: jax.Array,
        q_scale: jax.Array | None,
        k_scale: jax.Array | None,
        inverse_frequencies: jax.Array,
        eps: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of a projection; see ``kernels.turn_heads``."""


def parameter(shape: tuple[int, ...], axes: Axes, dtype: jnp.dtype) -> nnx.Param:
    """A parameter of zeros; real values are placed by ``sidp_jax.checkpoint``.

    Args:
        shape: Shape of the whole parameter, before any sharding.
        axes: A logical axis name, or None, for each dimension.
        dtype: Type of the stored values.
    """
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


class RMSNorm(nnx.Module):
    """``rms_norm`` with a learned scale."""

    def __init__(self, size: int, eps: float, dtype: jnp.dtype):
        self.eps = eps
        self.scale = parameter((size,), (None,), dtype)

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        """Normalises the last dimension of ``x``."""
        return rms_norm(x, self.scale[...], self.eps)


class Linear(nnx.Module):
    """A product with a kernel ``[*out, *in]`` that contracts all of ``in``, and an optional bias.

    Args:
        out_shape: Output dimensions, with their logical axes in ``out_axes``.
        in_shape: Input dimensions, with their logical axes in ``in_axes``.
        bias: Whether a bias of ``out_shape`` is added.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        out_axes: Axes,
        in_shape: tuple[int, ...],
        in_axes: Axes,
        *,
        bias: bool = False,
        dtype: jnp.dtype,
    ):
        self.num_in = len(in_shape)
        self.kernel = parameter((*out_shape, *in_shape), (*out_axes, *in_axes), dtype)
        self.bias = parameter(out_shape, out_axes, dtype) if bias else None

    def __call__(self, x: Float[Array, "tokens *inputs"]) -> Float[Array, "tokens *outputs"]:
        """Returns the product for every token, in the type of ``x``."""
        kernel = self.kernel.get_value()
        if isinstance(kernel, Multiplier):
            y = kernel.multiply(x, self.num_in)
        else:
            first = kernel.ndim - self.num_in
            contract = (tuple(range(1, x.ndim)), tuple(range(first, kernel.ndim)))
            y = jax.lax.dot_general(x, kernel, (contract, ((), ())))
        return y if self.bias is None else y + self.bias[...]


def rope_inverse_frequencies(
    head_dim: int, theta: float, scaling: Llama3RopeScaling | None
) -> np.ndarray:
    """Inverse frequencies of the rotary embedding, float32 ``[head_dim / 2]``.

    The scaling is that of Llama 3.1: long wavelengths are stretched by ``factor``, short ones are
    kept, those between are interpolated (``_compute_llama3_parameters`` of transformers).
    """
    inverse = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return inverse.astype(np.float32)
    wavelength = 2 * np.pi / inverse
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # 0 where the wavelength is long (stretched), 1 where it is short (kept).
    keep = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (inverse * (keep + (1.0 - keep) / scaling.factor)).astype(np.float32)
