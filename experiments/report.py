"""The report that every benchmark writes: what was measured where, how to repeat it, and the rows.

A report is written anew after every row, so that a run that is cut off keeps what it has.
"""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax


def header(what: str) -> dict[str, Any]:
    """What every report begins with.

    Args:
        what: How the figures came about (measured, compiled, CPU devices, simulated) and on what.

    Returns:
        ``what``, device, versions, command and date; on NVIDIA GPUs also driver and clocks.
    """
    device = jax.local_devices()[0]
    content = {
        "what": what,
        "device": device.device_kind,
        "versions": {
            "jax": jax.__version__,
            "platform": " ".join(device.client.platform_version.split()),
            "python": platform.python_version(),
        },
        "command": " ".join(["python", *_without_out(sys.argv)]),
        "date": datetime.date.today().isoformat(),
    }
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm", "--format=csv,noheader"]
        content["nvidia_smi"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return content


def _without_out(words: list[str]) -> list[str]:
    """A command line without ``--out``: where the report lies is no part of how it came about."""
    pairs = zip([None, *words], words, strict=False)
    return [word for before, word in pairs if "--out" not in (before, word.partition("=")[0])]


class Report:
    """A report that is on disk after every change.

    Args:
        what: See ``header``.
        out: The JSON file; None only prints.
        facts: Further fields of the header, such as the ceilings.
    """

    def __init__(self, what: str, out: Path | None, **facts: Any):
        self.content = header(what) | facts
        self._out, self._started = out, time.monotonic()
        print(json.dumps(self.content), flush=True)
        self.write()

    def add(self, section: str, row: dict[str, Any], show: Collection[str] | None = None) -> None:
        """Appends a row to a section, writes the file, and prints the row.

        Args:
            section: The list in the report.
            row: The figures of one case.
            show: What of the row to print; everything by default.
        """
        self.content.setdefault(section, []).append(row)
        self.write()
        shown = {name: row[name] for name in row if show is None or name in show}
        elapsed = time.monotonic() - self._started
        print(f"{elapsed:5.0f} s {section}", json.dumps(_rounded(shown)), flush=True)

    @contextmanager
    def errors(self, **case: Any) -> Iterator[None]:
        """Makes an exception an entry of the section ``errors``, so that the rest goes on.

        Args:
            case: What was tried.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc(limit=-3)
            message = f"{type(error).__name__}: {error}"
            self.add("errors", case | {"error": message[:1000]})

    def write(self) -> None:
        """Writes the file; what was there before is replaced in one go."""
        if self._out is None:
            return
        self._out.parent.mkdir(parents=True, exist_ok=True)
        partial = self._out.with_name(self._out.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self._out)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Floats with five significant digits, to be read."""
    return {
        name: float(f"{value:.5g}") if isinstance(value, float) else value
        for name, value in row.items()
    }
