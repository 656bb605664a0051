"""Compiled programs on disk, found without being traced.

jax looks into its own cache once a program has been traced and lowered, which takes Pallas' kernels
some two seconds a program, one after another. So here a program is found by what decides it: its
name and static values, its arguments, and all around it, down to the sources of this package. What
is not found is traced and compiled as ever, and kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

logger = logging.getLogger(__name__)

KEPT_DAYS = 30  # since a program was last used

_ENVIRONMENT = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


@dataclass(frozen=True)
class ProgramCache:
    """A folder of compiled programs, as trusted as jax's own cache: loading one can run code.

    Attributes:
        folder: Where they lie; it need not exist.
    """

    folder: Path

    @classmethod
    def beside_jax(cls, platform: str) -> ProgramCache | None:
        """The one in the folder of jax's persistent cache.

        None where that is off or not a local folder, and on the platform ``cpu``, whose code is for
        the very machine that compiled it.
        """
        folder = jax.config.jax_compilation_cache_dir
        enabled = jax.config.jax_enable_compilation_cache and folder and "://" not in folder
        return cls(Path(folder) / "programs") if enabled and platform != "cpu" else None

    def program(
        self, jitted: jax.stages.Wrapped, devices: tuple[jax.Device, ...], *identity: Any
    ) -> CachedProgram:
        """A jitted function whose compiled forms are kept.

        Args:
            jitted: The function.
            devices: Those that it runs on.
            identity: All that decides what it computes, besides its arguments; values whose `repr`
                says all of them.
        """
        return CachedProgram(self, jitted, devices, identity)

    def forget_unused(self) -> None:
        """Deletes what was not used for ``KEPT_DAYS``."""
        oldest = time.time() - KEPT_DAYS * 86_400
        for path in self.folder.glob("*"):
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
            except OSError:  # another process was faster, or the folder is read-only
                continue


@dataclass(frozen=True)
class CachedProgram:
    """Stands for ``jax.stages.Wrapped``."""

    cache: ProgramCache
    jitted: jax.stages.Wrapped
    devices: tuple[jax.Device, ...]
    identity: tuple[Any, ...]

    def lower(self, *arguments: Any) -> LoweredProgram:
        """Traces the program, unless it is there with whatever options of the compiler."""
        known = (*_surroundings(self.devices), self.identity, *_described(arguments))
        name = hashlib.sha256(repr(known).encode()).hexdigest()[:32]
        is_kept = any(self.cache.folder.glob(f"{name}-*"))
        lowered = None if is_kept else self.jitted.lower(*arguments)
        return LoweredProgram(self, arguments, name, lowered)


@dataclass(frozen=True)
class LoweredProgram:
    """Stands for ``jax.stages.Lowered``.

    Attributes:
        program: What was lowered.
        arguments: Its arguments' specifications.
        name: The beginning of the name of its files.
        lowered: What was traced; None where a file is there.
    """

    program: CachedProgram
    arguments: tuple[Any, ...]
    name: str
    lowered: jax.stages.Lowered | None

    def compile(self, options: dict[str, Any] | None = None) -> jax.stages.Compiled:
        """Loads the program, or compiles and keeps it; options as of ``Lowered.compile``."""
        chosen = hashlib.sha256(repr(sorted((options or {}).items())).encode()).hexdigest()[:16]
        path = self.program.cache.folder / f"{self.name}-{chosen}"
        if path.exists():
            try:
                return self._load(path)
            except Exception as error:  # whatever a damaged or foreign file brings about
                logger.warning("%s cannot be loaded and is made anew: %s", path, error)
        lowered = self.lowered or self.program.jitted.lower(*self.arguments)
        # What was loaded from jax's cache cannot always be written again.
        with _jax_cache_off:
            compiled = lowered.compile(options)
        try:
            _keep(compiled, path)
        except (OSError, NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
            logger.warning("%s cannot be kept, and will be compiled again: %s", path, error)
        return compiled

    def _load(self, path: Path) -> jax.stages.Compiled:
        program, *trees = pickle.loads(path.read_bytes())
        with contextlib.suppress(OSError):  # a folder that cannot be written may still be read
            path.touch()
        devices = self.program.devices
        return serialize_executable.deserialize_and_load(
            program, *trees, backend=devices[0].client, execution_devices=devices
        )


class _JaxCacheOff:
    """Keeps jax's cache, a setting of the process, off while any thread is inside."""

    def __init__(self):
        self._lock, self._inside, self._before = threading.Lock(), 0, True

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._before = jax.config.jax_enable_compilation_cache
                self._set(False)
            self._inside += 1

    def __exit__(self, *_: object):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._set(self._before)

    def _set(self, enabled: bool) -> None:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()  # which has looked at the setting when it was first used, and never again


_jax_cache_off = _JaxCacheOff()


def _keep(compiled: jax.stages.Compiled, path: Path) -> None:
    """Writes a program; who reads it meanwhile finds nothing, or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"draft-{path.name}-{os.getpid()}")
    draft.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    draft.replace(path)


def _described(arguments: Any) -> Iterator[Any]:
    """What a compiler is told of arguments: where each is, its shape, type and sharding."""
    leaves, tree = jax.tree.flatten(arguments)
    yield str(tree)
    for leaf in leaves:
        yield leaf.shape, str(leaf.dtype), leaf.sharding


@cache
def _surroundings(devices: tuple[jax.Device, ...]) -> tuple[Any, ...]:
    """All beside the program that decides what the compiler makes of it."""
    simple = (str, int, float, bool, type(None))
    settings = [
        (name, value)
        for name, value in sorted(jax.config.values.items())
        if isinstance(value, simple) and "cache" not in name
    ]
    return (
        (jax.__version__, jaxlib.__version__, flax.__version__, sys.version),
        devices[0].client.platform_version,
        [(device.id, device.device_kind) for device in devices],
        [os.environ.get(name) for name in _ENVIRONMENT],
        settings,
        _sources(),
    )


def _sources() -> str:
    """Digest of this package's sources."""
    digest = hashlib.sha256()
    for folder, folders, files in os.walk(Path(__file__).parent, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                digest.update(name.encode() + Path(folder, name).read_bytes())
    return digest.hexdigest()
