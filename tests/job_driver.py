"""Runs a job with the fake engine in a process of its own: ``job_driver.py INPUT OUTPUT MODEL``."""

import sys

from fakes import FakeEngine

from sidp_jax.config import EngineConfig
from sidp_jax.job import Job

if __name__ == "__main__":
    source, output, model = sys.argv[1:]
    config = EngineConfig(model=model, input=source, output=output)
    with Job.open(config) as job:
        print(job.results.kept, flush=True)
        job.run(FakeEngine(step_seconds=0.001))
