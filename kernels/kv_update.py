"""Write new K and V into the pages of the cache, in place.

The whole cache of a replica is passed, all layers of it, together with the layer's index: slicing
one layer out and putting it back would copy it. The caller donates the cache.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("reference", "mosaic")


def update_kv(
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    layer: Int[Array, ""] | int,
    kv_slots: Int[Array, " tokens"],
    *,
    implementation: str,
) -> tuple[
    Float[Array, "layers kv_heads pages page_size head_dim"],
    Float[Array, "layers kv_heads pages page_size head_dim"],
]:
    """Write the K and V of a batch of tokens into one layer of the cache.

    Args:
        k_pages: keys of all layers; donate it to have it updated in place.
        v_pages: values of all layers, likewise.
        k: new keys, one row per token.
        v: new values.
        layer: index of the layer in the cache.
        kv_slots: `page * page_size + offset` of every token; -1 writes nothing. Slots of one
            batch are distinct.
        implementation: "reference" (any backend) or "mosaic" (Hopper).

    Returns:
        The updated `k_pages` and `v_pages`.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation is unknown.
    """
    _check_shapes(k_pages, v_pages, k, v)
    if implementation == "reference":
        return update_kv_reference(k_pages, v_pages, k, v, layer, kv_slots)
    if implementation == "mosaic":
        from sidp_jax.kernels.kv_update_mosaic import update_kv_mosaic  # needs Mosaic GPU

        return update_kv_mosaic(k_pages, v_pages, k, v, layer, kv_slots)
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")


def update_kv_reference(
    k_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    v_pages: Float[Array, "layers kv_heads pages page_size head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    layer: Int[Array, ""] | int,
    kv_slots: Int[Array, " tokens"],
) -> tuple[
    Float[Array, "layers kv_heads pages page_size head_dim"],
    Float[Array, "layers kv_heads pages page_size head_dim"],
]:
    """`update_kv` as one scatter per cache: the obvious twin of the kernel."""
    num_pages, page_size = k_pages.shape[2], k_pages.shape[3]
    # A negative index would wrap around; one past the end is dropped.
    page = jnp.where(kv_slots < 0, num_pages, kv_slots // page_size)
    offset = kv_slots % page_size
    layer = jnp.asarray(layer, jnp.int32)
    k_pages = k_pages.at[layer, :, page, offset].set(k.astype(k_pages.dtype), mode="drop")
    v_pages = v_pages.at[layer, :, page, offset].set(v.astype(v_pages.dtype), mode="drop")
    return k_pages, v_pages


def _check_shapes(k_pages: Array, v_pages: Array, k: Array, v: Array) -> None:
    if k_pages.shape != v_pages.shape:
        raise ValueError(f"{k_pages.shape=} and {v_pages.shape=} must be equal")
    if k.shape != v.shape:
        raise ValueError(f"{k.shape=} and {v.shape=} must be equal")
    if k.shape[1] != k_pages.shape[1] or k.shape[2] != k_pages.shape[4]:
        raise ValueError(
            f"{k.shape=} must be [tokens, kv_heads, head_dim] of the cache, {k_pages.shape=}"
        )
