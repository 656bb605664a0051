"""Rows of the input file: what they may hold, and the requests that they stand for (no jax).

A row is a JSON object, in OpenAI's batch form or plain::

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    {"custom_id": "a", "prompt": "1+1=", "max_tokens": 4, "expected": "2"}

Either may carry ``expected``, the right answer. A plain row is a body with ``custom_id`` and
``expected`` in it. Nothing in a row is ignored in silence: a field that is unknown, or known and
not supported, makes the row an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from sidp_jax.request import MAX_LOGPROBS, RequestError, SamplingParams

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

_ENVELOPE = {"custom_id", "method", "url", "body", "expected"}
_SAMPLING = {field.name for field in fields(SamplingParams)} - {"max_tokens", "logprobs"}
# Accepted, and without effect on the tokens.
_HARMLESS = {
    "metadata",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
}
_COMMON = _SAMPLING | _HARMLESS | {"logprobs", "max_tokens", "model", "return_token_ids"}
_KNOWN = {
    COMPLETIONS: _COMMON | {"prompt", "prompt_token_ids"},
    CHAT: _COMMON | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"},
}
# Fields of the same interfaces that change the result, and are accepted only where they do not.
_UNSUPPORTED = {
    "audio",
    "best_of",
    "echo",
    "function_call",
    "functions",
    "logit_bias",
    "modalities",
    "parallel_tool_calls",
    "prediction",
    "prompt_logprobs",
    "reasoning_effort",
    "response_format",
    "stream",
    "stream_options",
    "suffix",
    "tool_choice",
    "tools",
    "web_search_options",
}
_NEUTRAL = (None, False, "", [], {}, "none", {"type": "text"})


class RowError(ValueError):
    """A row that cannot become a request; the job goes on.

    Attributes:
        code: One of ``invalid_json``, ``invalid_request``, ``unsupported``,
            ``duplicate_custom_id``.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


@runtime_checkable
class Encodes(Protocol):
    """What rows need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def encode_chat(
        self, messages: Sequence[dict[str, Any]], template_arguments: dict[str, Any] | None = None
    ) -> tuple[str, list[int]]:
        """A conversation as text and tokens."""
        ...


@dataclass(frozen=True)
class Row:
    """One line of the input.

    Attributes:
        line: Number of the line, from 1.
        custom_id: The user's name for it, or ``row-<line>``.
        values: The JSON object, None if the line is none.
        error: Why the line is not even that.
    """

    line: int
    custom_id: str
    values: dict[str, Any] | None
    error: RowError | None = None

    @property
    def row_id(self) -> str:
        """Identity of the row in the job: its line."""
        return f"row-{self.line}"

    @property
    def expected(self) -> str | None:
        """The right answer, if the row carries one."""
        expected = None if self.values is None else self.values.get("expected")
        return expected if isinstance(expected, str) else None


@dataclass(frozen=True)
class RowRequest:
    """What a row asks for.

    Attributes:
        url: The interface, ``COMPLETIONS`` or ``CHAT``.
        prompt: Text or token ids, or None for a conversation.
        messages: The conversation, or None.
        template_arguments: Variables for the chat template.
        params: How to sample; the job's defaults are filled in.
        model: The name to answer with, or None.
        return_token_ids: Whether the result is to hold the token ids.
    """

    url: str
    prompt: str | list[int] | None
    messages: list[dict[str, Any]] | None
    template_arguments: dict[str, Any]
    params: SamplingParams
    model: str | None
    return_token_ids: bool

    def encode(self, tokenizer: Encodes | None) -> tuple[str | None, list[int]]:
        """The prompt's text, None if it came as tokens, and its tokens.

        Raises:
            RequestError: There is no tokenizer, or it refuses the text.
        """
        if isinstance(self.prompt, list):
            return None, self.prompt
        if tokenizer is None:
            raise RequestError("text needs a tokenizer, and the model has none; send token ids")
        if self.prompt is not None:
            return self.prompt, tokenizer.encode(self.prompt)
        return tokenizer.encode_chat(self.messages, self.template_arguments)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time; blank lines are skipped, but counted as lines."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield decode_row(number, line)


def decode_row(number: int, line: bytes) -> Row:
    """Reads one line; whatever is wrong with it becomes the row's ``error``."""
    default = f"row-{number}"
    try:
        values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        return Row(number, default, None, RowError("invalid_json", f"not JSON: {error}"))
    if not isinstance(values, dict):
        kind = type(values).__name__
        return Row(number, default, None, RowError("invalid_json", f"not an object, but a {kind}"))
    custom_id = values.get("custom_id")
    if custom_id is None:
        return Row(number, default, values)
    if not isinstance(custom_id, str) or not custom_id or not _is_unicode(custom_id):
        message = f"custom_id={custom_id!r:.100} must be a string that is not empty"
        return Row(number, default, None, RowError("invalid_request", message))
    return Row(number, custom_id, values)


def parse_request(row: Row, defaults: SamplingParams) -> RowRequest:
    """Reads a row as a request.

    Args:
        row: The row.
        defaults: Sampling parameters for what the row does not say.

    Raises:
        RowError: The row cannot be run.
    """
    if row.error is not None:
        raise row.error
    url, body = _url_and_body(row.values)
    expected = row.values.get("expected")
    if expected is not None and not isinstance(expected, str):
        raise RowError("invalid_request", f"expected={expected!r:.100} must be a string")
    body = _supported(url, body)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise RowError("invalid_request", f"model={model!r:.100} must be a string")
    arguments = body.get("chat_template_kwargs") or {}
    if not isinstance(arguments, dict):
        raise RowError("invalid_request", f"chat_template_kwargs={arguments!r:.100} is no object")
    return RowRequest(
        url=url,
        prompt=_prompt(body) if url == COMPLETIONS else None,
        messages=_messages(body.get("messages")) if url == CHAT else None,
        template_arguments=arguments,
        params=_sampling(url, body, defaults),
        model=model,
        return_token_ids=_flag(body, "return_token_ids"),
    )


def _url_and_body(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if "body" not in values:
        body = {key: value for key, value in values.items() if key not in ("custom_id", "expected")}
        return (CHAT if "messages" in body else COMPLETIONS), body
    unknown = sorted(values.keys() - _ENVELOPE)
    if unknown:
        raise RowError("unsupported", f"unknown field {unknown[0]!r:.100} beside body")
    if values.get("method", "POST") != "POST":
        raise RowError("unsupported", f"method={values['method']!r:.100} must be 'POST'")
    url, body = values.get("url"), values["body"]
    if url not in (COMPLETIONS, CHAT):
        raise RowError("unsupported", f"url={url!r:.100} must be {COMPLETIONS!r} or {CHAT!r}")
    if not isinstance(body, dict):
        raise RowError("invalid_request", f"body={body!r:.100} must be an object")
    return url, body


def _supported(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The body without fields that have no effect.

    Raises:
        RowError: It has fields that are unknown or not supported.
    """
    known = _KNOWN[url]
    for key, value in body.items():
        if key in known:
            continue
        if key in _UNSUPPORTED:
            if value not in _NEUTRAL:
                raise RowError("unsupported", f"field {key!r} is not supported; leave it out")
        elif any(key in others for others in _KNOWN.values()):
            raise RowError("unsupported", f"field {key!r} does not belong to {url}")
        else:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise RowError(
                "unsupported", f"unknown field {key!r:.100}; the nearest known one is {near!r}"
            )
    return {key: value for key, value in body.items() if key in known}


def _prompt(body: dict[str, Any]) -> str | list[int]:
    prompt, token_ids = body.get("prompt"), body.get("prompt_token_ids")
    if (prompt is None) == (token_ids is None):
        raise RowError(
            "invalid_request", "a row needs one of prompt, prompt_token_ids and messages"
        )
    if prompt is None:
        prompt = token_ids
    elif isinstance(prompt, list) and prompt and not _is_token_list(prompt):
        if len(prompt) > 1 or not isinstance(prompt[0], (str, list)):
            raise RowError(
                "unsupported",
                f"prompt is a list of {len(prompt)}; write one prompt per row: a string or a list "
                "of token ids",
            )
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str) and token_ids is None:
        return prompt
    if not isinstance(prompt, list) or not _is_token_list(prompt):
        name = "prompt" if token_ids is None else "prompt_token_ids"
        raise RowError("invalid_request", f"{name}={prompt!r:.100} must be a list of token ids")
    return prompt


def _is_token_list(values: list[Any]) -> bool:
    return all(type(value) is int for value in values)


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise RowError("invalid_request", f"messages={messages!r:.100} must be a list of messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, Any]:
    """A message whose content is one string."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RowError("invalid_request", f"message {message!r:.100} needs a role and a content")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in _NEUTRAL:
            raise RowError("unsupported", f"field {key!r:.100} of a message is not supported")
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                raise RowError("unsupported", f"content part {part!r:.100} is no text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError("invalid_request", f"content={content!r:.100} must be a string")
    return {key: message[key] for key in ("role", "name") if key in message} | {"content": content}


def _sampling(url: str, body: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    given = {key: body[key] for key in _SAMPLING if body.get(key) is not None}
    for key in ("max_tokens", "max_completion_tokens"):
        if key in body:  # null is a value here: as much as there is room for
            given["max_tokens"] = body[key]
    if url == COMPLETIONS and "logprobs" in body:
        given["logprobs"] = body["logprobs"]
    elif url == CHAT and ("logprobs" in body or "top_logprobs" in body):
        given["logprobs"] = _chat_logprobs(body)
    try:
        return replace(defaults, **given)
    except RequestError as error:
        raise RowError("invalid_request", str(error)) from None


def _chat_logprobs(body: dict[str, Any]) -> int | None:
    """Chat's pair of ``logprobs`` (a switch) and ``top_logprobs`` (how many)."""
    top = body.get("top_logprobs")
    if not _flag(body, "logprobs"):
        if top:
            raise RowError("invalid_request", f"top_logprobs={top!r:.100} needs logprobs=true")
        return None
    if top is not None and (type(top) is not int or not 0 <= top <= MAX_LOGPROBS):
        raise RowError("invalid_request", f"top_logprobs={top!r:.100} must be in 0..{MAX_LOGPROBS}")
    return top or 0


def _flag(body: dict[str, Any], key: str) -> bool:
    value = body.get(key)
    if value is not None and not isinstance(value, bool):
        raise RowError("invalid_request", f"{key}={value!r:.100} must be true or false")
    return bool(value)


def _is_unicode(text: str) -> bool:
    """Whether a string can be written: JSON can hold lone surrogates, UTF-8 cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)
