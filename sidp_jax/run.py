"""The command line: ``python -m sidp_jax.run --config X.yaml [key=value ...] [--overwrite]``.

Exit codes: 0, all rows succeeded; 3, the job finished and some rows are errors; 2, wrong usage or
configuration; 1, any other failure, also an interruption. After 1 the same command goes on.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from sidp_jax.config import load_config
from sidp_jax.job import Interrupted, Job, JobEngine, JobSummary
from sidp_jax.node import REFUSALS, open_engine
from sidp_jax.progress import log_to
from sidp_jax.startup import check

SUCCESS, FAILURE, USAGE, SOME_ROWS_FAILED = 0, 1, 2, 3

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a job from its command line and returns the exit code."""
    arguments = _parse(argv)
    console = Console(stderr=True)
    _set_up_logging(console)
    overrides = [*arguments.overrides, *(["overwrite=true"] if arguments.overwrite else [])]
    try:
        config = load_config(arguments.config, overrides)
        check(config, job=True)
        with Job.open(config) as job:
            summary, engine = _run(job, console)
    except REFUSALS as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE
    except (Interrupted, KeyboardInterrupt):
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return FAILURE
    except Exception:
        logger.exception("the job failed; what is written is kept, the same command goes on")
        return FAILURE
    Console().print(_table(summary, engine))
    print(f"results: {config.output_path}")
    return SOME_ROWS_FAILED if summary.failed else SUCCESS


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sidp_jax.run",
        description="Runs every request of a batch file and writes every result to another.",
        epilog="Exit codes: 0 all rows succeeded, 3 finished with error rows, 2 usage or "
        "configuration error, 1 failure or interruption. An interrupted job goes on with the "
        "same command.",
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="X.yaml",
        help="a path, or the bare name of a file here or among those shipped, such as tiny.yaml",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew where the output exists"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that beat those of the file"
    )
    return parser.parse_intermixed_args(argv)


def _set_up_logging(console: Console) -> None:
    """Plain lines into files and pipes; on a terminal, lines that leave the bar in its place."""
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False)
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log_to(handler)


def _run(job: Job, console: Console) -> tuple[JobSummary, JobEngine | None]:
    if job.is_complete:
        logger.info("nothing is left to do; --overwrite starts anew")
        return job.count_kept(), None
    engine = open_engine(job.config)
    with _stop_signals() as should_stop:
        return job.run(engine, should_stop=should_stop, console=console), engine


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns SIGINT and SIGTERM into a flag, once: a second signal acts as it always does."""
    received: list[int] = []
    before: dict[int, object] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        received.append(number)
        restore()
        logger.info("%s: stopping after this step", signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        restore()


def _table(summary: JobSummary, engine: JobEngine | None) -> Table:
    table = Table("job", "", title=None)
    table.columns[1].justify = "right"
    table.add_row("requests", f"{summary.rows:,}")
    table.add_row("succeeded", f"{summary.succeeded:,}")
    table.add_row("errors", f"{summary.failed:,}")
    if summary.kept:
        table.add_row("of these from an earlier run", f"{summary.kept:,}")
    if summary.checked:
        share = f"{summary.correct / summary.checked:.2%}"
        table.add_row("correct answers", f"{summary.correct:,} of {summary.checked:,} ({share})")
    if engine is not None:
        tokens, seconds = summary.prompt_tokens + summary.output_tokens, summary.seconds
        stats = engine.stats
        table.add_row("seconds", f"{seconds:.1f}")
        table.add_row("requests/s", f"{(summary.rows - summary.kept) / seconds:,.1f}")
        table.add_row("total tokens/s", f"{tokens / seconds:,.1f}")
        table.add_row("output tokens/s", f"{summary.output_tokens / seconds:,.1f}")
        table.add_row("KV tokens", f"{engine.kv_tokens:,}")
        cached = engine.scheduler.num_cached_tokens
        table.add_row("tokens from the prefix cache", f"{cached:,}")
        steps = ", ".join(f"{mode} {count:,}" for mode, count in sorted(stats.steps.items()))
        table.add_row("steps per mode", steps or "none")
        table.add_row("mode switches", f"{len(stats.switches):,}")
    return table


if __name__ == "__main__":
    sys.exit(main())
