import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from sidp_jax.request import RequestError, SamplingParams, Sequence, derive_seed


def test_defaults_are_those_of_vllm():
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (16, 0, False)
    assert (params.stop, params.stop_token_ids, params.logprobs) == ((), (), None)
    assert params.seed is None


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("n", [1, 16384], [0, -1, 1.0, True, "1", None, 16385]),
        ("temperature", [0, 0.5, 2], [-0.1, math.nan, math.inf, "hot", None, False]),
        ("top_p", [1e-6, 1], [0, 1.001, math.nan, None, "1"]),
        ("top_k", [-1, 0, 1, 50], [-2, 1.5, 2**31, None]),
        ("min_p", [0, 1], [-0.1, 1.1, math.nan]),
        ("presence_penalty", [-2, 0, 2], [-2.1, 2.1, math.nan]),
        ("frequency_penalty", [-2, 0, 2], [-2.1, 2.1, math.nan]),
        ("repetition_penalty", [0.1, 1, 5], [0, -1, math.inf, math.nan]),
        ("seed", [None, 0, 2**64 - 1], [-1, 2**64, 1.0, True, "7"]),
        ("max_tokens", [None, 1, 10**6], [0, -1, 2.0, False]),
        ("min_tokens", [0, 16], [-1, 0.5, None]),
        ("ignore_eos", [True, False], [0, 1, None, "yes"]),
        ("stop", ["a", ["a", "b"], (), None], ["", [""], ["a", 1], 3, {"a": 1}]),
        ("stop_token_ids", [[], [0, 5], (1,), None], [[-1], [1.0], [True], 3, [2**31], [1] * 17]),
        ("logprobs", [None, 0, 20], [-1, 21, 1.0, True]),
    ],
)
def test_every_field_is_checked(field, good, bad):
    for value in good:
        SamplingParams(**{field: value})
    for value in bad:
        with pytest.raises(RequestError, match=field):
            SamplingParams(**{field: value})


def test_errors_name_the_value_and_the_limit():
    with pytest.raises(RequestError, match=r"top_p=1\.5 must be a number above 0 and at most 1"):
        SamplingParams(top_p=1.5)
    with pytest.raises(RequestError, match="min_tokens=9 must be at most max_tokens=8"):
        SamplingParams(min_tokens=9, max_tokens=8)
    SamplingParams(min_tokens=9, max_tokens=None)


def test_values_are_stored_as_plain_immutable_types():
    params = SamplingParams(
        temperature=1, top_k=np.int64(5), stop="a", stop_token_ids=[np.int32(7)], max_tokens=4
    )
    assert params.stop == ("a",)
    assert params.stop_token_ids == (7,)
    assert [type(x) for x in (params.temperature, params.top_k, *params.stop_token_ids)] == [
        float,
        int,
        int,
    ]
    assert hash(params) == hash(replace(params))
    with pytest.raises(FrozenInstanceError):
        params.n = 2


def test_tiny_temperatures_are_raised_and_zero_stays():
    assert SamplingParams(temperature=1e-9).temperature == 0.01
    assert SamplingParams(temperature=0).temperature == 0


@pytest.mark.parametrize(
    ("fields", "variant"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5}, "greedy"),
        ({}, "random"),
        ({"min_p": 0.1}, "random"),
        ({"top_k": 5}, "top"),
        ({"top_p": 0.9}, "top"),
        ({"temperature": 0, "presence_penalty": 0.1}, "full"),
        ({"frequency_penalty": -0.1}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"min_tokens": 1}, "full"),
        ({"temperature": 0, "logprobs": 0}, "full"),
    ],
)
def test_sampler_variant(fields, variant):
    assert SamplingParams(**fields).sampler == variant


def test_seeds_depend_on_what_they_should():
    def seed(seed=None, index=0, engine_seed=0, request_id="a"):
        return derive_seed(seed, index, engine_seed=engine_seed, request_id=request_id)

    assert seed(7) == seed(7, engine_seed=1, request_id="b")
    different = [
        seed(),
        seed(index=1),
        seed(engine_seed=1),
        seed(request_id="b"),
        seed(7),
        seed(7, index=1),
        seed(2**64 - 1),
    ]
    assert len(set(different)) == len(different)
    assert all(0 <= value < 2**32 for value in different)
    assert seed(7) == 2078322423  # the same in every process and release


def test_tokens_of_a_sequence():
    sequence = Sequence(0, "a", 0, [10, 11, 12], SamplingParams(), seed=1, max_tokens=3)
    sequence.output += [20]
    sequence.num_pending = 1
    assert (sequence.num_known, sequence.num_tokens) == (4, 5)
    everything = [10, 11, 12, 20, -1]
    for start in range(5):
        for stop in range(start + 1, 6):
            assert sequence.tokens_between(start, stop) == everything[start:stop]
    sequence.num_computed = 2
    assert sequence.num_remaining == 3
    sequence.num_pending = 2
    assert sequence.num_remaining == 0  # its last token has been sampled


def test_host_modules_do_not_import_jax():
    modules = "sidp_jax, sidp_jax.request, sidp_jax.pages, sidp_jax.scheduler, sidp_jax.batch"
    check = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
