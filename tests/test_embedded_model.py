"""The model that ships with the package: right answers, the same in every mode."""

import json

import pytest

from sidp_jax import LLM, SamplingParams
from sidp_jax.config import resolve_path

FOLDER = "package:assets/tiny_adder"
GREEDY = SamplingParams(temperature=0, max_tokens=16)


@pytest.mark.parametrize("mode", ["replicated", "was", "cas"])
def test_answers_are_right_in_every_mode(mode):
    lines = (resolve_path(FOLDER) / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    llm = LLM(
        model=FOLDER,
        mode=mode,
        dtype="float32",
        platform="cpu",
        pool_size=2,
        max_model_len=32,
        max_num_seqs=16,
        max_num_batched_tokens=16,
    )
    outputs = llm.generate([row["prompt"] for row in rows], GREEDY, use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == [row["expected"] for row in rows]
    assert list(llm.engine.stats.steps) == [mode]
