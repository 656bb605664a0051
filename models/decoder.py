"""The decoder layer as the two functions around attention, and the token embedding and head.

A layer never attends by itself: a mode calls ``pre_attention`` and ``post_attention`` where the
weights are and the attention where the KV cache is. So the model knows no mode, no cache and
no kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sidp_jax.kernels.turn_heads import rms_norm, turn_heads
from sidp_jax.models.config import ModelConfig
from sidp_jax.models.layers import (
    Axes,
    HeadTurner,
    Linear,
    Multiplier,
    RMSNorm,
    rope_inverse_frequencies,
)

LayerParams = dict[str, jax.Array | jax.ShapeDtypeStruct | Multiplier]
"""The parameters of one layer by name, ``{"qkv.kernel": ...}``; or descriptions of them.

A kernel may be anything that multiplies like one.
"""

ATTENTION = ("qkv.kernel", "out.kernel")
"""The kernels that ``pre_attention`` and ``add_attention`` read, in this order."""

FEED_FORWARD = ("gate_up.kernel", "down.kernel")
"""The kernels that ``feed_forward`` and ``add_feed_forward`` read, in this order."""


class DecoderLayer(nnx.Module):
    """One pre-norm transformer layer: grouped-query attention and a SwiGLU feed-forward part.

    Query, key and value share one projection, grouped by key head so that tensor parallelism can
    shard it: group ``k`` holds its query heads, then its key head, then its value head. Gate and up
    share one too.
    """

    def __init__(self, config: ModelConfig, dtype: jnp.dtype):
        c = config
        hidden, groups, queries = c.hidden_size, c.num_kv_heads, c.queries_per_kv_head
        self.config = c
        self.input_norm = RMSNorm(hidden, c.rms_norm_eps, dtype)
        self.qkv = Linear(
            (groups, queries + 2, c.head_dim),
            ("kv_heads", None, None),
            (hidden,),
            (None,),
            bias=c.qkv_bias,
            dtype=dtype,
        )
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, dtype) if c.qk_norm else None
        self.out = Linear(
            (hidden,),
            (None,),
            (groups, queries, c.head_dim),
            ("kv_heads", None, None),
            dtype=dtype,
        )
        self.post_norm = RMSNorm(hidden, c.rms_norm_eps, dtype)
        self.gate_up = Linear(
            (2, c.intermediate_size), (None, "ffn"), (hidden,), (None,), dtype=dtype
        )
        self.down = Linear((hidden,), (None,), (c.intermediate_size,), ("ffn",), dtype=dtype)

    def pre_attention(
        self, x: Float[Array, "tokens hidden"], positions: Int[Array, "tokens"] | HeadTurner
    ) -> tuple[
        Float[Array, "tokens heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
        Float[Array, "tokens kv_heads head_dim"],
    ]:
        """Normalises and projects the activations to rotated queries and keys, and values.

        Args:
            x: The residual stream.
            positions: Position of each token in its sequence, or what turns heads by it.
        """
        norms = (self.q_norm, self.k_norm)
        scales = [None if norm is None else norm.scale[...] for norm in norms]
        return turn_projection(self.config, self.project(x), scales, positions)

    def project(
        self, x: Float[Array, "tokens hidden"]
    ) -> Float[Array, "tokens kv_heads group head_dim"]:
        """The first part of ``pre_attention``, which knows no positions; see ``turn_projection``.

        Args:
            x: The residual stream.
        """
        return self.qkv(self.input_norm(x))

    def post_attention(
        self,
        x: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens heads head_dim"],
        reduce: Callable[[jax.Array], jax.Array] = lambda partial: partial,
    ) -> Float[Array, "tokens hidden"]:
        """Projects the attention's result into the residual stream and adds the feed-forward part.

        Args:
            x: The residual stream as ``pre_attention`` got it.
            attended: The attention's result, query heads in the order of ``pre_attention``.
            reduce: Adds up the partial results of devices that hold parts of the heads and of the
                feed-forward layer each.
        """
        x = self.add_attention(x, attended, reduce)
        return self.add_feed_forward(x, self.feed_forward(x), reduce)

    def add_attention(
        self,
        x: Float[Array, "tokens hidden"],
        attended: Float[Array, "tokens heads head_dim"],
        reduce: Callable[[jax.Array], jax.Array] = lambda partial: partial,
    ) -> Float[Array, "tokens hidden"]:
        """The first part of ``post_attention``: the residual stream with the attention's result."""
        queries = self.config.queries_per_kv_head
        groups = attended.reshape(x.shape[0], -1, queries, attended.shape[-1])
        return x + reduce(self.out(groups))

    def feed_forward(self, x: Float[Array, "tokens hidden"]) -> Float[Array, "tokens ffn"]:
        """The second part of ``post_attention``: the gated values of the feed-forward part."""
        gate_up = self.gate_up(self.post_norm(x))
        return jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]

    def add_feed_forward(
        self,
        x: Float[Array, "tokens hidden"],
        gated: Float[Array, "tokens ffn"],
        reduce: Callable[[jax.Array], jax.Array] = lambda partial: partial,
    ) -> Float[Array, "tokens hidden"]:
        """The last part of ``post_attention``: the residual stream with the gated values."""
        return x + reduce(self.down(gated))


def turn_projection(
    config: ModelConfig,
    qkv: Float[Array, "tokens kv_heads group head_dim"],
    scales: Sequence[Float[Array, "head_dim"] | None],
    positions: Int[Array, "tokens"] | HeadTurner,
) -> tuple[
    Float[Array, "tokens heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
    Float[Array, "tokens kv_heads head_dim"],
]:
    """The second part of ``pre_attention``, which needs no kernel of the layer.

    Args:
        config: The model's architecture.
        qkv: The projection: for each key head its query heads, the key head and its value head.
        scales: Of the layer's norms of query and key heads; None where it has none.
        positions: Position of each token in its sequence, or what turns heads by it.
    """
    frequencies = jnp.asarray(
        rope_inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    )
    eps = config.rms_norm_eps
    if isinstance(positions, HeadTurner):
        return positions.turn(qkv, *scales, frequencies, eps)
    return turn_heads(qkv, *scales, positions, frequencies, eps=eps, implementation="reference")


@dataclass(frozen=True)
class ParamSpec:
    """Shape of one parameter, and a logical axis name (or None) for each dimension."""

    shape: tuple[int, ...]
    axes: Axes


@cache
def _abstract_layer(config: ModelConfig, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure and abstract parameters of a layer; no memory is allocated."""
    abstract = nnx.eval_shape(lambda: DecoderLayer(config, jnp.dtype(dtype)))
    return nnx.split(abstract)


@cache
def layer_spec(config: ModelConfig) -> dict[str, ParamSpec]:
    """Shape and logical axes of every parameter of one layer, by name."""
    _, state = _abstract_layer(config, "float32")
    return {
        ".".join(path): ParamSpec(tuple(leaf.shape), leaf.get_metadata("axes"))
        for path, leaf in nnx.to_flat_state(state)
    }


def bind_layer(config: ModelConfig, params: LayerParams) -> DecoderLayer:
    """A layer over the given arrays; free inside a traced function.

    Args:
        config: The model's architecture.
        params: One array for each name of ``layer_spec``, or for a kernel a ``Multiplier``.
    """
    dtype = params["qkv.kernel"].dtype
    graphdef, state = _abstract_layer(config, str(dtype))
    bound = [
        (path, leaf.replace(params[".".join(path)])) for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(bound))


def embed(
    embedding: Float[Array, "rows hidden"],
    tokens: Int[Array, "tokens"],
    first: int | Int[Array, ""],
) -> Float[Array, "tokens hidden"]:
    """Looks tokens up in one shard of the embedding; tokens of other shards give zeros.

    Args:
        embedding: Rows ``first`` to ``first + rows`` of the token embedding.
        tokens: Token ids of the whole vocabulary.
        first: The token id of the shard's first row.
    """
    rows = embedding.shape[0]
    local = tokens - first
    here = (local >= 0) & (local < rows)
    return jnp.where(here[:, None], embedding[jnp.clip(local, 0, rows - 1)], 0)


def head_logits(
    x: Float[Array, "tokens hidden"],
    final_norm: Float[Array, "hidden"],
    head: Float[Array, "rows hidden"],
    eps: float,
) -> Float[Array, "tokens rows"]:
    """Logits of one shard of the vocabulary, in float32.

    Args:
        x: The residual stream after the last layer.
        final_norm: Scale of the last normalisation.
        head: The shard's rows of the output head.
        eps: Epsilon of the normalisation.
    """
    normed = rms_norm(x, final_norm, eps)
    return jax.lax.dot_general(
        normed, head, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
