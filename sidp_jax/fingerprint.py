"""What a result file depends on: the fingerprint by which a resumed job knows its own (no jax)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sidp_jax.config import EngineConfig

_CHUNK = 1 << 20
# Larger files are told apart by their size and by samples spread over them: hashing 140 GB of
# weights would take longer than loading them. Training changes all of the weights, so some of
# the samples.
_HASHED_WHOLE = 16 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_NO_PART_OF_A_MODEL = (".md", ".jsonl", ".lock")


@dataclass(frozen=True)
class InputSurvey:
    """What one pass over the input file tells.

    Attributes:
        num_rows: Lines that are not blank.
        last_line: Number of lines.
        digest: SHA-256 of the content.
    """

    num_rows: int
    last_line: int
    digest: str


def survey_input(path: Path) -> InputSurvey:
    """Reads the whole input once, line by line."""
    digest = hashlib.sha256()
    rows = lines = 0
    with path.open("rb") as stream:
        for line in stream:
            digest.update(line)
            lines += 1
            rows += bool(line.strip())
    return InputSurvey(rows, lines, digest.hexdigest())


def job_fingerprint(config: EngineConfig, survey: InputSurvey) -> dict[str, Any]:
    """All that decides what the rows of a result say, as flat keys.

    How the work is spread (mode, pool, pages, batch sizes) is left out, since it does not change
    the answers: a job may go on with another pool or another mode.
    """
    values = {
        "input": survey.digest,
        "dtype": config.dtype,
        "load_format": config.load_format,
        "max_model_len": config.max_model_len,
        "seed": config.seed,
    }
    values |= {f"sampling.{name}": value for name, value in asdict(config.sampling).items()}
    values |= {f"model/{name}": digest for name, digest in _model_files(config.model_path)}
    return json.loads(json.dumps(values))  # as it will be read back: lists for tuples


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key in before and key in now and before[key] == now[key]:
            continue
        if key == "input":
            found.append("the content of the input file")
        elif key.startswith("model/"):
            found.append(f"the model's file {key.removeprefix('model/')}")
        else:
            found.append(f"{key} (was {before.get(key)!r}, is {now.get(key)!r})")
    return found


def _model_files(folder: Path) -> list[tuple[str, str]]:
    """The files of a model with their digests, in order of their names."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and path.suffix not in _NO_PART_OF_A_MODEL:
            found.append((name.as_posix(), _file_digest(path)))
    return found


def _file_digest(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= _HASHED_WHOLE:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
        else:
            for sample in range(_SAMPLES):
                stream.seek(sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
