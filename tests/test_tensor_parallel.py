"""Heads and feed-forward layers over the devices of a replica: the same tokens in every mesh."""

import numpy as np
import pytest
from helpers import Alternating, make_engine, run_requests, small_config

from sidp_jax import LLM, SamplingParams
from sidp_jax.config import ConfigError

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


def run(**changes):
    config = small_config(8, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    engine = make_engine(config=config, **changes)
    rng = np.random.default_rng(1)
    requests = {
        f"r{i}": (rng.integers(2, 90, length).tolist(), GREEDY)
        for i, length in enumerate([3, 17, 1, 9, 20, 6])
    }
    outputs = run_requests(engine, requests)
    return {name: output.outputs[0].token_ids for name, output in outputs.items()}


@pytest.fixture(scope="module")
def expected():
    return run(modes=("replicated",), pool_size=1)


@pytest.mark.parametrize(
    "changes",
    [
        {"pool_size": 2, "tensor_size": 4, "modes": ("was", "cas"), "policy_type": Alternating},
        {"pool_size": 4, "tensor_size": 2, "modes": ("replicated",)},
        {"pool_size": 4, "tensor_size": 2, "modes": ("was", "cas"), "policy_type": Alternating},
        {"pool_size": 8, "tensor_size": 1, "modes": ("was",)},
    ],
    ids=["2x4", "4x2-replicated", "4x2", "8x1"],
)
def test_greedy_tokens_are_the_same_in_every_mesh(expected, changes):
    assert run(**changes) == expected


def test_heads_that_cannot_be_shared_are_an_error():
    with pytest.raises(ConfigError, match="tensor_parallel_size=4 must divide the model's 2 key"):
        LLM(
            model="package:assets/tiny_adder",
            platform="cpu",
            pool_size=2,
            tensor_parallel_size=4,
            max_model_len=64,
        )
