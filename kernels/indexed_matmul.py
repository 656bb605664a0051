"""Products with weights that the device picks: `x @ weights[row].T`, no weight copied.

XLA materialises a layer's slice of stacked weights, or the result of a selection, before most
GEMMs. Where every device of a program takes another row, that is a copy of a layer at each use.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = ("reference", "mosaic")

Weights = Float[Array, "rows outputs inputs"] | tuple[Float[Array, "outputs inputs"], ...]
"""Rows of one shape: stacked, or an array each."""


def indexed_matmul(
    x: Float[Array, "tokens inputs"],
    weights: Weights,
    row: Int[Array, ""],
    *,
    implementation: str,
    tuning=None,
) -> Float[Array, "tokens outputs"]:
    """Multiply with one row of `weights`, which only the device knows.

    Args:
        x: activations.
        weights: all rows, stacked or as a tuple; kernels are `[outputs, inputs]`.
        row: which of them; clamped to those there are.
        implementation: "reference" (any backend) or "mosaic" (Hopper, bfloat16).
        tuning: an `indexed_matmul_mosaic.TuningConfig`, for "mosaic" alone; found from the shapes
            if not given.

    Returns:
        The product in the type of `x`; "mosaic" accumulates in float32.

    Raises:
        ValueError: if shapes or types do not fit, or the implementation is unknown.
    """
    _check_shapes(x, weights, row)
    if implementation == "reference":
        if tuning is not None:
            raise ValueError(f"{tuning=} is for implementation='mosaic'; leave it out")
        return indexed_matmul_reference(x, weights, row)
    if implementation == "mosaic":
        from sidp_jax.kernels.indexed_matmul_mosaic import indexed_matmul_mosaic

        return indexed_matmul_mosaic(x, weights, row, config=tuning)
    raise ValueError(f"implementation={implementation!r} is unknown; use one of {IMPLEMENTATIONS}")


def indexed_matmul_reference(
    x: Float[Array, "tokens inputs"], weights: Weights, row: Int[Array, ""]
) -> Float[Array, "tokens outputs"]:
    """`indexed_matmul` in plain jax: take the row, then multiply."""
    if isinstance(weights, tuple):
        kernel = weights[0]
        for i, other in enumerate(weights[1:], 1):
            kernel = jnp.where(row >= i, other, kernel)
    else:
        row = jnp.clip(row, 0, weights.shape[0] - 1)  # negative ones would count from the end
        kernel = lax.dynamic_index_in_dim(weights, row, keepdims=False)
    return lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


def _check_shapes(x, weights, row) -> None:
    if isinstance(weights, tuple):
        if not weights:
            raise ValueError("weights must have at least one row, and the tuple is empty")
        kinds = {(w.shape, w.dtype) for w in weights}
        if len(kinds) != 1:
            raise ValueError(f"rows of weights must be alike, not {sorted(map(str, kinds))}")
    elif not weights.shape[0]:
        raise ValueError(f"{weights.shape=} must have at least one row")
    shape = weights[0].shape if isinstance(weights, tuple) else weights.shape[1:]
    if x.shape[1] != shape[1]:
        raise ValueError(f"inputs of {x.shape=} and of kernels {shape} must be equal")
    if not x.shape[0]:
        raise ValueError(f"{x.shape=} must have at least one token")
    if row.shape != ():
        raise ValueError(f"{row.shape=} must be (): one row for all tokens")


@dataclass(frozen=True)
class IndexedKernel:
    """A layer's kernel `[*outputs, *inputs]` that only the device can tell from others.

    It stands in a layer's parameters where otherwise an array does (`models.layers.Multiplier`).

    Attributes:
        rows: all kernels that it may be, stacked or as a tuple.
        row: which of them it is, an int32 scalar.
        implementation: as for `indexed_matmul`.
    """

    rows: jax.Array | tuple[jax.Array, ...]
    row: jax.Array
    implementation: str

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the kernel's values."""
        return self.rows[0].dtype if isinstance(self.rows, tuple) else self.rows.dtype

    def multiply(self, x: jax.Array, num_in: int) -> jax.Array:
        """The product `[tokens, *outputs]` of `x`, `[tokens, *inputs]`, over `num_in` inputs."""
        stacked = not isinstance(self.rows, tuple)
        shape = self.rows.shape[1:] if stacked else self.rows[0].shape
        outputs, inputs = shape[: len(shape) - num_in], shape[len(shape) - num_in :]
        if x.shape[1:] != inputs:
            raise ValueError(f"{x.shape=} must end in the inputs {inputs} of the kernel {shape}")
        flat = (math.prod(outputs), math.prod(inputs))
        if stacked:
            rows = self.rows.reshape(-1, *flat)
        else:
            rows = tuple(row.reshape(flat) for row in self.rows)
        y = indexed_matmul(
            x.reshape(x.shape[0], -1), rows, self.row, implementation=self.implementation
        )
        return y.reshape(x.shape[0], *outputs)


jax.tree_util.register_dataclass(IndexedKernel, ["rows", "row"], ["implementation"])
