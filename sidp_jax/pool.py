"""Who owns which layer, and how many bytes that costs: plain arithmetic, no jax."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil


@dataclass(frozen=True)
class PoolLayout:
    """Striped ownership of the layers of a model over a pool.

    The layers that are not resident are numbered in ascending order and dealt out in turn: the
    ``i``-th belongs to replica ``i % pool_size`` and lies in row ``i // pool_size`` of its slab.
    Without resident layers that is replica ``l % pool_size`` for layer ``l``.

    Attributes:
        num_layers: Decoder layers of the model.
        pool_size: Replicas in the pool.
        resident_layers: Layers that every replica keeps. They are spread evenly and
            start with layer 0, whose fetch no compute could hide. ``num_layers`` is plain
            data parallelism. Those of the host come first instead, under the step before: so as
            many layers as possible follow each of them alike.
        on_host: Whether the owner of the layers that are not resident is the host, in whose pinned
            memory they lie; for a pool of one.
    """

    num_layers: int
    pool_size: int
    resident_layers: int = 0
    on_host: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1")
        if not 0 <= self.resident_layers <= self.num_layers:
            raise ValueError(
                f"resident_layers={self.resident_layers} must lie between 0 and the model's "
                f"{self.num_layers} layers"
            )
        if not 1 <= self.pool_size <= self.num_layers:
            raise ValueError(
                f"pool_size={self.pool_size} must lie between 1 and the model's "
                f"{self.num_layers} layers: every replica of a pool owns at least one"
            )
        if self.on_host and self.pool_size != 1:
            raise ValueError(
                f"pool_size={self.pool_size} must be 1 where the host owns layers: a larger pool "
                "has other GPUs for them"
            )

    @cached_property
    def resident(self) -> tuple[int, ...]:
        """The layers that every replica keeps, ascending."""
        if not self.on_host:
            return _spread(self.resident_layers, self.num_layers)
        fetched = set(_spread(self.num_layers - self.resident_layers, self.num_layers))
        return tuple(layer for layer in range(self.num_layers) if layer not in fetched)

    @cached_property
    def pooled(self) -> tuple[int, ...]:
        """The layers that have one owner, ascending."""
        resident = set(self.resident)
        return tuple(layer for layer in range(self.num_layers) if layer not in resident)

    @cached_property
    def _place(self) -> dict[int, tuple[int, int]]:
        return {layer: divmod(i, self.pool_size) for i, layer in enumerate(self.pooled)}

    @property
    def rows(self) -> int:
        """Rows of a slab; in the last one some owners may have no layer."""
        return ceil(len(self.pooled) / self.pool_size)

    @property
    def rows_ahead(self) -> int:
        """Rows queued on the devices beside the one that runs, where WaS fetches by copies.

        Copies from the host take far longer than a layer, so nothing is lost by none. With one, the
        devices never wait for the host to send copies off.
        """
        return 0 if self.on_host else 1

    @property
    def buffered_rows(self) -> int:
        """Rows that copies take buffers for: in use, queued, and on their way."""
        return min(2 + self.rows_ahead, self.rows)

    def owner(self, layer: int) -> int:
        """The replica that owns a pooled layer."""
        return self._place[layer][1]

    def row(self, layer: int) -> int:
        """The row of its owner's slab in which a pooled layer lies."""
        return self._place[layer][0]

    def layer_at(self, row: int, owner: int) -> int | None:
        """The layer at a place of the slab, None where the last row is absent."""
        index = row * self.pool_size + owner
        return self.pooled[index] if index < len(self.pooled) else None


def _spread(count: int, layers: int) -> tuple[int, ...]:
    """So many layers, evenly spread from layer 0 on."""
    return tuple(i * layers // count for i in range(count))


def padded_vocab(vocab_size: int, shards: int) -> int:
    """Vocabulary rows after padding to a multiple of the shards."""
    return ceil(vocab_size / shards) * shards


def weight_bytes_per_device(
    layout: PoolLayout,
    *,
    layer_bytes: int,
    hidden_size: int,
    vocab_size: int,
    tied: bool,
    dtype_bytes: int,
) -> int:
    """Bytes of weights that one device of the pool holds, without what lies on the host.

    Args:
        layout: Who owns what.
        layer_bytes: Bytes of one decoder layer.
        hidden_size: Width of the residual stream.
        vocab_size: Tokens of the vocabulary.
        tied: Whether the output head is the token embedding.
        dtype_bytes: Bytes of one value.
    """
    rows = 0 if layout.on_host else layout.rows
    layers = (rows + layout.resident_layers) * layer_bytes
    shard = padded_vocab(vocab_size, layout.pool_size) // layout.pool_size
    tables = (1 if tied else 2) * shard * hidden_size * dtype_bytes
    return layers + tables + hidden_size * dtype_bytes


def kv_bytes_per_page(
    *, num_layers: int, num_kv_heads: int, head_dim: int, page_size: int, dtype_bytes: int
) -> int:
    """Bytes of one page of the KV cache: keys and values of all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * page_size * dtype_bytes
