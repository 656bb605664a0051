"""Runs a job with the fake engine in a process of its own, and says what that took.

Usage: ``job_driver.py INPUT OUTPUT MODEL STEP_SECONDS``.
"""

import json
import re
import sys
from pathlib import Path

from fakes import FakeEngine

from sidp_jax.config import EngineConfig
from sidp_jax.job import Job

if __name__ == "__main__":
    source, output, model, step_seconds = sys.argv[1:]
    config = EngineConfig(model=model, input=source, output=output)
    engine = FakeEngine(step_seconds=float(step_seconds), max_model_len=10_000)
    with Job.open(config) as job:
        print("working", flush=True)
        job.run(engine)
    # Not from getrusage: its maximum counts the parent's memory at the time of the fork.
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(
        json.dumps({"peak_bytes": 1024 * int(peak[1]), "most_unfinished": engine.most_unfinished})
    )
