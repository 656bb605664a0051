"""Sampling on the device: from a row of logits per sequence to a token per sequence.

Four programs, chosen by the host from what the step's requests ask for: ``greedy``, ``random``
(temperature, min-p), ``top`` (also top-k and top-p) and ``full`` (also penalties, min_tokens and
logprobs).
The options mean what they mean in vLLM, and apply in its order: penalties and the min_tokens mask,
temperature, min-p, top-k, then top-p of what top-k kept.

Two promises shape the code:

* **A row's token depends on that row alone**: on its logits, options, seed and output index; not on
  the other rows, their number, its place among them or the padding of the vocabulary. Noise comes
  from a key per row. Every sum over the vocabulary that decides something is a sum of integers, so
  that the order of summation, which the compiler chooses by shape, cannot change it.
* **No sort of the vocabulary, and few passes over it.** The thresholds of top-k and top-p are
  searched for (``kernels.top_threshold``). A token is drawn in two levels: a group of ``GROUP``
  tokens by its mass, then a token of that group, so that noise is made for V / 128 + 128 entries
  instead of V.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from sidp_jax.batch import StepBatch
from sidp_jax.kernels.top_threshold import fixed_point, power_of_two, top_threshold
from sidp_jax.request import SAMPLERS

MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below it a row is greedy, as in vLLM
# Tokens with less than this share of the likeliest token's probability are never drawn. Sums of
# integers need an end, and this one lies below what float32 noise resolves.
MIN_WEIGHT = 2.0**-31
GROUP = 128


class SamplerState(NamedTuple):
    """What the penalties need to know about the running sequences, by slot.

    Attributes:
        output_counts: How often the sequence in a slot has produced a token.
        prompt_seen: Whether its prompt holds the token.
    """

    output_counts: Int32[Array, "slots vocab"]
    prompt_seen: Bool[Array, "slots vocab"]


class Sampled(NamedTuple):
    """What one step sampled. Without logprobs (all variants but ``full``) it is the tokens alone.

    Attributes:
        tokens: The sampled tokens.
        logprob: Their log probabilities, from the raw logits: before penalties and temperature.
        rank: Number of tokens that are at least as likely, themselves included (1 = likeliest).
        top_ids: The 20 likeliest tokens, likeliest first, ties by id; -1 past a small vocabulary.
        top_logprobs: Their log probabilities; -inf past a small vocabulary.
    """

    tokens: Int32[Array, "rows"]
    logprob: Float32[Array, "rows"] | None = None
    rank: Int32[Array, "rows"] | None = None
    top_ids: Int32[Array, "rows top"] | None = None
    top_logprobs: Float32[Array, "rows top"] | None = None


def sample(
    logits: Float32[Array, "rows padded"],
    batch: StepBatch,
    *,
    variant: str,
    vocab_size: int,
    implementation: str,
    state: SamplerState | None = None,
) -> Sampled:
    """Samples one token per row of one replica.

    Rows without a sequence, and rows whose token is not wanted yet, get a token like any other.

    Args:
        logits: Float32 logits.
        batch: The step's batch; per row ``seeds``, ``output_index``, ``temperature`` (0 is greedy),
            ``top_k`` (0 is all), ``top_p``, ``min_p``; for ``full`` also ``slots``, ``presence``,
            ``frequency``, ``repetition``, ``banned_until`` and ``stop_ids``.
        variant: One of ``request.SAMPLERS``; static. What it cannot do is not done.
        vocab_size: Ids from here on are padding and never sampled; static.
        implementation: See ``top_threshold``; the tokens are the same.
        state: For ``full``: the state after ``update_state`` with the tokens of this very step.

    Returns:
        The tokens, and for ``full`` their logprobs.

    Raises:
        ValueError: for an unknown variant, ``full`` without a state, or logits that are not
            float32 of at least ``vocab_size`` columns.
    """
    if variant not in SAMPLERS:
        raise ValueError(f"{variant=} must be one of {', '.join(SAMPLERS)}")
    if logits.dtype != jnp.float32:
        raise ValueError(f"logits are {logits.dtype}, must be float32: cast them first")
    if not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"{vocab_size=} must be from 1 to {logits.shape[1]}, the logits' columns")
    if variant == "full" and state is None:
        raise ValueError("variant='full' needs a state: make one with init_state")

    with jax.named_scope("sample"):
        raw = _grouped(logits, vocab_size)
        if variant == "greedy":
            return Sampled(_argmax(raw))
        if variant != "full":
            return Sampled(_draw(raw, batch, vocab_size, variant, implementation))
        # Without the barrier every pass would read the counts again.
        penalised = lax.optimization_barrier(_penalise(logits, batch, state))
        grouped = _grouped(penalised, vocab_size)
        tokens = _draw(grouped, batch, vocab_size, variant, implementation)
        return Sampled(tokens, *_logprobs(raw, tokens, vocab_size))


def _grouped(
    logits: Float[Array, "rows padded"], vocab_size: int
) -> Float[Array, "rows groups lanes"]:
    """The logits by groups of neighbouring tokens, -inf for ids outside the vocabulary.

    The number of groups follows from the vocabulary, not from its padding: the noise, and so the
    tokens, are the same for every size of the pool.
    """
    num_groups = -(-vocab_size // GROUP)
    columns = num_groups * GROUP
    logits = logits[:, :columns]
    if logits.shape[1] < columns:
        logits = jnp.pad(logits, ((0, 0), (0, columns - logits.shape[1])))
    if vocab_size < columns:
        logits = jnp.where(jnp.arange(columns) < vocab_size, logits, -jnp.inf)
    return logits.reshape(-1, num_groups, GROUP)


def _take_group(
    values: Float[Array, "rows groups lanes"], group: Int[Array, "rows"]
) -> Float[Array, "rows lanes"]:
    return jnp.take_along_axis(values, group[:, None, None], axis=1)[:, 0]


def _argmax(logits: Float[Array, "rows groups lanes"]) -> Int[Array, "rows"]:
    """The likeliest token, the lowest id among equals."""
    group = jnp.argmax(logits.max(-1), axis=-1)
    lane = jnp.argmax(_take_group(logits, group), axis=-1)
    return (group * GROUP + lane).astype(jnp.int32)


# --- Drawing a token ----------------------------------------------------------------------------


class _Weights(NamedTuple):
    """Turns logits of a row into weights, ``exp((logit - the row's largest) / temperature)``.

    So the row's likeliest token weighs 1. They are computed again wherever they are needed: reading
    logits costs what reading stored weights would.
    """

    row_max: Float[Array, "rows"]
    inverse_temperature: Float[Array, "rows"]

    @classmethod
    def of(cls, row_max: Float[Array, "rows"], temperature: Float[Array, "rows"]) -> _Weights:
        greedy = temperature < MIN_TEMPERATURE
        row_max = jnp.where(jnp.isneginf(row_max), 0, row_max)  # all weights 0, not NaN
        return cls(row_max, 1 / jnp.where(greedy, 1, temperature))

    def log(self, logits: Float[Array, "rows *any"]) -> Float[Array, "rows *any"]:
        others = range(1, logits.ndim)
        row_max, scale = (jnp.expand_dims(values, others) for values in self)
        return (logits - row_max) * scale

    def __call__(self, logits: Float[Array, "rows *any"]) -> Float[Array, "rows *any"]:
        weights = jnp.exp(self.log(logits))
        return jnp.where(weights >= MIN_WEIGHT, weights, 0)


def _draw(
    logits: Float[Array, "rows groups lanes"],
    batch: StepBatch,
    vocab_size: int,
    variant: str,
    implementation: str,
) -> Int[Array, "rows"]:
    """One token per row: the likeliest where the temperature is 0, else a random one.

    Gumbel-max, in two levels: the group by the groups' masses, then the token by its logit among
    its group's. This is the same distribution as one level over the whole vocabulary.
    """
    greedy = batch.temperature < MIN_TEMPERATURE
    group_max = logits.max(-1)
    weigh = _Weights.of(group_max.max(-1), batch.temperature)
    threshold = _threshold(logits, weigh, batch, vocab_size, variant, implementation)
    weights = weigh(logits)
    kept = jnp.where(weights >= threshold[:, None, None], weights, 0)
    mass = _group_mass(kept, weigh(group_max))
    noise = _noise(batch, GROUP + mass.shape[1])
    drawn_group = jnp.argmax(jnp.log(mass) + noise[:, GROUP:], axis=-1)
    group = jnp.where(greedy, jnp.argmax(group_max, axis=-1), drawn_group)
    chosen = _take_group(logits, group)
    weights = weigh(chosen)
    allowed = (weights > 0) & (weights >= threshold[:, None])
    noisy = jnp.where(allowed, weigh.log(chosen) + noise[:, :GROUP], -jnp.inf)
    lane = jnp.argmax(jnp.where(greedy[:, None], chosen, noisy), axis=-1)
    return (group * GROUP + lane).astype(jnp.int32)


def _noise(batch: StepBatch, count: int) -> Float[Array, "rows count"]:
    """Gumbel noise, a stream of its own for every pair of seed and output index.

    The generator, its key and its layout are stated, so that no setting of jax changes the tokens.
    """
    key_data = jnp.stack([batch.output_index.astype(jnp.uint32), batch.seeds], axis=-1)
    with jax.threefry_partitionable(True):
        keys = jax.random.wrap_key_data(key_data, impl="threefry2x32")
        bits = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(keys)
    # In (0, 1), finest near 0, where the large values come from; 1 itself has no logarithm.
    uniform = jnp.minimum((bits.astype(jnp.float32) + 0.5) * 2.0**-32, 1 - 2.0**-24)
    # Its two readers would each make it again.
    return lax.optimization_barrier(-jnp.log(-jnp.log1p(-uniform)))


def _group_mass(
    weights: Float[Array, "rows groups lanes"], largest: Float[Array, "rows groups"]
) -> Float[Array, "rows groups"]:
    """The sum of each group's weights, each rounded to 2**-23 of the group's largest.

    With ``2**exponent`` just above the largest, 128 rounded weights are below ``2**30``. Scaling by
    powers of two is exact.
    """
    exponent = (lax.bitcast_convert_type(jnp.maximum(largest, MIN_WEIGHT), jnp.int32) >> 23) - 126
    fixed = fixed_point(weights, 23 - exponent[..., None]).sum(-1)
    return fixed.astype(jnp.float32) * power_of_two(exponent - 23)


# --- Which tokens are kept ----------------------------------------------------------------------


def _threshold(
    logits: Float[Array, "rows groups lanes"],
    weigh: _Weights,
    batch: StepBatch,
    vocab_size: int,
    variant: str,
    implementation: str,
) -> Float[Array, "rows"]:
    """The smallest weight that min-p, top-k and top-p keep; 0 where they keep everything.

    What is searched for is known to the host, by the variant. A branch on the device would make
    the host wait for its outcome at every step, and the device for the host after that.
    """
    if variant == "random":
        return batch.min_p
    is_random = batch.temperature >= MIN_TEMPERATURE
    return top_threshold(
        weigh(logits),
        batch.min_p,
        jnp.where(is_random & (batch.top_k < vocab_size), batch.top_k, 0),
        jnp.where(is_random, batch.top_p, 1),
        implementation=implementation,
    )


# --- Logprobs -----------------------------------------------------------------------------------


def _logprobs(
    logits: Float[Array, "rows groups lanes"], tokens: Int[Array, "rows"], vocab_size: int
) -> tuple[
    Float[Array, "rows"], Int[Array, "rows"], Int[Array, "rows top"], Float[Array, "rows top"]
]:
    """Log probability and rank of the tokens, and ids and log probabilities of the likeliest."""
    flat = logits.reshape(logits.shape[0], -1)
    log_total = jax.nn.logsumexp(flat, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(flat, tokens[:, None], axis=1)
    rank = (flat >= chosen).sum(-1, dtype=jnp.int32)
    top = min(MAX_LOGPROBS, vocab_size)
    values, ids = _top(logits, top)
    missing = ((0, 0), (0, MAX_LOGPROBS - top))
    return (
        (chosen - log_total)[:, 0],
        rank,
        jnp.pad(ids, missing, constant_values=-1),
        jnp.pad(values - log_total, missing, constant_values=-jnp.inf),
    )


def _top(
    logits: Float[Array, "rows groups lanes"], k: int
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The k largest logits and their ids, in order, ties by id.

    They lie in the k groups with the largest maxima (ties again by id): a token in any other group
    has k tokens before it, one in each of those groups.
    """
    num_groups = logits.shape[1]
    groups = lax.top_k(logits.max(-1), min(k, num_groups))[1].sort(-1)
    candidates = jnp.take_along_axis(logits, groups[..., None], axis=1)
    values, places = lax.top_k(candidates.reshape(logits.shape[0], -1), k)
    ids = jnp.take_along_axis(groups, places // GROUP, axis=1) * GROUP + places % GROUP
    return values, ids.astype(jnp.int32)


# --- Penalties ----------------------------------------------------------------------------------


def _penalise(
    logits: Float[Array, "rows padded"], batch: StepBatch, state: SamplerState
) -> Float[Array, "rows padded"]:
    """Repetition, frequency and presence penalties, then the stop ids that may not come yet."""
    counts = state.output_counts.at[batch.slots].get(mode="fill", fill_value=0)
    seen = state.prompt_seen.at[batch.slots].get(mode="fill", fill_value=False) | (counts > 0)
    repetition = jnp.where(seen, batch.repetition[:, None], 1)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = logits - batch.frequency[:, None] * counts
    logits = logits - batch.presence[:, None] * (counts > 0)
    banned = (batch.output_index < batch.banned_until)[:, None] & (batch.stop_ids >= 0)
    # An id past the last column is dropped; a negative one would count from the end.
    columns = jnp.where(banned, batch.stop_ids, logits.shape[1])
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, columns].set(-jnp.inf, mode="drop")


def init_state(slots: int, padded_vocab: int) -> SamplerState:
    """The state of slots that have held no sequence yet."""
    shape = (slots, padded_vocab)
    return SamplerState(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_))


def update_state(
    state: SamplerState, tokens: Int32[Array, "tokens"], batch: StepBatch
) -> SamplerState:
    """Takes in the tokens that a step feeds; call it before ``sample`` of the same step.

    A token at a position inside the prompt is a prompt token, any other an output token. A row that
    starts at position 0 clears its slot first, so a slot's new sequence, and one that is computed
    again after preemption, need nothing else. (One that starts behind a cached prefix finds what
    was there before; the scheduler lets only such sequences do that as have no penalties.)

    Args:
        state: The state after the step before; donate it to update it in place.
        tokens: The tokens fed, those that the host did not know filled in.
        batch: The step's batch: ``positions``, ``token_rows``, ``query_starts``, ``slots`` and
            ``prompt_lens``.
    """
    num_slots = state.output_counts.shape[0]
    starts, stops = batch.query_starts[:-1], batch.query_starts[1:]
    first_positions = batch.positions.at[starts].get(mode="clip")
    cleared = jnp.where((stops > starts) & (first_positions == 0), batch.slots, num_slots)
    # Padding tokens have the row num_rows: their slot is out of range, and such writes are dropped.
    slots = batch.slots.at[batch.token_rows].get(mode="fill", fill_value=num_slots)
    prompt_lens = batch.prompt_lens.at[batch.token_rows].get(mode="fill", fill_value=0)
    in_prompt = batch.positions < prompt_lens
    counts = state.output_counts.at[cleared].set(0, mode="drop")
    seen = state.prompt_seen.at[cleared].set(False, mode="drop")
    return SamplerState(
        counts.at[jnp.where(in_prompt, num_slots, slots), tokens].add(1, mode="drop"),
        seen.at[jnp.where(in_prompt, slots, num_slots), tokens].set(True, mode="drop"),
    )
