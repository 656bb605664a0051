"""What a request asks for, what it gets back, and the sequences in between (no jax)."""

import hashlib
import numbers
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args, no_type_check

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 16

_MAX_N = 2**14  # one row must not be able to fill the host's memory with its samples
_INT32_MAX = 2**31 - 1  # integers travel to the device in int32 ...
_TINY, _HUGE = 1e-30, 1e30  # ... and reals in float32, with room for a division
_MIN_TEMPERATURE = 0.01  # vLLM's: below it, logits / temperature could overflow

SamplerVariant = Literal["greedy", "random", "top", "full"]
SAMPLERS = get_args(SamplerVariant)  # each does all that those before it do


class RequestError(ValueError):
    """A request that can never run as it is; other requests are not affected."""


# Field: what it must be, and the test of that.
_INTEGERS: dict[str, tuple[str, Callable[[int], bool]]] = {
    "n": (f"in 1..{_MAX_N}", lambda x: 1 <= x <= _MAX_N),
    "top_k": ("of at least 1, or 0 or -1 for all tokens", lambda x: -1 <= x <= _INT32_MAX),
    "seed": ("in 0..2**64-1, or None", lambda x: 0 <= x < 2**64),
    "max_tokens": ("of at least 1, or None", lambda x: 1 <= x <= _INT32_MAX),
    "min_tokens": ("of at least 0", lambda x: 0 <= x <= _INT32_MAX),
    "logprobs": (f"in 0..{MAX_LOGPROBS}, or None", lambda x: 0 <= x <= MAX_LOGPROBS),
}
_REALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("of at least 0 and finite", lambda x: 0 <= x <= _HUGE),
    "top_p": ("above 0 and at most 1", lambda x: 0 < x <= 1),
    "min_p": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "presence_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
    "repetition_penalty": ("above 0 and finite", lambda x: _TINY <= x <= _HUGE),
}
_OPTIONAL = ("seed", "max_tokens", "logprobs")


@no_type_check  # __post_init__ is the check, also where the tests check every annotation
@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token and when to stop; names, defaults and meaning are vLLM's.

    Attributes:
        n: samples of the same prompt, each with its own seed.
        temperature: 0 is greedy; a value between 0 and 0.01 is raised to 0.01.
        top_p: keep the smallest set of tokens whose probabilities add up to this.
        top_k: keep this many tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as probable as the most probable one.
        presence_penalty: subtracted from the logits of tokens already in the output.
        frequency_penalty: the same, once for every time that the token is there.
        repetition_penalty: divides positive, multiplies negative logits of tokens already in the
            prompt or the output.
        seed: the same seed gives the same tokens, whatever else runs beside the request.
        max_tokens: most tokens to generate; None: as many as `max_model_len` leaves room for.
        min_tokens: no end token and no stop token is sampled before this many.
        ignore_eos: go on after the model's end token.
        stop: strings that end the text (a single string or a list is accepted).
        stop_token_ids: token ids that end the output (a list is accepted).
        logprobs: how many of the most probable tokens to report at each position, beside the
            sampled one; 0: the sampled one only; None: no logprobs.

    Raises:
        RequestError: a field has the wrong type or lies outside its limits.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def __post_init__(self):
        for name, (rule, valid) in _INTEGERS.items():
            self._normalise(name, "an integer", numbers.Integral, int, rule, valid)
        for name, (rule, valid) in _REALS.items():
            self._normalise(name, "a number", numbers.Real, float, rule, valid)
        if not isinstance(self.ignore_eos, bool):
            raise RequestError(f"ignore_eos={self.ignore_eos!r} must be true or false")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))
        if 0 < self.temperature < _MIN_TEMPERATURE:
            object.__setattr__(self, "temperature", _MIN_TEMPERATURE)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )

    def _normalise(
        self, name: str, noun: str, kind: type, cast: type, rule: str, valid: Callable[[Any], bool]
    ) -> None:
        """Check one numeric field and store it as a plain int or float (NaN fails every rule)."""
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if not isinstance(value, kind) or isinstance(value, bool) or not valid(value):
            raise RequestError(f"{name}={value!r} must be {noun} {rule}")
        object.__setattr__(self, name, cast(value))

    @cached_property
    def counts_tokens(self) -> bool:
        """Whether the sampler has to see every token of the prompt and the output."""
        additive = self.presence_penalty != 0 or self.frequency_penalty != 0
        return additive or self.repetition_penalty != 1

    @cached_property
    def sampler(self) -> SamplerVariant:
        """The cheapest variant of the sampler that does all that these parameters ask for."""
        if self.counts_tokens or self.min_tokens > 0 or self.logprobs is not None:
            return "full"
        if self.temperature == 0:
            return "greedy"
        return "top" if self.top_k > 0 or self.top_p < 1 else "random"


def _stop_strings(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else _as_tuple("stop", stop)
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RequestError(f"stop={stop!r} must hold strings that are not empty")
    return strings


def _stop_token_ids(ids: Any) -> tuple[int, ...]:
    values = _as_tuple("stop_token_ids", ids)
    if len(values) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(values)} ids, more than the limit of {MAX_STOP_TOKEN_IDS}"
        )
    for value in values:
        integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not integer or not 0 <= value <= _INT32_MAX:
            raise RequestError(f"stop_token_ids={ids!r} must hold integers of at least 0")
    return tuple(int(value) for value in values)


def _as_tuple(name: str, values: Any) -> tuple:
    if values is None:
        return ()
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"{name}={values!r} must be a list")
    return tuple(values)


def check_request(
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    max_model_len: int,
    vocab_size: int,
    has_tokenizer: bool,
) -> None:
    """Raises RequestError where a model can never run a request.

    Args:
        prompt_token_ids: The prompt.
        params: How to sample, and when to stop.
        max_model_len: Longest sequence, prompt and output together, in tokens.
        vocab_size: Tokens that there are.
        has_tokenizer: Whether there is one, for text.
    """
    length = len(prompt_token_ids)
    if not prompt_token_ids:
        raise RequestError("the prompt has no tokens; it needs at least one")
    if length >= max_model_len:
        raise RequestError(
            f"the prompt has {length} tokens, which leaves no room for output within "
            f"max_model_len={max_model_len}; shorten it or raise max_model_len"
        )
    outside = next((token for token in prompt_token_ids if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise RequestError(
            f"prompt token {outside} is not in the vocabulary of {vocab_size} tokens"
        )
    if params.stop and not has_tokenizer:
        raise RequestError("stop strings need a tokenizer, and the model folder has none")


def derive_seed(seed: int | None, index: int, *, engine_seed: int, request_id: str) -> int:
    """The seed of sample `index` of a request, in 0..2**32-1.

    A hash, so that it depends on nothing but its arguments: not on the replica, the order of
    arrival or the process. With a seed of its own, a request's samples depend on that seed alone.
    """
    parts = (seed, index) if seed is not None else (engine_seed, request_id, index)
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


@dataclass
class Logprob:
    """One token's log-probability, of the raw logits (before temperature and penalties)."""

    logprob: float
    rank: int | None = None  # 1 = the most probable token
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One of the n samples of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None  # one dict for each token of `token_ids`
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None  # the stop token id or string; None for the end token


@dataclass
class RequestOutput:
    """A request's samples, in the order of their index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0  # prompt tokens of all samples that the prefix cache held


@dataclass(eq=False)
class Sequence:
    """One of the n samples of a request, on its way through the engine.

    The engine creates it and checks each new token; from `num_pending` down to `num_cached`,
    the fields are the scheduler's.
    """

    seq_id: int  # order of arrival; unique
    request_id: str
    index: int  # which of the n samples
    prompt: list[int]
    params: SamplingParams
    seed: int  # uint32, from derive_seed
    max_tokens: int  # resolved: len(prompt) + max_tokens <= max_model_len
    stop_ids: tuple[int, ...] = ()  # all that end it: stop_token_ids, and the model's end tokens
    output: list[int] = field(default_factory=list)  # generated tokens that the host knows
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_pending: int = 0  # tokens sampled by launched steps, not yet known to the host
    num_computed: int = 0  # tokens whose K/V the launched steps have written or will write
    replica: int | None = None
    slot: int | None = None  # row of the replica's per-sequence device state, while it runs
    pages: array = field(default_factory=lambda: array("i"))  # page ids, in order of position
    num_registered: int = 0  # of these, those that others may find by their keys
    page_keys: tuple[bytes, ...] | None = None  # of the whole pages of the prompt, once needed
    num_cached: int = 0  # prompt tokens that need not be computed at the first start
    packed: bytes = b""  # build_batch's: what never changes, as the device wants it

    @property
    def num_known(self) -> int:
        """Tokens whose values the host knows."""
        return len(self.prompt) + len(self.output)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, pending ones included."""
        return len(self.prompt) + len(self.output) + self.num_pending

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next token can be sampled; 0 once the last one has been."""
        num_output = len(self.output) + self.num_pending
        if num_output >= self.max_tokens:
            return 0
        return len(self.prompt) + num_output - self.num_computed

    def tokens_between(self, start: int, stop: int) -> list[int]:
        """Tokens at positions start..stop-1; -1 where the host does not know the value yet."""
        offset = len(self.prompt)
        if start >= offset:
            tokens = self.output[start - offset : stop - offset]
        else:
            tokens = self.prompt[start:stop] + self.output[: max(stop - offset, 0)]
        return tokens + [-1] * (stop - start - len(tokens))
