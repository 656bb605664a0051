"""From a layer's projection to queries, keys and values: norm of the heads, rotary embedding."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("reference", "mosaic")


def rms_norm(
    x: Float[Array, "... size"], scale: Float[Array, "size"], eps: float
) -> Float[Array, "... size"]:
    """Root-mean-square normalisation over the last dimension, computed in float32.

    Follows `LlamaRMSNorm` of Hugging Face transformers: the scale is applied after the cast back.
    """
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return scale * (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def rotary_tables(
    positions: Int[Array, "tokens"], inverse_frequencies: Float[Array, "half"]
) -> tuple[Float[Array, "tokens half"], Float[Array, "tokens half"]]:
    """Cosine and sine of each position's angles, in float32."""
    angles = positions[:, None].astype(jnp.float32) * inverse_frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "tokens kv_heads heads head_dim"],
    positions: Int[Array, "tokens"],
    inverse_frequencies: Float[Array, "half"],
) -> Float[Array, "tokens kv_heads heads head_dim"]:
    """Applies the rotary embedding to each head, in float32, with halves as the pairs.

    Args:
        x: query or key heads.
        positions: position of each token in its sequence.
        inverse_frequencies: `[head_dim / 2]`, from `models.layers.rope_inverse_frequencies`.
    """
    tables = rotary_tables(positions, inverse_frequencies)
    cos, sin = (table[:, None, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def turn_heads(
    qkv: Float[Array, "tokens kv_heads group head_dim"],
    q_scale: Float[Array, "head_dim"] | None,
    k_scale: Float[Array, "head_dim"] | None,
    positions: Int[Array, "tokens"],
    inverse_frequencies: Float[Array, "half"],
    *,
    eps: float,
    implementation: str,
) -> tuple[
    Float[Array, "tokens heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
]:
    """Cut a projection into queries, keys and values; norm and rotate queries and keys.

    Args:
        qkv: for each key head its query heads, then the key head, then its value head.
        q_scale: scale of the norm of the query heads; None if the model has no such norm.
        k_scale: likewise for the key heads; None for both or for neither.
        positions: position of each token in its sequence.
        inverse_frequencies: of the rotary embedding.
        eps: epsilon of the norms.
        implementation: "reference" (any backend) or "mosaic" (Hopper).

    Returns:
        Queries, keys and values.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation is unknown.
    """
    args = (qkv, q_scale, k_scale, positions, inverse_frequencies)
    if (q_scale is None) != (k_scale is None):
        raise ValueError("q_scale and k_scale must both be given, or neither")
    if implementation == "reference":
        return turn_heads_reference(*args, eps=eps)
    if implementation == "mosaic":
        from sidp_jax.kernels.turn_heads_mosaic import turn_heads_mosaic

        return turn_heads_mosaic(*args, eps=eps)
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")


def turn_heads_reference(
    qkv: Float[Array, "tokens kv_heads group head_dim"],
    q_scale: Float[Array, "head_dim"] | None,
    k_scale: Float[Array, "head_dim"] | None,
    positions: Int[Array, "tokens"],
    inverse_frequencies: Float[Array, "half"],
    *,
    eps: float,
) -> tuple[
    Float[Array, "tokens heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
]:
    """`turn_heads` in plain jax: the obvious twin of the kernel."""
    queries = qkv.shape[2] - 2
    q, k, v = jnp.split(qkv, [queries, queries + 1], axis=2)
    if q_scale is not None:
        q, k = rms_norm(q, q_scale, eps), rms_norm(k, k_scale, eps)
    q, k = (rotate(x, positions, inverse_frequencies) for x in (q, k))
    return q.reshape(q.shape[0], -1, q.shape[-1]), k[:, :, 0], v[:, :, 0]


@dataclass(frozen=True)
class Turner:
    """Positions that know what turns heads by them (`models.layers.HeadTurner`).

    Attributes:
        positions: position of each token, `[tokens]`.
        implementation: as for `turn_heads`.
    """

    positions: jax.Array
    implementation: str

    def turn(
        self,
        qkv: jax.Array,
        q_scale: jax.Array | None,
        k_scale: jax.Array | None,
        inverse_frequencies: jax.Array,
        eps: float,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """See `turn_heads`."""
        return turn_heads(
            *(qkv, q_scale, k_scale, self.positions, inverse_frequencies),
            eps=eps,
            implementation=self.implementation,
        )


jax.tree_util.register_dataclass(Turner, ["positions"], ["implementation"])
