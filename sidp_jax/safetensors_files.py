"""Tensors of a folder of safetensors files, read straight into given memory; no jax.

The ``safetensors`` package maps its files. Every page that is touched then counts as memory of
this process, and a cold file is read page fault by page fault. Loading a model of 140 GB wants
neither, so the files are read with parallel ``pread`` calls into the memory where the values are
to lie. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import ml_dtypes
import numpy as np

INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Longest header that the safetensors package accepts.
_MAX_HEADER_BYTES = 100_000_000
# Read at once by one thread; also the scratch memory of a thread that converts.
_CHUNK_BYTES = 16 << 20
_READERS = 8


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged, or made for another model."""


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        name: The tensor's name.
        file: The file that holds it.
        dtype: Type of the stored values.
        shape: Shape of the stored values.
        offset: Position of the first value in the file, in bytes.
    """

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint, from its index, or else from all ``*.safetensors`` files.

    Only headers are read.

    Raises:
        CheckpointError: There are no such files, one that the index names is missing, or one
            is damaged. The message names the file, and the tensor if there is one to name.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return _merge_headers(_without_index(folder))
    listed = _read_index(index)
    files = sorted(set(listed.values()))
    for name in files:
        if not (folder / name).is_file():
            first = next(tensor for tensor, file in listed.items() if file == name)
            raise CheckpointError(
                f"{folder / name} is missing: {index.name} says that it holds {first!r} and "
                f"{sum(file == name for file in listed.values()) - 1} other tensors"
            )
    found = _merge_headers([folder / name for name in files])
    for tensor, file in listed.items():
        if tensor not in found or found[tensor].file.name != file:
            raise CheckpointError(f"{folder / file} lacks tensor {tensor!r} that {index} lists")
    return found


class TensorReader:
    """Reads tensors into arrays, several parts of one tensor at a time.

    Use it as a context manager: it holds open files and threads. Besides the arrays that it
    fills, it needs at most ``_READERS`` chunks of 16 MB, and those only to change the type.
    """

    def __init__(self):
        self._files: dict[Path, int] = {}
        self._lock = Lock()
        self._threads = ThreadPoolExecutor(_READERS, thread_name_prefix="safetensors")

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def read(self, tensor: StoredTensor, out: np.ndarray, first: int = 0) -> None:
        """Fills ``out`` with the tensor's values, in C order, converted to the type of ``out``.

        Args:
            tensor: What to read.
            out: Any view, contiguous or not; as many values are read as it has.
            first: The tensor's value to start with, counted in C order.

        Raises:
            CheckpointError: The file ends before the tensor does.
        """
        assert first + out.size <= prod(tensor.shape), (tensor, out.shape, first)
        chunk = _CHUNK_BYTES // tensor.dtype.itemsize
        jobs = []
        for piece in _contiguous_pieces(out):
            for start in range(0, piece.size, chunk):
                part = piece[start : start + chunk]
                jobs.append(self._threads.submit(self._read_chunk, tensor, part, first + start))
            first += piece.size
        wait(jobs)
        for job in jobs:
            job.result()

    def _read_chunk(self, tensor: StoredTensor, out: np.ndarray, first: int) -> None:
        same = out.dtype == tensor.dtype
        target = out if same else np.empty(out.shape, tensor.dtype)
        memory = memoryview(target.view(np.uint8))
        descriptor = self._open(tensor.file)
        position = tensor.offset + first * tensor.dtype.itemsize
        while len(memory):
            count = os.preadv(descriptor, [memory], position)
            if count == 0:
                raise CheckpointError(
                    f"{tensor.file} ends at byte {position}, in the middle of tensor "
                    f"{tensor.name!r}: the file is truncated, copy it again"
                )
            memory, position = memory[count:], position + count
        if not same:
            # A value that the smaller type cannot hold becomes infinite, as in torch.
            with np.errstate(over="ignore"):
                out[...] = target

    def _open(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY)
            return self._files[file]


def _contiguous_pieces(view: np.ndarray) -> Iterator[np.ndarray]:
    """The one-dimensional contiguous pieces of a view, in C order."""
    if view.flags.c_contiguous:
        yield view.reshape(-1)
    else:
        for part in view:
            yield from _contiguous_pieces(part)


def _without_index(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        hint = f" ({others[0]} is not read: save it as safetensors)" if others else ""
        raise CheckpointError(f"no *.safetensors files in {folder}{hint}")
    return files


def _read_index(index: Path) -> dict[str, str]:
    try:
        listed = json.loads(index.read_text())["weight_map"]
        if not all(Path(file).name == file for file in listed.values()):
            raise ValueError("a file name with a folder in it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {error!r}; copy it again") from error
    return listed


def _merge_headers(files: list[Path]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"tensor {name!r} is in two files, {tensors[name].file} and {file}: "
                    f"leave the files of one checkpoint only"
                )
            tensors[name] = tensor
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file} has {size} bytes and a header of {length}: it is truncated or is no "
                f"safetensors file"
            )
        try:
            entries = dict(json.loads(stream.read(length)))
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the header of {file} is damaged: {error}") from error
    entries.pop("__metadata__", None)
    tensors, end = {}, 8 + length
    for name, entry in entries.items():
        tensors[name], last = _parse_entry(name, entry, file, 8 + length)
        if last > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {name!r} ends at byte {last}, the file has {size}"
            )
        end = max(end, last)
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes, but its tensors end at byte {end}")
    return tensors


def _parse_entry(name: str, entry: Any, file: Path, start: int) -> tuple[StoredTensor, int]:
    """A tensor from its entry in the header, and the byte at which it ends."""
    try:
        dtype_name, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
        first, last = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"tensor {name!r} of {file} has a damaged header entry {entry!r}"
        ) from error
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"tensor {name!r} of {file} is stored as {dtype_name}; supported: "
            f"{', '.join(_DTYPES)} (quantised weights are not)"
        )
    dtype = _DTYPES[dtype_name]
    if first < 0 or min(shape, default=0) < 0 or last - first != prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"tensor {name!r} of {file} has {last - first} bytes at {first}, but its shape "
            f"{list(shape)} in {dtype_name} needs {prod(shape) * dtype.itemsize}"
        )
    return StoredTensor(name, file, dtype, shape, start + first), start + last
