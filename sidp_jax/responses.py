"""Rows of the output file, in OpenAI's batch form (no jax).

Every row has the same columns: ``id``, ``custom_id``, ``response`` (null in an error row) and
``error`` (null in a good one). Nothing in a row depends on when or where it was made: ``created``
is always 0, so that two runs of the same job can be compared line by line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sidp_jax.request import CompletionOutput, Logprob, RequestOutput
from sidp_jax.rows import CHAT, Row, RowError, RowRequest

# JSON has no infinity; vLLM writes the same number for it.
_LOWEST_LOGPROB = -9999.0


def dump_row(row: dict[str, Any]) -> bytes:
    """One line of the output file. What UTF-8 cannot hold is replaced by ``?``."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"


def error_row(row: Row, error: RowError) -> dict[str, Any]:
    """The output row of an input row that did not run."""
    return {
        "id": row.row_id,
        "custom_id": row.custom_id,
        "response": None,
        "error": {"code": error.code, "message": str(error)},
    }


def success_row(
    row: Row, request: RowRequest, output: RequestOutput, *, model: str, with_text: bool
) -> dict[str, Any]:
    """The output row of an input row that ran.

    Args:
        row: The input row.
        request: What it asked for.
        output: What the engine made of it.
        model: Name of the model, for rows that did not name one.
        with_text: Whether there is a tokenizer; without it the token ids are the result.
    """
    chat = request.url == CHAT
    with_token_ids = request.return_token_ids or not with_text
    generated = sum(len(sample.token_ids) for sample in output.outputs)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{row.row_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model if request.model is None else request.model,
        "choices": [_choice(sample, request, with_token_ids) for sample in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": generated,
            "total_tokens": len(output.prompt_token_ids) + generated,
        },
    }
    return {
        "id": row.row_id,
        "custom_id": row.custom_id,
        "response": {"status_code": 200, "request_id": row.row_id, "body": body},
        "error": None,
    }


def first_text(row: Mapping[str, Any]) -> str | None:
    """The text of a good row's first choice, stripped; None for an error row."""
    if row["response"] is None:
        return None
    choice = row["response"]["body"]["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return text.strip()


def _choice(sample: CompletionOutput, request: RowRequest, with_token_ids: bool) -> dict[str, Any]:
    logprobs = None
    if request.url == CHAT:
        content = {"message": {"role": "assistant", "content": sample.text}}
        if sample.logprobs is not None:
            logprobs = _chat_logprobs(sample, request.params.logprobs)
    else:
        content = {"text": sample.text}
        if sample.logprobs is not None:
            logprobs = _completion_logprobs(sample)
    return {
        "index": sample.index,
        **content,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
        "token_ids": sample.token_ids if with_token_ids else None,
    }


def _completion_logprobs(sample: CompletionOutput) -> dict[str, list]:
    tokens, values, top, offsets, offset = [], [], [], [], 0
    for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        text = _token_text(token_id, entries[token_id])
        tokens.append(text)
        values.append(_finite(entries[token_id]))
        best: dict[str, float] = {}
        for other, entry in entries.items():
            best.setdefault(_token_text(other, entry), _finite(entry))
        top.append(best)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def _chat_logprobs(sample: CompletionOutput, wanted: int) -> dict[str, list]:
    content = []
    for token_id, entries in zip(sample.token_ids, sample.logprobs, strict=True):
        # The sampled token is always there; it is a top one only if its rank says so.
        best = [item for item in entries.items() if item[1].rank <= wanted]
        best.sort(key=lambda item: item[1].rank)
        top = [_chat_logprob(other, entry) for other, entry in best]
        content.append({**_chat_logprob(token_id, entries[token_id]), "top_logprobs": top})
    return {"content": content}


def _chat_logprob(token_id: int, entry: Logprob) -> dict[str, Any]:
    text = _token_text(token_id, entry)
    return {"token": text, "logprob": _finite(entry), "bytes": list(text.encode())}


def _token_text(token_id: int, entry: Logprob) -> str:
    return f"token_id:{token_id}" if entry.decoded_token is None else entry.decoded_token


def _finite(entry: Logprob) -> float:
    return max(entry.logprob, _LOWEST_LOGPROB)
