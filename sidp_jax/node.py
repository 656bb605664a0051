"""A node of several pools: an engine in a process each, one queue before them (no jax).

Pools share nothing but the queue, so each steps by itself; with pools of one replica this is plain
data parallelism. A request goes to the pool that has met its beginning, as far as load is even, or
else to the one with fewest sequences. What waits in one pool while another could run more comes
back, for the other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from sidp_jax.config import ConfigError, EngineConfig
from sidp_jax.models.config import UnsupportedModelError
from sidp_jax.pages import leading, page_keys
from sidp_jax.progress import EngineStats
from sidp_jax.request import RequestError, RequestOutput, SamplingParams, check_request
from sidp_jax.safetensors_files import CheckpointError
from sidp_jax.startup import resolve_platform, start_jax, visible_gpus
from sidp_jax.tokenizer import TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from sidp_jax.engine import Engine

logger = logging.getLogger(__name__)

_QUEUE = 2  # sequences in a pool, as a multiple of what it runs at a time
_SLACK = 8  # a pool may be ahead by this share of its queue for the sake of a shared beginning
_BLOCK = 256  # tokens by which beginnings are compared
_MOST_BEGINNINGS = 1 << 16
_PATIENCE_SECONDS = 0.2  # that a step waits for news
_FAREWELL_SECONDS = 10


REFUSALS = (ConfigError, UnsupportedModelError, CheckpointError, TokenizerError)
"""What ``open_engine`` raises where the user has to change something; the message says what."""


def open_engine(config: EngineConfig) -> Engine | Node:
    """The engine that a configuration asks for, ready to generate.

    Raises:
        ConfigError: Something is missing or does not fit; the message says what to set.
        CheckpointError: The checkpoint is incomplete, damaged, or made for another model.
    """
    if config.num_pools > 1:
        return Node(config)
    start_jax(config)
    from sidp_jax.build import build_engine  # imports jax

    return build_engine(config)


@dataclass(frozen=True)
class Facts:
    """What a pool's process says of its engine once it is ready."""

    max_concurrency: int
    kv_tokens: int
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class Load:
    """What a scheduler holds, with its names; of a node the sums, and the means of the shares."""

    num_running: int = 0
    num_waiting: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    kv_usage: float = 0.0
    prefix_hit_rate: float = 0.0


@dataclass(frozen=True)
class Report:
    """How a pool is getting on."""

    stats: EngineStats = field(default_factory=EngineStats)
    load: Load = field(default_factory=Load)
    mode: str | None = None
    compilations: int = 0


@dataclass(frozen=True)
class Request:
    """A request that waits, or that a pool has; the prompt's text stays with the node."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None


@runtime_checkable
class Process(Protocol):
    """What the node needs of ``subprocess.Popen``."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code."""
        ...

    def kill(self) -> None:
        """Ends it."""
        ...


@dataclass
class _Pool:
    """A pool's process, and what is in it."""

    number: int
    process: Process
    connection: Connection
    facts: Facts | None = None
    report: Report = field(default_factory=Report)
    requests: dict[str, Request] = field(default_factory=dict)
    num_sequences: int = 0
    recalled: bool = False  # it was asked for requests, and has not answered

    @property
    def room(self) -> int:
        """Sequences that it may be given."""
        return _QUEUE * self.facts.max_concurrency - self.num_sequences

    def send(self, kind: str, content: Any) -> None:
        """Sends a message; a process that has ended is an error."""
        try:
            self.connection.send((kind, content))
        except OSError:
            raise self.failure() from None

    def failure(self) -> RuntimeError:
        """What to raise when the process has ended."""
        code = self.process.wait()
        return RuntimeError(f"pool {self.number} ended with exit code {code}; its log says why")


class Node:
    """Several pools behind the face of one engine.

    Args:
        config: What each pool runs; ``num_pools`` of them.

    Raises:
        ConfigError: A pool cannot run.
        RuntimeError: The process of a pool has ended, here or in any method.
    """

    def __init__(self, config: EngineConfig):
        self.tokenizer = load_tokenizer(config.model_path)
        self.stats = EngineStats()
        self._waiting: OrderedDict[str, Request] = OrderedDict()
        self._beginnings: OrderedDict[bytes, int] = OrderedDict()
        self._shares_beginnings = config.enable_prefix_caching
        self._pools: list[_Pool] = []
        self._news: queue.SimpleQueue[tuple[_Pool, tuple | None]] = queue.SimpleQueue()
        self._end = weakref.finalize(self, _end, self._pools)
        environments = list(_environments(config))
        alone = replace(config, num_pools=1, input=None, output=None)
        try:
            # The first alone: what it compiles and reads, the others find.
            self._start(alone, environments[:1])
            self._start(alone, environments[1:])
        except BaseException:
            self.close()
            raise

    def _start(self, config: EngineConfig, environments: Sequence[dict[str, str]]) -> None:
        """Starts processes and waits until they are ready."""
        for environment in environments:
            pool = _launch(len(self._pools), environment)
            self._pools.append(pool)
            # Somebody always listens, so a pool that has much to say never keeps the node waiting.
            threading.Thread(target=_listen, args=(pool, self._news), daemon=True).start()
            pool.send("config", config)
        while not all(pool.facts for pool in self._pools):
            pool, (kind, content) = self._next_news(None)
            if kind == "refused":
                raise ConfigError(f"pool {pool.number}: {content}")
            pool.facts, pool.report = content
            logger.info("pool %d is ready: %d KV tokens", pool.number, pool.facts.kv_tokens)

    def _next_news(self, patience: float | None) -> tuple[_Pool, tuple[str, Any]]:
        """The next message of any pool; raises queue.Empty after so many seconds without one."""
        pool, message = self._news.get(timeout=patience)
        if message is None:
            raise pool.failure()
        return pool, message

    def close(self) -> None:
        """Ends the processes of the pools."""
        self._end()

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV caches of all pools hold."""
        return sum(pool.facts.kv_tokens for pool in self._pools)

    @property
    def max_concurrency(self) -> int:
        """Sequences that can run at a time, over all pools."""
        return sum(pool.facts.max_concurrency for pool in self._pools)

    @property
    def compilations(self) -> int:
        """XLA compilations of all pools until now."""
        return sum(pool.report.compilations for pool in self._pools)

    @property
    def mode(self) -> str | None:
        """Modes of the last steps."""
        return " and ".join(sorted({p.report.mode for p in self._pools if p.report.mode})) or None

    @property
    def scheduler(self) -> Load:
        """What the schedulers of all pools hold, and what waits before them."""
        loads = [pool.report.load for pool in self._pools]
        return Load(
            num_running=sum(load.num_running for load in loads),
            num_waiting=sum(load.num_waiting for load in loads) + len(self._waiting),
            num_preemptions=sum(load.num_preemptions for load in loads),
            num_cached_tokens=sum(load.num_cached_tokens for load in loads),
            kv_usage=sum(load.kv_usage for load in loads) / len(loads),
            prefix_hit_rate=sum(load.prefix_hit_rate for load in loads) / len(loads),
        )

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything left to do."""
        return bool(self._waiting) or any(pool.requests for pool in self._pools)

    def check_request(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises RequestError where a request can never run, without queueing anything."""
        facts = self._pools[0].facts
        check_request(
            prompt_token_ids,
            params,
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            has_tokenizer=self.tokenizer is not None,
        )

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None = None,
    ) -> None:
        """Queues a request; as ``Engine.add_request``."""
        if request_id in self._waiting or any(request_id in p.requests for p in self._pools):
            raise RequestError(f"request id {request_id!r} is already in use by a running request")
        self.check_request(prompt_token_ids, params)
        self._waiting[request_id] = Request(request_id, list(prompt_token_ids), params, prompt)

    def abort(self, request_id: str) -> None:
        """Drops a request; unknown ones are ignored."""
        self._waiting.pop(request_id, None)
        for pool in self._pools:
            if request_id in pool.requests:
                self._take(pool, request_id)
                pool.send("abort", request_id)

    def step(self) -> list[RequestOutput]:
        """Hands out what waits, and collects what has finished; waits a moment for news.

        Returns:
            The requests that have finished, with all of their samples.
        """
        self._hand_out()
        self._recall()
        finished, patience = [], _PATIENCE_SECONDS
        while True:
            try:
                pool, (kind, content) = self._next_news(patience)
            except queue.Empty:
                return finished
            finished += self._hear(pool, kind, content)
            patience = 0.0

    def _hand_out(self) -> None:
        while self._waiting:
            open_pools = [pool for pool in self._pools if pool.room > 0]
            if not open_pools:
                return
            _, request = self._waiting.popitem(last=False)
            pool = self._choose(open_pools, request.prompt_token_ids)
            pool.requests[request.request_id] = request
            pool.num_sequences += request.params.n
            pool.send("add", (request.request_id, request.prompt_token_ids, request.params))

    def _choose(self, pools: list[_Pool], prompt: list[int]) -> _Pool:
        least = min(pools, key=lambda pool: pool.num_sequences)
        if not self._shares_beginnings:
            return least
        keys = tuple(page_keys(prompt, _BLOCK))
        known = leading(keys, self._beginnings.__contains__)
        if known:
            number = self._beginnings[keys[known - 1]]
            slack = _QUEUE * least.facts.max_concurrency // _SLACK
            home = next((pool for pool in pools if pool.number == number), None)
            if home is not None and home.num_sequences <= least.num_sequences + slack:
                least = home
        for key in keys:
            self._beginnings[key] = least.number
            self._beginnings.move_to_end(key)
        while len(self._beginnings) > _MOST_BEGINNINGS:
            self._beginnings.popitem(last=False)
        return least

    def _recall(self) -> None:
        """Asks for requests that wait in one pool while another could run more."""
        if self._waiting:
            return
        idle = sum(
            max(0, pool.facts.max_concurrency - pool.num_sequences)
            for pool in self._pools
            if not pool.report.load.num_waiting
        )
        for pool in self._pools:
            if idle > 0 and pool.report.load.num_waiting > 1 and not pool.recalled:
                count = min(idle, pool.report.load.num_waiting // 2)
                pool.recalled = True
                pool.send("recall", count)
                idle -= count

    def _hear(self, pool: _Pool, kind: str, content: Any) -> list[RequestOutput]:
        """Takes a message of a pool in; returns what has finished by it."""
        if kind == "recalled":
            pool.recalled = False
            for name in content:
                if name in pool.requests:  # or it was aborted meanwhile
                    self._waiting[name] = self._take(pool, name)
                    self._waiting.move_to_end(name, last=False)
            return []
        outputs, report = content
        self._add_up(pool, report)
        finished = []
        for output in outputs:
            if output.request_id in pool.requests:
                request = self._take(pool, output.request_id)
                output.prompt_token_ids = request.prompt_token_ids
                output.prompt = request.prompt
                finished.append(output)
        return finished

    def _take(self, pool: _Pool, request_id: str) -> Request:
        request = pool.requests.pop(request_id)
        pool.num_sequences -= request.params.n
        return request

    def _add_up(self, pool: _Pool, report: Report) -> None:
        before, now = pool.report.stats, report.stats
        self.stats.prompt_tokens += now.prompt_tokens - before.prompt_tokens
        self.stats.output_tokens += now.output_tokens - before.output_tokens
        self.stats.steps.update(now.steps - before.steps)
        self.stats.switches += now.switches[len(before.switches) :]
        pool.report = report


def _environments(config: EngineConfig) -> Iterator[dict[str, str]]:
    """For each pool the environment of its process: on GPUs, it sees its own alone."""
    if resolve_platform(config.platform) == "cpu":
        yield from ({},) * config.num_pools
        return
    gpus, size = visible_gpus(), config.num_devices
    for first in range(0, config.num_pools * size, size):
        yield {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + size])}


def _launch(number: int, environment: dict[str, str]) -> _Pool:
    """Starts the process of a pool."""
    ours, theirs = Pipe()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "sidp_jax.node_worker", str(number), str(theirs.fileno())],
            env=os.environ | environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return _Pool(number, process, ours)


def _listen(pool: _Pool, news: queue.SimpleQueue) -> None:
    """Passes on what a pool says; at the end, None."""
    try:
        while True:
            news.put((pool, pool.connection.recv()))
    except (EOFError, OSError):
        news.put((pool, None))


def _end(pools: list[_Pool]) -> None:
    """Ends processes; each does so by itself when it is told to, or nobody is left to tell it."""
    for pool in pools:
        with contextlib.suppress(OSError):
            pool.connection.send(("end", None))
    for pool in pools:
        try:
            pool.process.wait(_FAREWELL_SECONDS)
        except subprocess.TimeoutExpired:
            pool.process.kill()
            pool.process.wait()
