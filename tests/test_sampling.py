from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sidp_jax import sampling
from sidp_jax.batch import BatchLayout, StepBatch, unpack
from sidp_jax.request import SAMPLERS
from sidp_jax.sampling import (
    GROUP,
    MAX_LOGPROBS,
    MIN_WEIGHT,
    SamplerState,
    init_state,
    update_state,
)

WIDE = 3000  # several groups of tokens, the last one not full


def make_batch(rows: int, **fields) -> StepBatch:
    """A batch of ``rows`` rows; a field is given as one value for all rows, or as an array."""
    layout = BatchLayout(tokens=max(rows, 1), seqs=rows, pages=1, stop_ids=3)
    batch = unpack(layout.empty(1)[0], layout)
    defaults = {"temperature": 1.0, "seeds": np.arange(rows), "slots": np.arange(rows)}
    values = {
        name: np.broadcast_to(
            np.asarray(value, getattr(batch, name).dtype), getattr(batch, name).shape
        )
        for name, value in (defaults | fields).items()
    }
    return jax.tree.map(jnp.asarray, batch._replace(**values))


@partial(jax.jit, static_argnames=("variant", "vocab_size"))
def run_sample(logits, batch, variant, vocab_size, state=None):
    return sampling.sample(
        logits,
        batch,
        variant=variant,
        vocab_size=vocab_size,
        implementation="reference",
        state=state,
    )


def draw(logits, batch, vocab_size=None, variant="top", state=None) -> np.ndarray:
    logits = jnp.asarray(logits, jnp.float32)
    vocab_size = vocab_size or logits.shape[1]
    return np.asarray(run_sample(logits, batch, variant, vocab_size, state).tokens)


# --- What is kept, against sorting --------------------------------------------------------------


@partial(jax.jit, static_argnames="vocab_size")
def _kept(logits, batch, vocab_size):
    grouped = sampling._grouped(logits, vocab_size)
    weigh = sampling._Weights.of(grouped.max((1, 2)), batch.temperature)
    threshold = sampling._threshold(grouped, weigh, batch, vocab_size, "top", "reference")
    weights = weigh(grouped)
    kept = (weights > 0) & (weights >= threshold[:, None, None])
    return kept.reshape(len(logits), -1)


def kept(logits, vocab_size=None, **fields) -> np.ndarray:
    """Which tokens a row may get, bool [rows, vocabulary]."""
    logits = jnp.asarray(logits, jnp.float32)
    vocab_size = vocab_size or logits.shape[1]
    result = np.asarray(_kept(logits, make_batch(len(logits), **fields), vocab_size))
    assert not result[:, vocab_size:].any()
    return result[:, :vocab_size]


def kept_by_sorting(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> np.ndarray:
    """The slow twin, of one row, in float64; parameters are float32 as on the device."""
    temperature, top_p, min_p = (float(np.float32(x)) for x in (temperature, top_p, min_p))
    logits = np.asarray(logits, np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    keep = (weights >= MIN_WEIGHT) & (weights >= min_p)
    order = np.argsort(-logits, kind="stable")
    if 0 < top_k < len(logits):
        keep &= logits >= logits[order[top_k - 1]]
    if top_p < 1:
        mass = np.cumsum(np.where(keep, weights, 0)[order])
        last = np.searchsorted(mass, top_p * mass[-1])
        keep &= logits >= logits[order[last]]
    return keep


def random_logits(rng, rows, vocab_size, *, ties=False, holes=False) -> np.ndarray:
    logits = rng.normal(0, 3, (rows, vocab_size)).astype(np.float32)
    if ties:
        logits = np.round(logits * 2) / 2 + np.float32(0)  # no -0.0, which sorts before 0.0
    if holes:
        logits[rng.random(logits.shape) < 0.4] = -np.inf
        logits[:, rng.integers(vocab_size)] = 1.0  # not all of them
    return logits


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 128, 129, WIDE])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_kept_set_is_that_of_sorting(vocab_size, ties, holes):
    rng = np.random.default_rng((vocab_size, ties, holes))
    rows = 48
    for narrow in [True, False]:  # whether every row has a small top-k
        logits = random_logits(rng, rows, vocab_size, ties=ties, holes=holes)
        fields = {
            "temperature": rng.choice([0.3, 1.0, 2.0], rows),
            "top_k": rng.choice([1, 3, 6] if narrow else [0, 3, 300, vocab_size + 5], rows),
            "top_p": rng.choice([1.0, 0.95, 0.5, 1e-6], rows),
            "min_p": rng.choice([0.0, 0.0, 0.05, 1.0], rows),
        }
        found = kept(logits, **fields)
        for row in range(rows):
            mine = {name: values[row] for name, values in fields.items()}
            expected = kept_by_sorting(logits[row], **mine)
            np.testing.assert_array_equal(found[row], expected, err_msg=str(mine))


@pytest.mark.parametrize("temperature", [1e-3, 100.0])
@pytest.mark.parametrize(
    "options", [{"top_k": 20}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.7}, {"min_p": 0.9}]
)
def test_kept_set_at_extreme_temperatures(temperature, options):
    logits = random_logits(np.random.default_rng(5), 32, 300)
    found = kept(logits, temperature=temperature, **options)
    for row, mask in zip(logits, found, strict=True):
        np.testing.assert_array_equal(mask, kept_by_sorting(row, temperature, **options))


def test_no_option_keeps_all_that_has_a_chance():
    logits = random_logits(np.random.default_rng(0), 8, 500, holes=True)
    for options in [{}, {"top_k": 500}, {"top_k": 10**9}, {"top_k": 0, "top_p": 1.0}]:
        np.testing.assert_array_equal(kept(logits, **options), np.isfinite(logits))


def test_ties_at_the_threshold_are_kept():
    logits = [[3.0, 2.0, 2.0, 2.0, 1.0, -0.0, 0.0]]
    assert kept(logits, top_k=2).tolist() == [[True] * 4 + [False] * 3]
    assert kept(logits, top_k=6).tolist() == [[True] * 7]  # zeros of either sign are equal
    shares = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert kept(logits, top_p=shares[0] + 1e-4).tolist() == [[True] * 4 + [False] * 3]
    assert kept(logits, top_p=shares[0] - 1e-4).tolist() == [[True] + [False] * 6]


def test_top_p_applies_to_what_top_k_kept():
    logits = np.log([[0.4, 0.2, 0.15, 0.15, 0.1]])
    # Of the two that top-k keeps, the first has 2/3 of the mass; of all, 0.4.
    assert kept(logits, top_k=2, top_p=0.6).sum() == 1
    assert kept(logits, top_p=0.6).sum() == 2
    # min-p comes first: it drops all below 0.5 * 0.4, and 0.4 is then 2/3 of what is left.
    assert kept(logits, min_p=0.49, top_p=0.6).sum() == 1


def test_flat_logits_are_told_apart():
    """Of logits that differ in their last bits, top-p and top-k keep the right number."""
    logits = np.float32(1) + np.arange(4096, dtype=np.float32)[None] * np.float32(2.0**-22)
    assert kept(logits, top_k=100).sum() == 100
    weights = np.exp(np.float64(logits[0] - logits.max()))
    wanted = np.searchsorted(np.cumsum(weights[::-1]), 0.9 * weights.sum()) + 1
    assert abs(kept(logits, top_p=0.9).sum() - wanted) <= 1


def test_wide_vocabulary_of_ties_falls_back_to_the_whole_of_it():
    """More groups tie for the k best than are searched as candidates."""
    logits = np.zeros((2, WIDE), np.float32)
    logits[:, 0] = 1
    assert kept(logits, top_k=[1, 5]).sum(-1).tolist() == [1, WIDE]


# --- A row's token is its own affair ------------------------------------------------------------

MIXED = {
    "temperature": np.array([0.0, 0.7, 1.0, 1.5, 1.0, 0.9]),
    "top_k": np.array([0, 20, 0, 5, 0, 50]),
    "top_p": np.array([1.0, 0.9, 0.8, 1.0, 1.0, 0.95]),
    "min_p": np.array([0.0, 0.0, 0.01, 0.0, 0.0, 0.1]),
    "seeds": np.array([3, 2**32 - 1, 5, 7, 11, 13]),
    "output_index": np.array([0, 1, 100, 3, 5, 70000]),
}


@pytest.mark.parametrize("vocab_size", [90, WIDE])
def test_token_depends_on_its_row_alone(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = random_logits(rng, 6, vocab_size)
    together = draw(logits, make_batch(6, **MIXED))
    for row in range(6):
        mine = {name: values[[row]] for name, values in MIXED.items()}
        assert draw(logits[[row]], make_batch(1, **mine)) == together[row]

    order = rng.permutation(6)
    shuffled = {name: values[order] for name, values in MIXED.items()}
    np.testing.assert_array_equal(draw(logits[order], make_batch(6, **shuffled)), together[order])

    # In a larger batch, between rows of another kind, with a vocabulary padded further.
    places = np.array([1, 4, 5, 9, 12, 16])
    more = random_logits(rng, 17, vocab_size + 40)
    more[places, :vocab_size] = logits
    fields = {name: np.resize(values, 17) for name, values in MIXED.items()}
    for name, values in MIXED.items():
        fields[name][places] = values
    tokens = draw(more, make_batch(17, **fields), vocab_size)
    np.testing.assert_array_equal(tokens[places], together)


def test_token_is_the_same_by_every_variant_that_can_do_it():
    """The other rows of a step decide which variant runs."""
    logits = random_logits(np.random.default_rng(1), 41, WIDE)
    logits[40] = 0  # ties everywhere
    state = sampling.init_state(41, WIDE)
    for fields in ({}, {"min_p": 0.2}, {"temperature": 0}):
        batch = make_batch(41, **fields)
        by_random, by_top = (draw(logits, batch, variant=v) for v in ("random", "top"))
        np.testing.assert_array_equal(by_random, by_top)
    batch = make_batch(41, top_k=np.resize([1, 3, 6], 41), top_p=np.resize([0.9, 1.0], 41))
    by_full = draw(logits, batch, variant="full", state=state)
    np.testing.assert_array_equal(draw(logits, batch), by_full)


def test_tokens_do_not_depend_on_settings_of_jax():
    logits = jnp.asarray(random_logits(np.random.default_rng(2), 64, 300))
    expected = draw(logits, make_batch(64))
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(draw(logits, make_batch(64)), expected)


def test_broken_rows_stay_in_the_vocabulary_and_harm_no_other():
    logits = random_logits(np.random.default_rng(3), 5, 200)
    batch = make_batch(5, top_k=30, top_p=0.9)
    expected = draw(logits, batch)
    logits[1], logits[3] = np.nan, -np.inf
    for variant in ["greedy", "random", "top"]:
        tokens = draw(logits, batch, variant=variant)
        assert ((tokens >= 0) & (tokens < 200)).all()
    np.testing.assert_array_equal(draw(logits, batch)[[0, 2, 4]], expected[[0, 2, 4]])


@pytest.mark.parametrize("variant", SAMPLERS)
def test_padding_of_the_vocabulary_is_never_sampled(variant):
    logits = np.full((200, 24), 50.0, np.float32)
    logits[:, :17] = random_logits(np.random.default_rng(4), 200, 17)
    state = init_state(200, 24)
    sampled = run_sample(jnp.asarray(logits), make_batch(200), variant, 17, state)
    assert sampled.tokens.max() < 17
    if variant == "full":
        assert sampled.top_ids.max() < 17
        np.testing.assert_allclose(np.exp(sampled.top_logprobs).sum(-1), 1, rtol=1e-5)


# --- Frequencies --------------------------------------------------------------------------------

DRAWS = 20_000


def deviation(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Chi-square of the frequencies, in standard deviations from its mean under the null."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    # Rare tokens share a bin, so that every bin expects enough for chi-square to hold.
    rare = probabilities * DRAWS < 10
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(probabilities[~rare], probabilities[rare].sum()) * DRAWS
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = ((observed - expected) ** 2 / expected).sum()
    return (statistic - freedom) / np.sqrt(2 * freedom)


def softmax(logits: np.ndarray, keep: np.ndarray | bool = True) -> np.ndarray:
    weights = np.where(keep, np.exp(np.float64(logits) - logits.max()), 0)
    return weights / weights.sum()


@pytest.mark.parametrize("vary", ["seeds", "output_index"])
@pytest.mark.parametrize("vocab_size", [5, 60, 700])
def test_frequencies_are_those_of_the_softmax(vary, vocab_size):
    row = np.random.default_rng(vocab_size).normal(0, 2, vocab_size).astype(np.float32)
    logits = jnp.broadcast_to(jnp.asarray(row), (DRAWS, vocab_size))
    fields = {"seeds": 17, "output_index": 0} | {vary: np.arange(DRAWS)}
    tokens = draw(logits, make_batch(DRAWS, temperature=0.8, **fields))
    assert deviation(tokens, softmax(row / 0.8)) < 5
    # The same test must see a temperature that is off by a twentieth, and a lost token.
    assert deviation(tokens, softmax(row / 0.84)) > 5
    tokens = np.where(tokens == row.argmax(), row.argmin(), tokens)
    assert deviation(tokens, softmax(row / 0.8)) > 5


def test_group_mass_is_exact_where_frequencies_cannot_tell():
    rng = np.random.default_rng(14)
    weights = np.exp(-rng.uniform(0, 20, (5, 9, GROUP))).astype(np.float32)
    weights *= 2.0 ** -rng.integers(0, 6, (5, 9, 1)).astype(np.float32)
    weights[0, :3] = np.array([[0], [MIN_WEIGHT], [1]])
    mass = sampling._group_mass(jnp.asarray(weights), jnp.asarray(weights.max(-1)))
    np.testing.assert_allclose(mass, weights.sum(-1, dtype=np.float64), rtol=2e-6)


def test_frequencies_of_what_is_kept():
    row = np.random.default_rng(8).normal(0, 2, 400).astype(np.float32)
    options = {"top_k": 60, "top_p": 0.9, "min_p": 0.01}
    logits = jnp.broadcast_to(jnp.asarray(row), (DRAWS, 400))
    tokens = draw(logits, make_batch(DRAWS, **options))
    keep = kept_by_sorting(row, **options)
    assert 10 < keep.sum() < 60
    assert deviation(tokens, softmax(row, keep)) < 5
    assert not keep[np.setdiff1d(np.arange(400), tokens)].any()


def test_successive_tokens_are_independent():
    """Pairs of tokens at neighbouring output indices, and of neighbouring seeds."""
    row = np.array([1.0, 0.5, 0.0, -0.5], np.float32)
    logits = jnp.broadcast_to(jnp.asarray(row), (DRAWS, 4))
    first = draw(logits, make_batch(DRAWS, output_index=0))
    pairs = np.outer(softmax(row), softmax(row)).ravel()
    assert deviation(4 * first + draw(logits, make_batch(DRAWS, output_index=1)), pairs) < 5
    neighbour = draw(logits, make_batch(DRAWS, seeds=np.arange(1, DRAWS + 1)))
    assert deviation(4 * first + neighbour, pairs) < 5
    assert deviation(5 * first, pairs) > 5  # a token that repeats itself is seen


# --- Greedy -------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [3, 128, 1000])
def test_greedy_is_argmax_with_the_lowest_id_among_equals(vocab_size):
    logits = random_logits(np.random.default_rng(6), 50, vocab_size, ties=True)
    expected = logits.argmax(-1)
    np.testing.assert_array_equal(draw(logits, make_batch(50), variant="greedy"), expected)
    for temperature in [0.0, 1e-6]:
        batch = make_batch(50, temperature=temperature, top_k=3, top_p=0.5, min_p=0.1)
        np.testing.assert_array_equal(draw(logits, batch), expected)
        state = init_state(50, vocab_size)
        np.testing.assert_array_equal(draw(logits, batch, None, "full", state), expected)
    np.testing.assert_array_equal(draw(logits, make_batch(50, top_k=1))[:0], expected[:0])


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}])
def test_options_that_leave_one_token(options):
    logits = random_logits(np.random.default_rng(9), 50, 300)
    np.testing.assert_array_equal(draw(logits, make_batch(50, **options)), logits.argmax(-1))


# --- Penalties and min_tokens -------------------------------------------------------------------


def penalised(logits, batch, state):
    values = sampling._penalise(jnp.asarray(logits, jnp.float32), batch, state)
    return np.asarray(values)


def test_penalties_match_their_definition():
    rng = np.random.default_rng(10)
    logits = rng.normal(0, 3, (4, 30)).astype(np.float32)
    counts = rng.integers(0, 3, (6, 30)).astype(np.int32)
    seen = rng.random((6, 30)) < 0.3
    slots = np.array([5, 0, 2, 2**31 - 1])  # the last row is empty
    options = {
        "repetition": np.array([1.0, 1.5, 0.8, 1.3], np.float32),
        "frequency": np.array([0.5, 0.0, -0.3, 0.2], np.float32),
        "presence": np.array([0.0, 1.0, 0.4, 0.2], np.float32),
    }
    state = SamplerState(jnp.asarray(counts), jnp.asarray(seen))
    found = penalised(logits, make_batch(4, slots=slots, **options), state)
    for row in range(3):
        expected = logits[row].copy()
        for token in range(30):
            count = counts[slots[row], token]
            if count > 0 or seen[slots[row], token]:
                factor = options["repetition"][row]
                expected[token] = (
                    expected[token] / factor if expected[token] > 0 else expected[token] * factor
                )
            expected[token] -= options["frequency"][row] * count
            expected[token] -= options["presence"][row] * (count > 0)
        np.testing.assert_allclose(found[row], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found[3], logits[3])


def test_stop_ids_wait_for_min_tokens():
    logits = np.tile(np.array([1.0, 5.0, 2.0, 4.0, 3.0], np.float32), (4, 1))
    batch = make_batch(
        4,
        temperature=0.0,
        output_index=[0, 1, 2, 0],
        banned_until=[2, 2, 2, 0],
        stop_ids=[[1, -1, -1], [3, 1, -1], [1, 3, -1], [1, 3, -1]],
    )
    state = init_state(4, 5)
    assert draw(logits, batch, 5, "full", state).tolist() == [3, 4, 1, 1]
    assert penalised(logits, batch, state)[0].tolist() == [1.0, -np.inf, 2.0, 4.0, 3.0]


def test_full_without_options_draws_what_random_draws():
    logits = random_logits(np.random.default_rng(11), 30, 500)
    batch = make_batch(30, top_k=40, top_p=0.9)
    full = draw(logits, batch, None, "full", init_state(30, 500))
    np.testing.assert_array_equal(full, draw(logits, batch))


# --- Logprobs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [1, 12, 20, 300, 128 * 25 + 3])
@pytest.mark.parametrize("ties", [False, True])
def test_logprobs_are_of_the_raw_logits(vocab_size, ties):
    rng = np.random.default_rng((12, vocab_size))
    logits = random_logits(rng, 7, vocab_size, ties=ties)
    state = SamplerState(jnp.ones((7, vocab_size), jnp.int32), jnp.ones((7, vocab_size), bool))
    batch = make_batch(7, temperature=2.0, frequency=1.0, repetition=1.7)
    sampled = run_sample(jnp.asarray(logits), batch, "full", vocab_size, state)
    wide = np.float64(logits)
    logprobs = wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprobs -= wide.max(-1, keepdims=True)
    rows, tokens = np.arange(7), np.asarray(sampled.tokens)
    np.testing.assert_allclose(sampled.logprob, logprobs[rows, tokens], rtol=1e-5, atol=1e-5)
    ranks = (logits >= logits[rows, tokens][:, None]).sum(-1)
    np.testing.assert_array_equal(sampled.rank, ranks)

    top = min(MAX_LOGPROBS, vocab_size)
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (7, MAX_LOGPROBS)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :top]
    np.testing.assert_array_equal(sampled.top_ids[:, :top], order)
    np.testing.assert_allclose(
        sampled.top_logprobs[:, :top],
        np.take_along_axis(logprobs, order, axis=1),
        rtol=1e-5,
        atol=1e-5,
    )
    assert (sampled.top_ids[:, top:] == -1).all()
    assert np.isneginf(sampled.top_logprobs[:, top:]).all()


def test_other_variants_return_tokens_alone():
    for variant in ["greedy", "random", "top"]:
        sampled = run_sample(jnp.zeros((2, 9)), make_batch(2), variant, 9)
        assert sampled[1:] == (None,) * 4
        assert len(jax.tree.leaves(sampled)) == 1
        assert sampled.tokens.dtype == jnp.int32


# --- The state ----------------------------------------------------------------------------------


def fed_batch(chunks, *, tokens, rows):
    """The batch of chunks (slot, prompt length, fed token ids, first position)."""
    layout = BatchLayout(tokens=tokens, seqs=rows, pages=1, stop_ids=1)
    batch = unpack(layout.empty(1)[0], layout)
    start = 0
    for row, (slot, prompt_len, ids, position) in enumerate(chunks):
        stop = start + len(ids)
        batch.tokens[start:stop] = ids
        batch.positions[start:stop] = np.arange(position, position + len(ids))
        batch.token_rows[start:stop] = row
        batch.query_starts[row + 1 :] = stop
        batch.slots[row], batch.prompt_lens[row] = slot, prompt_len
        start = stop
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("seed", range(4))
def test_state_follows_what_is_fed(seed):
    """Random chunks, with sequences that end, are preempted and take over slots."""
    rng = np.random.default_rng(seed)
    slots, vocab, tokens, rows = 4, 11, 16, 6
    update = jax.jit(update_state, donate_argnums=0)
    state = init_state(slots, vocab)
    running = {}  # slot -> [prompt length, all token ids, number fed]
    for _ in range(60):
        chunks, room = [], tokens
        for slot in rng.permutation(slots)[: rng.integers(1, slots + 1)]:
            if slot not in running or rng.random() < 0.1:
                prompt = int(rng.integers(1, 9))
                running[slot] = [prompt, rng.integers(0, vocab, 30), 0]
            elif rng.random() < 0.1:
                running[slot][2] = 0  # preempted: everything is fed again
            prompt_len, ids, fed = running[slot]
            length = min(int(rng.integers(1, 8)), room, len(ids) - fed)
            if length == 0:
                continue
            chunks.append((slot, prompt_len, ids[fed : fed + length], fed))
            running[slot][2] += length
            room -= length
        batch = fed_batch(chunks, tokens=tokens, rows=rows)
        state = update(state, batch.tokens, batch)
        for slot, (prompt_len, ids, fed) in running.items():
            if fed == 0:
                continue
            counts = np.bincount(ids[prompt_len:fed], minlength=vocab)
            np.testing.assert_array_equal(state.output_counts[slot], counts)
            seen = np.isin(np.arange(vocab), ids[: min(fed, prompt_len)])
            np.testing.assert_array_equal(state.prompt_seen[slot], seen)


def test_an_empty_batch_leaves_the_state_alone():
    state = SamplerState(jnp.full((3, 5), 2, jnp.int32), jnp.ones((3, 5), bool))
    batch = fed_batch([], tokens=8, rows=4)
    after = update_state(state, batch.tokens, batch)
    np.testing.assert_array_equal(after.output_counts, state.output_counts)
    np.testing.assert_array_equal(after.prompt_seen, state.prompt_seen)


# --- Transformations and errors -----------------------------------------------------------------


@pytest.mark.parametrize("variant", SAMPLERS)
def test_under_vmap_and_shard_map(variant):
    pool, rows, vocab = 4, 3, 150
    logits = jnp.asarray(random_logits(np.random.default_rng(13), pool * rows, vocab))
    batch = make_batch(pool * rows, top_k=np.arange(12) * 3, top_p=0.9)
    state = init_state(pool * rows, vocab)
    one = partial(sampling.sample, variant=variant, vocab_size=vocab, implementation="reference")
    expected = jax.jit(one)(logits, batch, state=state)

    fold = partial(jax.tree.map, lambda x: x.reshape(pool, -1, *x.shape[1:]))
    folded = fold(batch._replace(slots=batch.slots % rows, query_starts=batch.query_starts[:-1]))
    arguments = fold(logits), folded, fold(state)

    def call(logits, batch, state):
        return one(logits, batch, state=state)

    def per_replica(*arguments):
        return jax.tree.map(lambda x: x[None], call(*jax.tree.map(lambda x: x[0], arguments)))

    mapped = jax.shard_map(
        per_replica,
        mesh=jax.make_mesh((pool,), ("pool",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=PartitionSpec("pool"),
        out_specs=PartitionSpec("pool"),
    )
    for found in [jax.jit(jax.vmap(call))(*arguments), jax.jit(mapped)(*arguments)]:
        for a, b in zip(found, expected, strict=True):
            if b is not None:
                np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-5)


def test_values_never_recompile():
    traces = []

    @jax.jit
    def program(logits, batch):
        traces.append(1)
        return sampling.sample(
            logits, batch, variant="random", vocab_size=40, implementation="reference"
        )

    for seed, fields in enumerate([{}, {"top_k": 5}, {"top_p": 0.3}, {"temperature": 0.0}]):
        logits = random_logits(np.random.default_rng(seed), 4, 40)
        program(jnp.asarray(logits), make_batch(4, seeds=seed, **fields))
    assert len(traces) == program._cache_size() == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "beam"}, "variant='beam' must be one of greedy, random, top, full"),
        ({"vocab_size": 11}, "vocab_size=11 must be from 1 to 10"),
        ({"vocab_size": 0}, "vocab_size=0 must be from 1 to 10"),
        ({"variant": "full"}, "init_state"),
    ],
)
def test_errors(change, message):
    arguments = {"variant": "random", "vocab_size": 10, "implementation": "reference"} | change
    with pytest.raises(ValueError, match=message):
        sampling.sample(jnp.zeros((2, 10)), make_batch(2), **arguments)
