import json

import pytest
from fakes import FakeTokenizer, write_rows

from sidp_jax.request import RequestError, SamplingParams
from sidp_jax.rows import CHAT, COMPLETIONS, RowError, decode_row, parse_request, read_rows

DEFAULTS = SamplingParams(temperature=0, max_tokens=8)
MESSAGES = [{"role": "user", "content": "hi"}]


def parse(values, defaults=DEFAULTS):
    return parse_request(decode_row(3, json.dumps(values).encode()), defaults)


def batch(body, url=COMPLETIONS):
    return {"custom_id": "a", "method": "POST", "url": url, "body": body}


def test_plain_rows():
    request = parse({"prompt": "hello", "temperature": 0.5, "expected": "x", "custom_id": "a"})
    assert (request.url, request.prompt) == (COMPLETIONS, "hello")
    assert request.params == SamplingParams(temperature=0.5, max_tokens=8)
    assert parse({"prompt_token_ids": [1, 2]}).prompt == [1, 2]
    chat = parse({"messages": MESSAGES})
    assert (chat.url, chat.prompt, chat.messages) == (CHAT, None, MESSAGES)


def test_batch_rows():
    request = parse(batch({"model": "m", "prompt": "hello", "user": "u", "metadata": {"a": 1}}))
    assert (request.url, request.prompt, request.model) == (COMPLETIONS, "hello", "m")
    request = parse(batch({"messages": MESSAGES, "chat_template_kwargs": {"x": 1}}, CHAT))
    assert (request.url, request.template_arguments) == (CHAT, {"x": 1})


@pytest.mark.parametrize(
    ("prompt", "want"),
    [("a", "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), (["a"], "a"), ([], [])],
)
def test_forms_of_a_prompt(prompt, want):
    assert parse({"prompt": prompt}).prompt == want


def test_all_sampling_fields():
    given = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "repetition_penalty": 1.1,
        "seed": 7,
        "max_tokens": 5,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop": ["x", "y"],
        "stop_token_ids": [4],
        "logprobs": 2,
    }
    assert parse({"prompt": "a", **given}).params == SamplingParams(**given)


def test_null_means_the_default_but_for_max_tokens():
    request = parse({"prompt": "a", "temperature": None, "n": None, "stop": None})
    assert request.params == DEFAULTS
    assert parse({"prompt": "a", "max_tokens": None}).params.max_tokens is None
    assert parse({"messages": MESSAGES, "max_completion_tokens": 3}).params.max_tokens == 3


def test_logprobs_of_both_interfaces():
    assert parse({"prompt": "a", "logprobs": 0}).params.logprobs == 0
    chat = {"messages": MESSAGES}
    assert parse({**chat, "logprobs": True}).params.logprobs == 0
    assert parse({**chat, "logprobs": True, "top_logprobs": 3}).params.logprobs == 3
    assert parse({**chat, "logprobs": False}).params.logprobs is None
    assert parse(chat, SamplingParams(logprobs=1)).params.logprobs == 1


@pytest.mark.parametrize(
    "field",
    [
        {"tools": []},
        {"stream": False},
        {"echo": False},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"tool_choice": "none"},
        {"suffix": None},
    ],
)
def test_unsupported_fields_are_accepted_where_they_change_nothing(field):
    assert parse({"prompt": "a", **field}).params == DEFAULTS


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"prompt": "a", "tools": [{}]}, "unsupported", "'tools'"),
        ({"prompt": "a", "stream": True}, "unsupported", "'stream'"),
        ({"prompt": "a", "echo": True}, "unsupported", "'echo'"),
        ({"prompt": "a", "best_of": 2}, "unsupported", "'best_of'"),
        ({"prompt": "a", "suffix": "x"}, "unsupported", "'suffix'"),
        ({"prompt": "a", "logit_bias": {"1": 2}}, "unsupported", "'logit_bias'"),
        ({"prompt": "a", "functions": [{}]}, "unsupported", "'functions'"),
        ({"prompt": "a", "response_format": {"type": "json_object"}}, "unsupported", "'response_"),
        ({"prompt": "a", "temprature": 0}, "unsupported", "'temprature'.* 'temperature'"),
        ({"prompt": "a", "top_logprobs": 1}, "unsupported", "'top_logprobs' does not belong"),
        ({"prompt": ["a", "b"]}, "unsupported", "one prompt per row"),
        ({"prompt": [[1], [2]]}, "unsupported", "one prompt per row"),
        ({"prompt": [True]}, "unsupported", "one prompt per row"),
        ({"prompt": [["a"]]}, "invalid_request", "token ids"),
        ({"prompt": 5}, "invalid_request", "prompt=5 must"),
        ({"prompt_token_ids": "abc"}, "invalid_request", "prompt_token_ids='abc' must"),
        ({"prompt_token_ids": [[1]]}, "invalid_request", r"prompt_token_ids=\[\[1\]\] must"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "invalid_request", "one of prompt"),
        ({}, "invalid_request", "one of prompt"),
        ({"prompt": "a", "temperature": "hot"}, "invalid_request", "temperature='hot'"),
        ({"prompt": "a", "n": 0}, "invalid_request", "n=0"),
        ({"prompt": "a", "logprobs": True}, "invalid_request", "logprobs=True"),
        ({"prompt": "a", "logprobs": 21}, "invalid_request", "logprobs=21"),
        ({"prompt": "a", "stop": 5}, "invalid_request", "stop=5"),
        ({"prompt": "a", "expected": 5}, "invalid_request", "expected=5"),
        ({"prompt": "a", "model": 5}, "invalid_request", "model=5"),
        ({"prompt": "a", "return_token_ids": 5}, "invalid_request", "return_token_ids=5"),
        ({"messages": []}, "invalid_request", "messages="),
        ({"messages": ["hi"]}, "invalid_request", "'hi'"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "content=None"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_request", "content=5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "unsupported",
            "image_url",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "unsupported",
            "'tool_calls'",
        ),
        ({"messages": MESSAGES, "prompt": "a"}, "unsupported", "'prompt' does not belong"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "invalid_request", "needs logprobs=true"),
        (
            {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21},
            "invalid_request",
            "top_logprobs=21",
        ),
        ({"messages": MESSAGES, "logprobs": 3}, "invalid_request", "logprobs=3"),
        ({"messages": MESSAGES, "chat_template_kwargs": 3}, "invalid_request", "template_kwargs=3"),
        (batch("x"), "invalid_request", "body='x'"),
        (batch({"prompt": "a"}, "/v1/embeddings"), "unsupported", "url='/v1/embeddings'"),
        (batch({"prompt": "a"}, None), "unsupported", "url=None"),
        (batch({"prompt": "a"}) | {"method": "GET"}, "unsupported", "method='GET'"),
        (batch({"prompt": "a"}) | {"bdy": 1}, "unsupported", "'bdy'"),
        (batch({"messages": MESSAGES}), "unsupported", "'messages' does not belong"),
    ],
)
def test_rows_that_cannot_run(values, code, message):
    with pytest.raises(RowError, match=message) as info:
        parse(values)
    assert info.value.code == code


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", "invalid_json"),
        (b"[1]", "invalid_json"),
        (b'"text"', "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b'{"custom_id": 5, "prompt": "a"}', "invalid_request"),
        (b'{"custom_id": "", "prompt": "a"}', "invalid_request"),
        (b'{"custom_id": "\\ud800", "prompt": "a"}', "invalid_request"),
    ],
)
def test_lines_that_are_no_rows(line, code):
    row = decode_row(7, line)
    assert row.custom_id == "row-7"
    with pytest.raises(RowError) as info:
        parse_request(row, DEFAULTS)
    assert info.value.code == code


def test_lines_are_numbered_and_blank_ones_skipped(tmp_path):
    path = write_rows(
        tmp_path / "in.jsonl",
        [b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"  \r", {"custom_id": "x", "prompt": "b"}],
    )
    rows = list(read_rows(path))
    assert [(row.line, row.custom_id) for row in rows] == [(1, "row-1"), (4, "x")]
    assert all(row.error is None for row in rows)


def test_encode():
    tokenizer = FakeTokenizer()
    assert parse({"prompt": "ab"}).encode(tokenizer) == ("ab", [97, 98])
    assert parse({"prompt": [5]}).encode(None) == (None, [5])
    text, token_ids = parse({"messages": MESSAGES}).encode(tokenizer)
    assert (text, len(token_ids)) == ("<user>hi", 8)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        parse({"prompt": "ab"}).encode(None)


def test_content_parts_are_joined():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse({"messages": [{"role": "user", "content": content}]}).messages == [
        {"role": "user", "content": "ab"}
    ]
