"""The result file of a job: appended row by row, and continued after any interruption (no jax).

Beside the output lies a manifest, ``<output>.manifest.json``, with the fingerprint of the job. It
is written before the first row, so that rows without a manifest cannot exist. The identity of a
row is the number of its input line, which its ``id`` holds; since the fingerprint vouches for the
input, the number is enough to know what is done, also among duplicates and blank lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sidp_jax.config import ConfigError
from sidp_jax.fingerprint import changes
from sidp_jax.responses import dump_row, first_text

logger = logging.getLogger(__name__)

_SUCCEEDED, _FAILED = 1, 2
_BLOCK = 1 << 16


class ResultFile:
    """The output of one job, open for appending; it is locked against a second writer.

    Nine bytes of memory per input line hold what is done.

    Attributes:
        path: The output file.
        succeeded: Good rows in the file.
        failed: Error rows in the file.
        kept: Rows that were there when the file was opened.
    """

    def __init__(self, path: Path, stream: BinaryIO, last_line: int):
        self.path, self._stream = path, stream
        self.succeeded = self.failed = self.kept = 0
        self._state = bytearray(last_line + 1)
        self._texts = array("Q")  # digests of the kept texts; made when there are any

    @classmethod
    def open(
        cls, path: Path, fingerprint: dict[str, Any], *, last_line: int, overwrite: bool
    ) -> ResultFile:
        """Opens the output of a job, new or to be continued.

        A last line without its end, which a killed job leaves, is cut off.

        Args:
            path: The output file.
            fingerprint: What the results depend on.
            last_line: Lines of the input.
            overwrite: Start anew, whatever is there.

        Raises:
            ConfigError: The file belongs to something else, or is being written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("ab+")
        except OSError as error:
            raise ConfigError(f"cannot write the output: {error}; set another output") from None
        try:
            _lock(stream, path)
            if overwrite:
                stream.truncate(0)
            if stream.seek(0, os.SEEK_END) == 0:
                _write_manifest(path, fingerprint)
            else:
                _check_manifest(path, fingerprint)
                _mend(stream)
            results = cls(path, stream, last_line)
            results._read_back()
        except BaseException:
            stream.close()
            raise
        return results

    def __enter__(self) -> ResultFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def num_rows(self) -> int:
        """Rows in the file."""
        return self.succeeded + self.failed

    def is_done(self, line: int) -> bool:
        """Whether an input line has its row."""
        return self._state[line] != 0

    def kept_answer_is(self, line: int, expected: str) -> bool:
        """Whether the text of a row kept from an earlier run is the expected one."""
        return self._state[line] == _SUCCEEDED and self._texts[line] == _digest(expected.strip())

    def append(self, line: int, row: dict[str, Any]) -> None:
        """Writes the row of an input line, and hands it to the operating system at once."""
        assert not self.is_done(line), f"line {line} has its row already"
        self._stream.write(dump_row(row))
        self._stream.flush()
        self._count(line, row["error"] is None)

    def close(self) -> None:
        """Writes everything to the disk and gives up the lock."""
        if not self._stream.closed:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()

    def _count(self, line: int, good: bool) -> None:
        self._state[line] = _SUCCEEDED if good else _FAILED
        self.succeeded += good
        self.failed += not good

    def _read_back(self) -> None:
        self._stream.seek(0)
        for number, raw in enumerate(self._stream, start=1):
            try:
                row = json.loads(raw)
                line = int(row["id"].removeprefix("row-"))
                text = first_text(row)
                if not 1 <= line < len(self._state) or self.is_done(line):
                    raise ValueError(f"id {row['id']!r} is not in the input, or is here twice")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise ConfigError(
                    f"line {number} of {self.path} is not a row of this job ({error}); set another "
                    "output, or start anew with --overwrite"
                ) from None
            if not self._texts:
                self._texts = array("Q", bytes(8 * len(self._state)))
            self._texts[line] = 0 if text is None else _digest(text)
            self._count(line, row["error"] is None)
        self.kept = self.num_rows


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output file lies."""
    return output.with_name(output.name + ".manifest.json")


def _lock(stream: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"another job is writing {path}; wait for its end, or set another output"
        ) from None
    except OSError as error:
        logger.warning("%s cannot be locked (%s): let no other job write it", path, error)


def _write_manifest(output: Path, fingerprint: dict[str, Any]) -> None:
    """Replaces the manifest in one step: whoever reads it finds all of it."""
    path = manifest_path(output)
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as stream:
        json.dump(fingerprint, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    draft.replace(path)


def _check_manifest(output: Path, fingerprint: dict[str, Any]) -> None:
    remedy = "set another output, or start anew with --overwrite"
    path = manifest_path(output)
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(before, dict):
            raise ValueError("it holds no object")
    except FileNotFoundError:
        raise ConfigError(
            f"{output} exists and has no {path.name} beside it, so it is not the result of a job; "
            f"{remedy}"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); {remedy}") from None
    changed = changes(before, fingerprint)
    if changed:
        raise ConfigError(
            f"{output} is the result of another job; since then changed: {', '.join(changed)}; "
            f"undo that, {remedy}"
        )


def _mend(stream: BinaryIO) -> None:
    """Cuts off what follows the last line end."""
    end = stream.seek(0, os.SEEK_END)
    for start, block in _blocks_from_end(stream, end):
        newline = block.rfind(b"\n")
        if newline >= 0:
            stream.truncate(start + newline + 1)
            return
    stream.truncate(0)


def _blocks_from_end(stream: BinaryIO, end: int) -> Iterator[tuple[int, bytes]]:
    while end > 0:
        start = max(0, end - _BLOCK)
        stream.seek(start)
        yield start, stream.read(end - start)
        end = start


def _digest(text: str) -> int:
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")
