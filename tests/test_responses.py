import json

from fakes import FakeEngine

from sidp_jax.request import SamplingParams
from sidp_jax.responses import dump_row, error_row, first_text, success_row
from sidp_jax.rows import RowError, decode_row, parse_request


def respond(values, engine=None):
    """The output row of an input row, through the fake engine."""
    engine = engine or FakeEngine()
    row = decode_row(5, json.dumps(values).encode())
    request = parse_request(row, SamplingParams(temperature=0))
    prompt, token_ids = request.encode(engine.tokenizer)
    engine.add_request(row.row_id, token_ids, request.params, prompt)
    outputs = []
    while not outputs:
        outputs = engine.step()
    result = success_row(
        row, request, outputs[0], model="served", with_text=engine.tokenizer is not None
    )
    assert json.loads(dump_row(result)) == result
    return result


def test_completion():
    assert respond({"custom_id": "a", "prompt": "abc", "max_tokens": 2, "n": 2}) == {
        "id": "row-5",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": "row-5",
            "body": {
                "id": "cmpl-row-5",
                "object": "text_completion",
                "created": 0,
                "model": "served",
                "choices": [
                    {
                        "index": index,
                        "text": text,
                        "logprobs": None,
                        "finish_reason": "length",
                        "stop_reason": None,
                        "token_ids": None,
                    }
                    for index, text in enumerate(["cb", "ba"])
                ],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            },
        },
        "error": None,
    }


def test_chat_completion():
    result = respond({"messages": [{"role": "user", "content": "x"}], "model": "mine"})
    body = result["response"]["body"]
    assert (body["id"], body["object"]) == ("chatcmpl-row-5", "chat.completion")
    assert body["model"] == "mine"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "x>resu<"}
    assert "text" not in body["choices"][0]


def test_completion_logprobs_have_openais_form():
    result = respond({"prompt": "ab", "logprobs": 1})
    assert result["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["b", "a"],
        "token_logprobs": [-2.0, -2.0],
        "top_logprobs": [{"b": -2.0, "c": -1.0}, {"a": -2.0, "b": -1.0}],
        "text_offset": [0, 1],
    }


def test_chat_logprobs_have_openais_form():
    messages = [{"role": "user", "content": "é"}]
    row = {"messages": messages, "logprobs": True, "max_tokens": 1}

    def entry(token, logprob):
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    def content(top):
        result = respond({**row, "top_logprobs": top})
        return result["response"]["body"]["choices"][0]["logprobs"]["content"]

    sampled = entry("é", -2.0)
    assert content(0) == [sampled | {"top_logprobs": []}]
    assert content(1) == [sampled | {"top_logprobs": [entry("ê", -1.0)]}]
    assert content(2) == [sampled | {"top_logprobs": [entry("ê", -1.0), sampled]}]
    # An infinite logprob is written as a number.
    assert content(3)[0]["top_logprobs"][2] == entry("ì", -9999.0)


def test_without_a_tokenizer_the_token_ids_are_the_result():
    result = respond({"prompt": [5, 6], "logprobs": 0}, FakeEngine(tokenizer=None))
    choice = result["response"]["body"]["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [6, 5])
    assert choice["logprobs"]["tokens"] == ["token_id:6", "token_id:5"]


def test_token_ids_on_request():
    result = respond({"prompt": "ab", "return_token_ids": True})
    assert result["response"]["body"]["choices"][0]["token_ids"] == [98, 97]


def test_error_rows_have_the_same_columns():
    row = decode_row(5, b"{")
    error = error_row(row, row.error)
    assert error.keys() == respond({"prompt": "a"}).keys()
    assert error["response"] is None
    assert error["error"]["code"] == "invalid_json"
    assert first_text(error) is None


def test_the_first_text_is_stripped():
    assert first_text(respond({"prompt": " a "})) == "a"


def test_a_row_can_always_be_written():
    row = decode_row(5, b"{}")
    raw = dump_row(error_row(row, RowError("x", "lone \ud800 surrogate, ü")))
    assert json.loads(raw)["error"]["message"] == "lone ? surrogate, ü"
    assert raw.endswith(b"\n")
    assert raw.count(b"\n") == 1
