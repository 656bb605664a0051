"""The whole engine against Hugging Face's greedy tokens, each family in another pooled mode."""

from pathlib import Path

import numpy as np
import pytest

from sidp_jax import LLM, SamplingParams

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"mode": "cas", "pool_size": 3}),
        ("llama", {"mode": "was", "pool_size": 2, "resident_layers": 1, "layer_loop": "unrolled"}),
        ("qwen3", {"mode": "auto", "pool_size": 2}),
        ("qwen3", {"pool_host_layers": 2}),
        ("qwen2", {"mode": "was", "pool_size": 2, "was_fetch": "copies"}),
    ],
)
def test_greedy_tokens_are_those_of_hugging_face(family, changes):
    golden = np.load(GOLDEN / family / "golden.npz")
    prompts = [[int(token) for token in prompt if token >= 0] for prompt in golden["prompts"]]
    expected = golden["greedy"].tolist()
    llm = LLM(
        model=GOLDEN / family,
        dtype="float32",
        platform="cpu",
        max_model_len=96,
        max_num_seqs=4,
        max_num_batched_tokens=16,
        page_size=8,
        **changes,
    )
    params = SamplingParams(temperature=0, max_tokens=len(expected[0]), ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
