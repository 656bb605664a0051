"""The engine: schedule -> step -> postprocess, one step ahead of the devices."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from sidp_jax.batch import build_batch
from sidp_jax.compilation import compilations
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import Policy, PolicyState
from sidp_jax.progress import EngineStats
from sidp_jax.request import (
    SAMPLERS,
    CompletionOutput,
    Logprob,
    RequestError,
    RequestOutput,
    SamplingParams,
    Sequence,
    check_request,
    derive_seed,
)
from sidp_jax.runner import Runner
from sidp_jax.sampling import Sampled
from sidp_jax.scheduler import Scheduler, StepPlan
from sidp_jax.tokenizer import Detokenizer, Tokenizer

logger = logging.getLogger(__name__)


@dataclass
class _Request:
    """A request and its samples, while they run."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    outputs: list[CompletionOutput] = field(default_factory=list)
    unfinished: set[int] = field(default_factory=set)  # sequence numbers
    num_cached_tokens: int = 0


@dataclass
class _Sample:
    """One sequence with what its output needs."""

    sequence: Sequence
    request: _Request
    output: CompletionOutput
    detokenizer: Detokenizer | None


@dataclass(frozen=True)
class _Launched:
    """A step that the devices work on, and what will have been sampled."""

    plan: StepPlan
    sampled: Sampled


class Engine:
    """Generates tokens for requests over all replicas of a pool.

    ``step`` sends step ``n + 1`` to the devices before it looks at what step ``n`` sampled, so the
    devices never wait for the host; that a sequence has ended is therefore known one step late,
    and the token that was computed in vain is dropped.

    Args:
        runner: The devices and their programs, warmed up.
        scheduler: Places sequences and pages; empty.
        policy: Picks the mode of each step.
        max_model_len: Longest sequence, prompt and output together, in tokens.
        seed: Seed of the requests that bring none.
        tokenizer: For text, or None where only token ids are wanted.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        policy: Policy,
        *,
        max_model_len: int,
        seed: int,
        tokenizer: Tokenizer | None,
    ):
        self.runner, self.scheduler, self.policy = runner, scheduler, policy
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.stats = EngineStats()
        self._seed = seed
        self._decision = PolicyState()
        self._in_flight: _Launched | None = None
        self._samples: dict[int, _Sample] = {}
        self._requests: dict[str, _Request] = {}
        self._next_id = count()

    @property
    def model_config(self) -> ModelConfig:
        """The model's architecture."""
        return self.runner.program.config

    @property
    def mode(self) -> str | None:
        """Mode of the last step."""
        return self._decision.mode

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV caches of all replicas hold."""
        shapes = self.runner.shapes
        return self.runner.program.layout.pool_size * shapes.num_kv_pages * shapes.page_size

    @property
    def max_concurrency(self) -> int:
        """Sequences that can be in one step, over all replicas."""
        return self.runner.program.layout.pool_size * self.runner.shapes.max_num_seqs

    @property
    def compilations(self) -> int:
        """XLA compilations of this process until now."""
        return compilations()

    @property
    def num_unfinished(self) -> int:
        """Requests that are waiting or running."""
        return len(self._requests)

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do."""
        return bool(self._requests) or self._in_flight is not None

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queues a request.

        Args:
            request_id: A name that no unfinished request has.
            prompt_token_ids: The prompt.
            params: How to sample, and when to stop.
            prompt: The prompt's text, handed back with the output.

        Raises:
            RequestError: The request can never run; no other request is affected.
        """
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is already in use by a running request")
        self.check_request(prompt_token_ids, params)
        request = _Request(request_id, prompt, list(prompt_token_ids), params)
        room = self.max_model_len - len(prompt_token_ids)
        eos = () if params.ignore_eos else self.model_config.eos_token_ids
        for index in range(params.n):
            sequence = Sequence(
                seq_id=next(self._next_id),
                request_id=request_id,
                index=index,
                prompt=request.prompt_token_ids,
                params=params,
                seed=derive_seed(params.seed, index, engine_seed=self._seed, request_id=request_id),
                max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
                stop_ids=tuple(dict.fromkeys((*eos, *params.stop_token_ids))),
            )
            self.scheduler.add(sequence)
            output = CompletionOutput(index=index, text="", token_ids=sequence.output)
            if params.logprobs is not None:
                output.logprobs, output.cumulative_logprob = [], 0.0
            detokenizer = None
            if self.tokenizer is not None:
                detokenizer = Detokenizer(self.tokenizer, request.prompt_token_ids, params.stop)
            self._samples[sequence.seq_id] = _Sample(sequence, request, output, detokenizer)
            request.outputs.append(output)
            request.unfinished.add(sequence.seq_id)
        self._requests[request_id] = request

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises what ``add_request`` would, without queueing anything.

        Args:
            prompt_token_ids: The prompt.
            params: How to sample, and when to stop.

        Raises:
            RequestError: The request can never run.
        """
        check_request(
            prompt_token_ids,
            params,
            max_model_len=self.max_model_len,
            vocab_size=self.model_config.vocab_size,
            has_tokenizer=self.tokenizer is not None,
        )

    def abort(self, request_id: str) -> None:
        """Drops a request; unknown ones are ignored."""
        if self._requests.pop(request_id, None) is None:
            return
        self.scheduler.abort(request_id)
        ended = [
            i for i, sample in self._samples.items() if sample.request.request_id == request_id
        ]
        for seq_id in ended:
            del self._samples[seq_id]

    def recall(self, most: int) -> list[str]:
        """Drops requests of which nothing has been computed, the newest first.

        Args:
            most: How many at most.

        Returns:
            Their ids, for another engine to run.
        """
        untouched = Counter(sequence.request_id for sequence in self.scheduler.untouched())
        found = []
        for request_id, request in reversed(self._requests.items()):
            if len(found) == most:
                break
            if untouched[request_id] == request.params.n:
                found.append(request_id)
        for request_id in found:
            self.abort(request_id)
        return found

    def step(self) -> list[RequestOutput]:
        """Sends the next step to the devices and collects the one before it.

        Returns:
            The requests that have finished, with all of their samples.
        """
        plan = self.scheduler.schedule()
        launched = None if plan is None else self._launch(plan)
        finished = [] if self._in_flight is None else self._collect(self._in_flight)
        if launched is None and self._in_flight is None and self._requests:
            raise RuntimeError(
                f"{len(self._requests)} requests wait, but nothing runs and none can be admitted"
            )
        self._in_flight = launched
        return finished

    def _launch(self, plan: StepPlan) -> _Launched:
        batch = next(
            shape for shape in self.runner.shapes.batches if shape.tokens >= plan.max_tokens
        )
        self._decision, switch = self.policy.decide(self._decision, batch.tokens)
        if switch is not None:
            self.stats.switches.append(switch)
            logger.info("%s", switch)
        mode = self._decision.mode
        self.stats.steps[mode] += 1
        needed = {chunk.sequence.params.sampler for chunks in plan.replicas for chunk in chunks}
        variant = max(needed, key=SAMPLERS.index)
        buffer = build_batch(plan, batch, self.runner.shapes.page_size)
        return _Launched(plan, self.runner.launch(mode, variant, batch, buffer))

    def _collect(self, launched: _Launched) -> list[RequestOutput]:
        sampled = Sampled(*(None if a is None else np.asarray(a) for a in launched.sampled))
        finished = []
        for replica, chunks in enumerate(launched.plan.replicas):
            for row, chunk in enumerate(chunks):
                sample = self._samples.get(chunk.sequence.seq_id)
                if not chunk.samples or sample is None:
                    continue
                self._accept(sample, sampled, replica, row)
                if sample.sequence.finish_reason is not None:
                    del self._samples[chunk.sequence.seq_id]
                    sample.request.unfinished.remove(chunk.sequence.seq_id)
                    if not sample.request.unfinished:
                        finished.append(self._output(sample.request))
        return finished

    def _accept(self, sample: _Sample, sampled: Sampled, replica: int, row: int) -> None:
        """Takes one sampled token into its sequence, and ends the sequence if it is the last."""
        sequence, params, output = sample.sequence, sample.sequence.params, sample.output
        token = int(sampled.tokens[replica, row])
        self.scheduler.record_token(sequence, token)
        self.stats.output_tokens += 1
        if output.logprobs is not None:
            self._add_logprobs(output, params.logprobs, token, sampled, replica, row)
        may_stop = len(sequence.output) >= params.min_tokens
        if token in sequence.stop_ids and may_stop:
            given = token in params.stop_token_ids
            return self._finish(sample, "stop", token if given else None)
        stop = None if sample.detokenizer is None else sample.detokenizer.append(token)
        if stop is not None and may_stop:
            return self._finish(sample, "stop", stop)
        if len(sequence.output) >= sequence.max_tokens:
            return self._finish(sample, "length", None)

    def _finish(self, sample: _Sample, reason: str, stop_reason: int | str | None) -> None:
        self.scheduler.finish(sample.sequence, reason)
        sample.request.num_cached_tokens += sample.sequence.num_cached
        output = sample.output
        output.finish_reason, output.stop_reason = reason, stop_reason
        if sample.detokenizer is not None:
            output.text = sample.detokenizer.text

    def _add_logprobs(
        self,
        output: CompletionOutput,
        wanted: int,
        token: int,
        sampled: Sampled,
        replica: int,
        row: int,
    ) -> None:
        """Appends the sampled token's log probability and those of the most probable tokens."""

        def entry(token: int, logprob: float, rank: int) -> Logprob:
            return Logprob(logprob, rank, self._token_text(token))

        logprob = sampled.logprob[replica, row].item()
        entries = {token: entry(token, logprob, sampled.rank[replica, row].item())}
        top_ids = sampled.top_ids[replica, row, :wanted].tolist()
        top_logprobs = sampled.top_logprobs[replica, row, :wanted].tolist()
        for rank, (top, top_logprob) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
            if top >= 0:
                entries.setdefault(top, entry(top, top_logprob, rank))
        output.logprobs.append(entries)
        output.cumulative_logprob += logprob

    def _token_text(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def _output(self, request: _Request) -> RequestOutput:
        del self._requests[request.request_id]
        self.stats.prompt_tokens += len(request.prompt_token_ids)
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=request.outputs,
            finished=True,
            num_cached_tokens=request.num_cached_tokens,
        )
