import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from fakes import save_ascii_tokenizer

from sidp_jax import LLM, SamplingParams
from sidp_jax.config import ConfigError
from sidp_jax.request import RequestError
from sidp_jax.runner import Runner

GOLDEN = Path(__file__).with_name("golden") / "qwen3"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llm") / "model"
    shutil.copytree(GOLDEN, folder)
    save_ascii_tokenizer(folder)
    return LLM(
        model=folder,
        pool_size=2,
        mode="was",
        dtype="float32",
        platform="cpu",
        max_model_len=80,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        **{"sampling.max_tokens": 3, "sampling.temperature": 0},
    )


@pytest.fixture(scope="module")
def golden():
    golden = np.load(GOLDEN / "golden.npz")
    prompts = [[int(token) for token in prompt if token >= 0] for prompt in golden["prompts"]]
    return prompts, golden["greedy"].tolist()


def test_outputs_come_in_order_and_are_those_of_hugging_face(llm, golden):
    prompts, answers = golden
    order = [2, 0, 3, 1, 1, 0]
    outputs = llm.generate([{"prompt_token_ids": prompts[i]} for i in order], GREEDY)
    for i, output in zip(order, outputs, strict=True):
        assert output.prompt_token_ids == prompts[i]
        assert output.finished
        [sample] = output.outputs
        assert sample.token_ids == answers[i][:8]
        assert (sample.index, sample.finish_reason, sample.stop_reason) == (0, "length", None)
        assert sample.logprobs is None


def test_forms_of_prompts(llm):
    [text] = llm.generate("hello", GREEDY)
    assert text.prompt == "hello"
    assert text.prompt_token_ids == llm.engine.tokenizer.encode("hello")
    ids = text.prompt_token_ids
    same = llm.generate([{"prompt": "hello"}, {"prompt_token_ids": ids}, ids], GREEDY)
    same += llm.generate(ids, GREEDY)
    assert len(same) == 4
    assert all(output.outputs[0].token_ids == text.outputs[0].token_ids for output in same)
    assert text.outputs[0].text == llm.tokenizer.decode(
        text.outputs[0].token_ids, skip_special_tokens=True
    )
    assert llm.generate([], GREEDY) == []


def test_params_for_each_prompt_and_by_default(llm):
    outputs = llm.generate(["a", "b"], [GREEDY, SamplingParams(temperature=0, max_tokens=2)])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [8, 2]
    assert len(llm.generate("ab")[0].outputs[0].token_ids) == 3
    with pytest.raises(RequestError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])


def test_samples_and_logprobs(llm):
    params = SamplingParams(n=3, seed=5, max_tokens=4, ignore_eos=True, logprobs=2)
    first, second = llm.generate(["hello", "hello"], params)
    assert [sample.index for sample in first.outputs] == [0, 1, 2]
    assert len({tuple(sample.token_ids) for sample in first.outputs}) > 1
    for one, other in zip(first.outputs, second.outputs, strict=True):
        assert one.token_ids == other.token_ids
        assert len(one.logprobs) == 4
        for token_id, entries in zip(one.token_ids, one.logprobs, strict=True):
            assert 2 <= len(entries) <= 3
            assert next(iter(entries)) == token_id
        total = sum(e[t].logprob for t, e in zip(one.token_ids, one.logprobs, strict=True))
        assert one.cumulative_logprob == pytest.approx(total)


def test_stop_strings_and_stop_tokens(llm):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    [whole] = llm.generate("stop", params)
    text, token_ids = whole.outputs[0].text, whole.outputs[0].token_ids
    stop = text[2:4]
    [cut] = llm.generate("stop", SamplingParams(temperature=0, max_tokens=40, stop=stop))
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert cut.outputs[0].text == text[: text.index(stop)]
    stop_id = token_ids[3]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop_id])
    [cut] = llm.generate("stop", params)
    count = token_ids.index(stop_id) + 1
    assert cut.outputs[0].token_ids == token_ids[:count]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop_id)
    assert cut.outputs[0].text == llm.engine.tokenizer.decode(token_ids[: count - 1])


def test_chat(llm):
    turns = [{"role": "user", "content": "hi"}]
    [output] = llm.chat(turns, GREEDY)
    assert output.prompt == "<user>hi<assistant>"
    [same] = llm.generate("<user>hi<assistant>", GREEDY)
    assert output.outputs[0].token_ids == same.outputs[0].token_ids
    two = llm.chat([turns, turns], GREEDY, chat_template_kwargs={"tail": "x"})
    assert [output.prompt for output in two] == ["<user>hi<assistant>x"] * 2
    with pytest.raises(RequestError, match="no tools here"):
        llm.chat([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_token_ids": [99_999]}, "99999"),
        ({"prompt_token_ids": []}, "no tokens"),
        ({"prompt_token_ids": [5] * 80}, "max_model_len=80"),
        ({"text": "a"}, "'prompt' and 'prompt_token_ids'"),
        ({"prompt": 5.0}, "must be a string"),
        ("\ud800", "Unicode"),
    ],
)
def test_an_invalid_prompt_raises_before_anything_runs(llm, bad, message):
    steps = llm.engine.stats.steps.total()
    with pytest.raises(RequestError, match=message):
        llm.generate(["good", bad], GREEDY)
    assert llm.engine.stats.steps.total() == steps
    assert llm.engine.num_unfinished == 0
    assert len(llm.generate("good", GREEDY)) == 1


def test_an_interrupted_call_leaves_nothing_behind(llm, monkeypatch):
    step, calls = llm.engine.step, iter(range(100))

    def interrupted():
        if next(calls) == 2:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(llm.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a"] * 20, GREEDY)
    monkeypatch.undo()
    assert llm.engine.num_unfinished == 0
    [output] = llm.generate("a", GREEDY)
    assert len(output.outputs[0].token_ids) == 8
    assert llm.engine.scheduler.kv_usage == 0


def test_nothing_compiles_after_the_start(llm):
    before = llm.engine.compilations
    llm.generate(["x" * size for size in (1, 7, 30, 60)], GREEDY)
    llm.generate("x", SamplingParams(temperature=0.7, top_p=0.9, presence_penalty=0.5))
    assert llm.engine.compilations == before


def test_keys_are_those_of_the_config(tmp_path):
    with pytest.raises(ConfigError, match="nearest known one is 'pool_size'"):
        LLM(model=tmp_path, poolsize=2)
    with pytest.raises(ConfigError, match=r"no config\.json"):
        LLM(model=tmp_path, platform="cpu")


def test_without_a_tokenizer_only_token_ids(llm, monkeypatch):
    monkeypatch.setattr(llm.engine, "tokenizer", None)
    assert llm.tokenizer is None
    [output] = llm.generate([5, 6, 7], GREEDY)
    assert (output.outputs[0].text, len(output.outputs[0].token_ids)) == ("", 8)
    with pytest.raises(RequestError, match="needs a tokenizer"):
        llm.generate("hello")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        llm.generate([5], SamplingParams(stop="x"))


@pytest.mark.parametrize(
    ("reason", "error", "message"),
    [
        ("INTERNAL: Failed to allocate Scratch 0", ConfigError, "=0.92 leaves too .* lower it"),
        ("RESOURCE_EXHAUSTED: Out of memory", ConfigError, "leaves too little memory"),
        ("INTERNAL: no such kernel", jax.errors.JaxRuntimeError, "no such kernel"),
    ],
)
def test_too_little_memory_says_what_to_set(monkeypatch, reason, error, message):
    def fail(_):
        raise jax.errors.JaxRuntimeError(f"{reason}\n[executable_name='jit__forward']")

    monkeypatch.setattr(Runner, "warm_up", fail)
    with pytest.raises(error, match=message):
        LLM(model=GOLDEN, dtype="float32", platform="cpu", max_model_len=80, max_num_seqs=4)
