"""The process of one pool of a node: an engine that runs what arrives (see ``node``)."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections import Counter
from dataclasses import fields, replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from sidp_jax.node import REFUSALS, Facts, Load, Report, open_engine
from sidp_jax.progress import log_to

if TYPE_CHECKING:
    from sidp_jax.engine import Engine

_REPORT_SECONDS = 0.1


def serve(engine: Engine, connection: Connection) -> None:
    """Runs what arrives until told to end, or nobody is at the other end.

    Args:
        engine: Runs the requests.
        connection: To the node. It takes ``("add", (id, prompt_token_ids, params))``, ``("abort",
            id)``, ``("recall", count)`` and ``("end", None)``, and gives ``("step", (outputs,
            Report))`` and ``("recalled", ids)``.
    """
    reported = 0.0
    while True:
        while connection.poll(0 if engine.has_work else None):
            kind, content = connection.recv()
            if kind == "end":
                return
            if kind == "add":
                engine.add_request(*content)
            elif kind == "abort":
                engine.abort(content)
            else:
                connection.send(("recalled", engine.recall(content)))
        outputs = engine.step()
        for output in outputs:
            output.prompt_token_ids = []  # the node has them
        now = time.monotonic()
        if outputs or now - reported >= _REPORT_SECONDS or not engine.has_work:
            connection.send(("step", (outputs, _report(engine))))
            reported = now


def _report(engine: Engine) -> Report:
    """How an engine is getting on, as it is now."""
    stats = engine.stats
    return Report(
        replace(stats, steps=Counter(stats.steps), switches=list(stats.switches)),
        Load(**{each.name: getattr(engine.scheduler, each.name) for each in fields(Load)}),
        engine.mode,
        engine.compilations,
    )


def main() -> None:
    """Builds the engine that the node asks for, and serves it."""
    for asked_to_stop in (signal.SIGINT, signal.SIGTERM):  # may go to all; the node decides
        signal.signal(asked_to_stop, signal.SIG_IGN)
    number, descriptor = map(int, sys.argv[1:])
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s pool {number}: %(message)s"))
    log_to(handler)
    connection = Connection(descriptor)
    try:
        _, config = connection.recv()
        try:
            engine = open_engine(config)
        except REFUSALS as error:
            connection.send(("refused", str(error)))
            return
        facts = Facts(
            max_concurrency=engine.max_concurrency,
            kv_tokens=engine.kv_tokens,
            max_model_len=engine.max_model_len,
            vocab_size=engine.model_config.vocab_size,
        )
        connection.send(("ready", (facts, _report(engine))))
        serve(engine, connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is at the other end


if __name__ == "__main__":
    main()
