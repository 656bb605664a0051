"""Run each kernel once against its reference before anybody trusts its tokens.

Compilers have miscompiled such kernels (`ptxas` of CUDA 12.8.0 to 12.9.1 and causal masks), and a
wrong token looks like any other. The check takes milliseconds once the kernels are compiled.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sidp_jax.kernels.indexed_matmul import indexed_matmul
from sidp_jax.kernels.kv_update import update_kv
from sidp_jax.kernels.ragged_attention import ragged_attention
from sidp_jax.kernels.top_threshold import top_threshold
from sidp_jax.kernels.turn_heads import turn_heads

TOLERANCE = 1e-2  # relative, in bfloat16; sound kernels stay near 2e-3
# (queries, context); among the decodes short ones, of which one worker does several in a row
ROWS = ((1, 1), (1, 40), (1, 105), (1, 130), (1, 1500), (9, 200), (70, 70), (131, 300))
PADDING = 13  # tokens after the last row
TURN_TOKENS = 152  # two whole tiles, and one that is moved back
PRODUCT_TOKENS = (16, 300)  # one tile of them; several, the last one moved back
TOP_GROUPS = 300  # of the vocabulary; several rounds of the ring, and a last slot that is not full
PRODUCT_OUTPUTS = 4096  # at most: several tiles, and a check that stays short


class KernelError(RuntimeError):
    """A kernel is not available here, or its results differ from the reference."""


def require_hopper(device: jax.Device) -> None:
    """Raise KernelError unless `device` runs the Hopper kernels."""
    capability = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or capability != "9.0":
        raise KernelError(
            f"the 'mosaic' kernels need a Hopper GPU (compute capability 9.0), and this is "
            f"{device.device_kind} ({capability=}); set attention=cudnn (an NVIDIA GPU with cuDNN) "
            "or attention=reference"
        )


def require_cudnn(device: jax.Device) -> None:
    """Raise KernelError unless `device` runs cuDNN's fused attention."""
    capability = getattr(device, "compute_capability", None)
    if device.platform not in ("gpu", "cuda") or capability is None or float(capability) < 8.0:
        raise KernelError(
            f"attention=cudnn needs an NVIDIA GPU of compute capability 8.0 or higher, and this is "
            f"{device.device_kind} ({capability=}); set attention=reference"
        )


def self_check(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    page_size: int,
    products: Sequence[tuple[int, int]] = (),
    dtype: jnp.dtype = jnp.bfloat16,
    implementation: str = "mosaic",
    device: jax.Device | None = None,
) -> dict[str, float]:
    """Compare the kernels with their references on a small ragged batch.

    Args:
        heads: query heads, as the model has them (on one device).
        kv_heads: K/V heads.
        head_dim: size of a head.
        page_size: tokens of a page.
        products: outputs and inputs of the kernels that `indexed_matmul` will multiply by; nothing
            is checked of it without them.
        dtype: type of queries and cache.
        implementation: what to check; of "cudnn" attention alone, beside which the references run.
        device: where to run; the first device if not given.

    Returns:
        Relative error by kernel.

    Raises:
        KernelError: naming kernel, error and CUDA version, if one differs by more than 1e-2.
        ValueError: if a kernel cannot run with these shapes or this type.
    """
    device = device or jax.local_devices()[0]
    if implementation == "mosaic":
        require_hopper(device)
    if implementation == "cudnn":
        require_cudnn(device)
    with jax.default_device(device):
        errors = {
            "ragged_attention": _attention_error(
                heads, kv_heads, head_dim, page_size, dtype, implementation
            )
        }
        if implementation != "cudnn":
            errors["update_kv"] = _update_error(
                kv_heads, head_dim, page_size, dtype, implementation
            )
        if implementation == "mosaic":
            errors["top_threshold"] = _top_error(implementation)
        if implementation == "mosaic" and (head_dim, dtype) == (128, jnp.bfloat16):
            errors["turn_heads"] = _turn_error(heads, kv_heads, head_dim, dtype, implementation)
        if products and implementation != "cudnn":
            errors["indexed_matmul"] = max(
                _product_error(tokens, *shape, dtype, implementation)
                for tokens in PRODUCT_TOKENS
                for shape in dict.fromkeys(products)
            )
    for kernel, error in errors.items():
        if not error < TOLERANCE:  # NaN fails too
            version = " ".join(device.client.platform_version.split())
            raise KernelError(
                f"kernel {kernel} ({implementation}) differs from its reference by {error:.2e}, "
                f"limit {TOLERANCE:.0e}, on {device.device_kind} with {version}; "
                "change the CUDA version or use attention: reference"
            )
    return errors


def _attention_error(heads, kv_heads, head_dim, page_size, dtype, implementation) -> float:
    rng = np.random.default_rng(0)
    pages = [-(-context // page_size) for _, context in ROWS]
    total = sum(pages) + 3
    tables = np.zeros((len(ROWS) + 1, max(pages)), np.int32)
    order = rng.permutation(total)
    for row, count in enumerate(pages):
        tables[row, :count], order = order[:count], order[count:]
    queries = [n for n, _ in ROWS]
    starts = np.cumsum([0, *queries, 0]).astype(np.int32)
    context = np.array([c for _, c in ROWS] + [0], np.int32)
    shape = (2, kv_heads, total, page_size, head_dim)
    k_pages, v_pages = (jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((starts[-1] + PADDING, heads, head_dim)), dtype)
    args = (jnp.int32(1), jnp.asarray(tables), jnp.asarray(starts), jnp.asarray(context))

    def attend(q, k_pages, v_pages, *args, implementation):
        return ragged_attention(
            *(q, k_pages, v_pages, *args), scale=head_dim**-0.5, implementation=implementation
        )

    attend = jax.jit(attend, static_argnames="implementation")
    out = attend(q, k_pages, v_pages, *args, implementation=implementation)
    wide = (x.astype(jnp.float32) for x in (q, k_pages, v_pages))
    return _relative(out, attend(*wide, *args, implementation="reference"))


def _update_error(kv_heads, head_dim, page_size, dtype, implementation) -> float:
    rng = np.random.default_rng(1)
    shape = (2, kv_heads, 5, page_size, head_dim)
    tokens = 3 * page_size + 1
    slots = rng.permutation(5 * page_size)[:tokens].astype(np.int32)
    slots[::5] = -1
    cache = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)]
    new = [jnp.asarray(rng.standard_normal((tokens, kv_heads, head_dim)), dtype) for _ in range(2)]
    update = jax.jit(update_kv, static_argnames="implementation")
    args = (*cache, *new, jnp.int32(1), jnp.asarray(slots))
    pairs = zip(
        update(*args, implementation=implementation),
        update(*args, implementation="reference"),
        strict=True,
    )
    return max(_relative(out, expected) for out, expected in pairs)


def _turn_error(heads, kv_heads, head_dim, dtype, implementation) -> float:
    rng = np.random.default_rng(3)
    shape = (TURN_TOKENS, kv_heads, heads // kv_heads + 2, head_dim)
    qkv = jnp.asarray(rng.standard_normal(shape), dtype)
    scales = [jnp.asarray(rng.uniform(0.5, 2, head_dim), dtype) for _ in range(2)]
    positions = jnp.asarray(rng.integers(0, 4000, TURN_TOKENS), jnp.int32)
    frequencies = jnp.asarray(1e4 ** -(np.arange(0, head_dim, 2) / head_dim), jnp.float32)
    turn = jax.jit(turn_heads, static_argnames=("eps", "implementation"))
    errors = []
    for norms in (scales, (None, None)):
        out, expected = (
            turn(qkv, *norms, positions, frequencies, eps=1e-6, implementation=which)
            for which in (implementation, "reference")
        )
        errors += map(_relative, out, expected)
    return max(errors)


def _top_error(implementation) -> float:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((4, TOP_GROUPS, 128)) * np.array([1, 3, 3, 9])[:, None, None]
    weights = np.exp(logits - logits.max((1, 2), keepdims=True)).astype(np.float32)
    options = ([0, 1e-3, 0, 0], [0, 20, 3000, 0], [0.9, 1, 0.5, 0.99])
    types = (jnp.float32, jnp.int32, jnp.float32)
    args = (weights, *(jnp.asarray(x, dtype) for x, dtype in zip(options, types, strict=True)))
    search = jax.jit(top_threshold, static_argnames="implementation")
    return _relative(*(search(*args, implementation=how) for how in (implementation, "reference")))


def _product_error(tokens, outputs, inputs, dtype, implementation) -> float:
    keys = jax.random.split(jax.random.key(2))
    # Outputs fewer than the model's, but divisible by the same powers of two.
    outputs = outputs if outputs <= PRODUCT_OUTPUTS else PRODUCT_OUTPUTS + outputs % PRODUCT_OUTPUTS
    x = jax.random.normal(keys[0], (tokens, inputs), dtype)
    rows = tuple(jax.random.normal(keys[1], (2, outputs, inputs), dtype))
    multiply = jax.jit(indexed_matmul, static_argnames="implementation")
    return max(
        _relative(
            multiply(x, rows, jnp.int32(row), implementation=implementation),
            multiply(x, rows, jnp.int32(row), implementation="reference"),
        )
        for row in range(2)
    )


def _relative(out, expected) -> float:
    out, expected = (np.asarray(x, np.float64) for x in (out, expected))
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
