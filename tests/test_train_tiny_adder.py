"""The embedded model: how it is trained and written, and the files that are in the package."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from sidp_jax.models.config import ModelConfig
from sidp_jax.models.hf import tensor_slots

sys.path.append(str(Path(__file__).resolve().parent.parent / "experiments"))

import tiny_adder
import train_tiny_adder

ASSET = Path(__file__).resolve().parent.parent / "sidp_jax/assets/tiny_adder"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """A very small model after a few steps: what main returned, and its folder."""
    folder = tmp_path_factory.mktemp("adder")
    result = train_tiny_adder.main(
        ["--smoke", "--out", str(folder), "--results", str(folder / "training.json")]
    )
    return result, folder


def load_params(folder):
    """Reads a checkpoint the obvious way: every tensor to its place, as float32."""
    config = ModelConfig.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    params = jax.tree.map(np.array, train_tiny_adder.init_params(config, seed=1))
    for name, slot in tensor_slots(config).items():
        target = params["outer"] if slot.layer is None else params["layers"]
        target = target[slot.param] if slot.layer is None else target[slot.param][slot.layer]
        target[slot.index] = tensors[name].astype(np.float32).reshape(slot.part_shape)
    return config, jax.tree.map(jnp.asarray, params)


def test_loss_falls(smoke):
    result, _ = smoke
    assert result["steps_done"] == 60
    assert result["losses"][-1] < 0.9 * result["losses"][0]


def test_results_are_json_without_infinity(smoke):
    result, folder = smoke
    assert json.loads((folder / "training.json").read_text(), parse_constant=pytest.fail) == result


def test_export_has_exactly_the_model_s_tensors_in_bfloat16(smoke):
    result, folder = smoke
    config = ModelConfig.from_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    assert {name: t.shape for name, t in tensors.items()} == {
        name: slot.shape for name, slot in tensor_slots(config).items()
    }
    assert {t.dtype for t in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert sum(t.size for t in tensors.values()) == result["parameters"]


def test_exported_weights_answer_as_evaluated(smoke):
    result, folder = smoke
    config, params = load_params(folder)
    counts = train_tiny_adder.accuracies(config, params, tiny_adder.prompt_problems())
    assert counts == result["right_of_held_out"]["prompts"]


@pytest.mark.parametrize("name", ["smoke", "asset"])
def test_tokenizer_loads_and_round_trips(name, request):
    folder = request.getfixturevalue("smoke")[1] if name == "smoke" else ASSET
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "1234+567=1801"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tiny_adder.EOS], skip_special_tokens=True) == text
    assert (tokenizer.eos_token_id,) == ModelConfig.from_pretrained(folder).eos_token_ids
    assert tokenizer.encode("1 x")[1:] == [tokenizer.unk_token_id] * 2


@pytest.mark.parametrize("generation_prompt", [False, True])
def test_chat_renders_to_the_plain_prompt(generation_prompt):
    tokenizer = AutoTokenizer.from_pretrained(ASSET)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "12+34="}]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=generation_prompt
    )
    assert text == "12+34="
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_tokens_of_a_problem_are_the_tokenizer_s():
    tokenizer = tiny_adder.make_tokenizer()
    a, b = np.array([0, 7, 1234, 9999, 10]), np.array([0, 93, 567, 9999, 5])
    tokens, answer = tiny_adder.to_tokens(jnp.asarray(a), jnp.asarray(b))
    for row, mask, x, y in zip(np.array(tokens), np.array(answer), a, b, strict=True):
        prompt, result = f"{x}+{y}=", str(x + y)
        ids = [*tokenizer.encode(prompt + result).ids, tiny_adder.EOS]
        assert row.tolist() == ids + [tiny_adder.PAD] * (tiny_adder.SEQUENCE - len(ids))
        assert np.flatnonzero(mask).tolist() == list(range(len(prompt), len(ids)))


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_sampled_problems_cover_the_task(progress):
    sample = jax.jit(tiny_adder.sample_problems, static_argnums=1)
    a, b = map(np.array, sample(jax.random.key(3), 20_000, jnp.float32(progress)))
    for numbers in (a, b):
        assert numbers.min() == 0
        assert 9900 < numbers.max() <= 9999
        lengths = np.bincount([len(str(n)) for n in numbers], minlength=5)[1:] / len(numbers)
        expected = tiny_adder.LATE_LENGTHS if progress else tiny_adder.EARLY_LENGTHS
        np.testing.assert_allclose(lengths, expected, atol=0.02)
        assert np.mean(numbers == 0) > 0.005
    chains = [i for i in range(len(a)) if len(str(a[i])) == 4 and a[i] + b[i] in (9999, 10000)]
    assert len(chains) > 50


def test_held_out_pairs_ignore_the_order_and_agree_between_numpy_and_jax():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 10_000, (2, 50_000), np.int32)
    held_out = tiny_adder.is_held_out(a, b)
    assert held_out.mean() == pytest.approx(1 / tiny_adder.HELD_OUT_SHARE, rel=0.1)
    np.testing.assert_array_equal(held_out, tiny_adder.is_held_out(b, a))
    np.testing.assert_array_equal(held_out, tiny_adder.is_held_out(jnp.asarray(a), jnp.asarray(b)))


def test_every_sum_has_a_pair_to_learn_it_from():
    for total in range(2 * 9999 + 1):
        a = np.arange(max(0, total - 9999), min(9999, total) + 1)[:200]
        assert not tiny_adder.is_held_out(a, total - a).all()


def test_held_out_problems_weigh_nothing_in_the_loss():
    config = ModelConfig.from_dict(train_tiny_adder.model_values(1, 16, 4, 16))
    params = train_tiny_adder.init_params(config, seed=0)
    a, b = jnp.asarray(tiny_adder.held_out_problems(np.random.default_rng(5), 33)).T
    loss = jax.jit(train_tiny_adder.loss_of, static_argnums=0)
    assert loss(config, params, a, b) == 0.0
    with_one_more = loss(config, params, a.at[7].set(12), b.at[7].set(35))
    assert not tiny_adder.is_held_out(jnp.array([12]), jnp.array([35])).any()
    alone = loss(config, params, jnp.full_like(a, 12), jnp.full_like(b, 35))
    np.testing.assert_allclose(with_one_more, alone, rtol=1e-5)


def test_causal_attention_against_loops():
    q, k, v = (np.random.default_rng(i).normal(size=(2, 5, h, 8)) for i, h in enumerate((4, 2, 2)))
    got = train_tiny_adder.causal_attention(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    for row, i, head in np.ndindex(2, 5, 4):
        weights = np.exp(k[row, : i + 1, head // 2] @ q[row, i, head] / 8**0.5)
        expected = weights @ v[row, : i + 1, head // 2] / weights.sum()
        np.testing.assert_allclose(got[row, i, head], expected, atol=1e-5)


def test_train_config_names_a_bad_value():
    with pytest.raises(ValueError, match="batch=0 must be above 0"):
        train_tiny_adder.TrainConfig(batch=0)


def test_prompts_are_right_unique_and_held_out():
    rows = [json.loads(line) for line in (ASSET / "prompts.jsonl").read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len({row["prompt"] for row in rows}) == 512
    for row in rows:
        a, b = map(int, row["prompt"].removesuffix("=").split("+"))
        assert row["prompt"] == f"{a}+{b}="
        assert row["expected"] == str(a + b)
        assert tiny_adder.is_held_out(np.array([a]), np.array([b])).all()
    lengths = {tuple(map(len, row["prompt"][:-1].split("+"))) for row in rows}
    assert lengths == {(i, j) for i in range(1, 5) for j in range(1, 5)}


def test_the_embedded_model_is_small_and_deep():
    assert sum(file.stat().st_size for file in ASSET.rglob("*")) < 4_000_000
    config = ModelConfig.from_pretrained(ASSET)
    assert config.num_layers >= 8
    assert config.num_layers % 8


def test_the_embedded_model_is_right_on_unseen_prompts():
    config, params = load_params(ASSET)
    problems = tiny_adder.prompt_problems()[:128]
    answers = train_tiny_adder.greedy_answers(config, params, problems, rows=len(problems))
    right = sum(answer == str(a + b) for answer, (a, b) in zip(answers, problems, strict=True))
    assert right >= 0.99 * len(problems)
