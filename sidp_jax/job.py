"""A batch file in, a result file out: every input row yields exactly one output row (no jax)."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from rich.console import Console

from sidp_jax.config import EngineConfig
from sidp_jax.fingerprint import InputSurvey, job_fingerprint, survey_input
from sidp_jax.progress import ProgressReport, Watched
from sidp_jax.request import RequestError, RequestOutput, SamplingParams
from sidp_jax.responses import error_row, first_text, success_row
from sidp_jax.results import ResultFile
from sidp_jax.rows import Row, RowError, RowRequest, parse_request, read_rows

logger = logging.getLogger(__name__)

# Requests in the engine, as a multiple of what it runs at a time: enough to admit the next one
# at once, and no more, so that memory does not grow with the file.
_QUEUE = 2


@runtime_checkable
class JobEngine(Watched, Protocol):
    """What a job needs of the engine."""

    tokenizer: Any
    max_concurrency: int
    kv_tokens: int
    has_work: bool

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queues a request, or raises RequestError."""
        ...

    def step(self) -> list[RequestOutput]:
        """Goes on, and returns the requests that have finished."""
        ...


class Interrupted(Exception):
    """The job was asked to stop; what is written stays, and the same command goes on."""


@dataclass
class JobSummary:
    """How a job ended.

    Attributes:
        rows: Rows of the input.
        succeeded: Good rows in the output.
        failed: Error rows in the output.
        kept: Rows that an earlier run of the job had written.
        checked: Rows that carry an expected answer.
        correct: Those of them whose first output, stripped, is that answer, stripped.
        prompt_tokens: Prompt tokens of this run.
        output_tokens: Generated tokens of this run.
        seconds: Time of this run, without loading the model.
    """

    rows: int
    succeeded: int = 0
    failed: int = 0
    kept: int = 0
    checked: int = 0
    correct: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0


class Job:
    """One input file, its result file, and what is left to do.

    Args:
        config: What to run; ``input`` and ``output`` are set.
        survey: What the input holds.
        results: The output, open.
    """

    def __init__(self, config: EngineConfig, survey: InputSurvey, results: ResultFile):
        self.config, self.survey, self.results = config, survey, results
        self._in_flight: dict[str, tuple[Row, RowRequest]] = {}
        self._summary = JobSummary(survey.num_rows, kept=results.kept)

    @classmethod
    def open(cls, config: EngineConfig) -> Job:
        """Reads the input once, and opens the output, new or to be continued.

        Raises:
            ConfigError: The output belongs to something else.
        """
        survey = survey_input(config.input_path)
        results = ResultFile.open(
            config.output_path,
            job_fingerprint(config, survey),
            last_line=survey.last_line,
            overwrite=config.overwrite,
        )
        if results.kept:
            logger.info(
                "%s holds %d of %d rows already", config.output, results.kept, survey.num_rows
            )
        return cls(config, survey, results)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.results.close()

    @property
    def is_complete(self) -> bool:
        """Whether every input row has its output row."""
        return self.results.num_rows == self.survey.num_rows

    def count_kept(self) -> JobSummary:
        """The summary of a job that is complete; no engine is needed."""
        assert self.is_complete
        for _ in self._pending_rows():
            raise AssertionError("a row is pending in a complete job")
        return self._summarise()

    def run(
        self,
        engine: JobEngine,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        console: Console | None = None,
    ) -> JobSummary:
        """Runs what is left.

        Args:
            engine: Runs the requests. What it raises ends the job.
            should_stop: Asked between two rows or steps.
            console: Where the progress bar goes, if it is a terminal.

        Raises:
            Interrupted: ``should_stop`` said so.
        """
        started, stats = time.monotonic(), engine.stats
        prompt_tokens, output_tokens = stats.prompt_tokens, stats.output_tokens
        rows, limit = self._pending_rows(), _QUEUE * engine.max_concurrency
        done, total = self.results.num_rows, self.survey.num_rows
        with ProgressReport(engine, total, done=done, console=console) as report:
            while True:
                if should_stop():
                    raise Interrupted
                if len(self._in_flight) < limit and (row := next(rows, None)) is not None:
                    self._submit(engine, row)
                    continue
                if not self._in_flight:
                    break
                self._step(engine)
                report.update(self.results.num_rows)
        assert self.is_complete, f"{self.results.num_rows} rows of {self.survey.num_rows}"
        self._summary.prompt_tokens = stats.prompt_tokens - prompt_tokens
        self._summary.output_tokens = stats.output_tokens - output_tokens
        self._summary.seconds = time.monotonic() - started
        return self._summarise()

    def _pending_rows(self) -> Iterator[Row]:
        """Rows without a result, in order; duplicates become error rows on the way."""
        seen = _IdSet()
        for row in read_rows(self.config.input_path):
            duplicate = not seen.add(row.custom_id)
            if self.results.is_done(row.line):
                if row.expected is not None:
                    right = self.results.kept_answer_is(row.line, row.expected)
                    self._count_answer(right)
            elif duplicate:
                message = f"custom_id {row.custom_id!r:.100} is taken by an earlier row"
                self._fail(row, RowError("duplicate_custom_id", message))
            else:
                yield row

    def _submit(self, engine: JobEngine, row: Row) -> None:
        try:
            request = parse_request(row, self.config.sampling)
            prompt, token_ids = request.encode(engine.tokenizer)
            engine.add_request(row.row_id, token_ids, request.params, prompt)
        except RowError as error:
            self._fail(row, error)
        except RequestError as error:
            self._fail(row, RowError("invalid_request", str(error)))
        else:
            self._in_flight[row.row_id] = (row, request)

    def _step(self, engine: JobEngine) -> None:
        outputs = engine.step()
        for output in outputs:
            row, request = self._in_flight.pop(output.request_id)
            result = success_row(
                row,
                request,
                output,
                model=self.config.model,
                with_text=engine.tokenizer is not None,
            )
            self.results.append(row.line, result)
            if row.expected is not None:
                self._count_answer(first_text(result) == row.expected.strip())
        if not outputs and self._in_flight and not engine.has_work:
            unfinished = len(self._in_flight)
            raise RuntimeError(f"the engine stopped with {unfinished} requests unfinished")

    def _fail(self, row: Row, error: RowError) -> None:
        self.results.append(row.line, error_row(row, error))
        if row.expected is not None:
            self._count_answer(False)

    def _count_answer(self, right: bool) -> None:
        self._summary.checked += 1
        self._summary.correct += right

    def _summarise(self) -> JobSummary:
        self._summary.succeeded = self.results.succeeded
        self._summary.failed = self.results.failed
        return self._summary


class _IdSet:
    """A set of strings in 16 bytes each: their digests, recent ones in a set, others sorted."""

    _RECENT = 1 << 16

    def __init__(self):
        self._recent: set[bytes] = set()
        self._sorted = np.empty(0, "S16")

    def add(self, text: str) -> bool:
        """Adds a string; False if it was there."""
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._recent or self._is_sorted_in(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) == self._RECENT:
            merged = np.concatenate([self._sorted, np.array(list(self._recent), "S16")])
            self._sorted = np.sort(merged)
            self._recent.clear()
        return True

    def _is_sorted_in(self, digest: bytes) -> bool:
        place = np.searchsorted(self._sorted, np.array(digest, "S16"))
        # numpy drops zero bytes at the end, of both alike: all digests have one length.
        if place == len(self._sorted):
            return False
        return bytes(self._sorted[place]) == digest.rstrip(b"\0")
