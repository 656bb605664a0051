"""The report of a benchmark: its header, and that it is whole on disk after every row."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

from report import Report


def read(path):
    return json.loads(path.read_text())


def test_the_header_says_what_where_and_how(tmp_path, monkeypatch):
    out = tmp_path / "new" / "report.json"
    words = ["bench.py", "--sizes", "16", "--out", str(out), "--modes", "was", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", words)
    Report("CPU devices", out, ceilings={"TB/s": 1.0})
    content = read(out)
    assert content["what"] == "CPU devices"
    assert content["device"] == "cpu"
    assert set(content["versions"]) == {"jax", "platform", "python"}
    assert content["command"] == "python bench.py --sizes 16 --modes was"
    assert content["ceilings"] == {"TB/s": 1.0}


def test_every_row_is_on_disk_at_once(tmp_path, capsys):
    out = tmp_path / "report.json"
    report = Report("CPU devices", out)
    for count in (1, 2):
        report.add("steps", {"count": count, "ms": 1 / 3, "hidden": 0}, show=("count", "ms"))
        assert len(read(out)["steps"]) == count
    assert read(out)["steps"][0]["ms"] == 1 / 3
    assert capsys.readouterr().out.endswith('s steps {"count": 2, "ms": 0.33333}\n')
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_an_exception_becomes_an_entry(tmp_path):
    out = tmp_path / "report.json"
    report = Report("CPU devices", out)
    with report.errors(tokens=16):
        raise ValueError("too small")
    assert read(out)["errors"] == [{"tokens": 16, "error": "ValueError: too small"}]


def test_an_interrupt_is_no_entry():
    report = Report("CPU devices", None)
    with pytest.raises(KeyboardInterrupt), report.errors(tokens=16):
        raise KeyboardInterrupt
    assert "errors" not in report.content
