"""What a configuration would hold and how fast it would be: arithmetic of numbers, without jax.

All figures are estimates. Ownership and bytes of weights and cache are those of ``pool.py``, the
cost of a step's layers in each mode is ``modes.policy.layers_seconds``; this module adds what
surrounds them: activations, attention, embedding, output head and sampling. ``FORMULA`` states the
whole estimate of throughput; ``experiments/simulate_node.py`` uses the same step times without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, exp, prod, sqrt

from sidp_jax.batch import token_buckets
from sidp_jax.hardware import Hardware, Number
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import (
    CAS,
    CAS_STAGGERED,
    COLLECTIVE,
    HOST,
    REPLICATED,
    WAS,
    LayerShape,
    Policy,
)
from sidp_jax.pool import PoolLayout, kv_bytes_per_page, padded_vocab, weight_bytes_per_device

SAMPLING_BYTES = 2 * 9 + 16
"""Bytes per sequence and token of the vocabulary: logits (4) and the penalties' state (5), each
reserved twice, and the sampler's workspace, as XLA reports it for the CPU."""

LOGIT_BYTES = 4
LOGIT_PASSES = 4
"""Times that a step's logits are written or read: by the head, twice in between, by the sampler."""

KNOWN_MODES = (REPLICATED, WAS, CAS, CAS_STAGGERED)
"""Modes whose time and memory this module knows; ``cas`` is the lockstep schedule."""

FORMULA = (
    "n = min(max_num_seqs, sequences that the KV cache holds: in + out/2 tokens each, and two",
    "  standard deviations of their sum to spare)",
    "d = n, or max_num_batched_tokens / (1 + in/out) if that is less: tokens decoded in a step",
    "t = tokens of a step, padded to the compiled shape: d decodes, and in for each new sequence;",
    "  a replica starts a Poisson number of them about n / out, and that with most sets the shape",
    "dense(t) = max(t x FLOPs / (FLOP/s), layer bytes / memory bandwidth) x measured / roofline",
    "attention = d (in + out/2) KV bytes / decode bandwidth",
    "  + d in/out 2 heads head_dim in / (prefill FLOP/s) + KV update; prefill of a pool up",
    "  to 2 pool / (pool + 1) times that, as each replica is at another chunk of a long prompt",
    "reductions, with TP > 1 = 2 (2 (TP-1)/TP x t x hidden bytes / link + latency)",
    "replicated: a layer takes dense(t) + attention + reductions",
    "was: a fetch (layer bytes / link) rides under the dense part of the layers before it, and the",
    "  longer one counts, and a share of the shorter one, which disturbs it; attention on top",
    "  (from the host it disturbs nothing, and rides under attention, too); by copies a row of the",
    "  slab rides under all of the row before it, and disturbs it less",
    "cas, lockstep: a layer takes dense(pool x t) + 4 hops + attention + everyone's reductions",
    "cas, staggered: a layer takes dense(t) x ratio of the indexed GEMM + 3 hops + attention",
    "  + reductions; pool - 1 more of them fill and drain a step",
    "head = dense part of the vocabulary for all rows + exchange of activations and logits",
    "  + 4 passes over the logits",
    "output tokens/s = replicas x d / mean time of a step",
    "not counted: the host; nor, but in a replay, preemption, ramp and tail of a job",
)
"""The throughput estimate in words, as it is printed below the tables."""


@dataclass(frozen=True)
class Parameter:
    """Shape of one parameter of a layer, and whether the devices of a replica share it out."""

    shape: tuple[int, ...]
    sharded: bool


def layer_parameters(model: ModelConfig) -> dict[str, Parameter]:
    """The parameters of one decoder layer by name: ``models.decoder.layer_spec`` without jax."""
    hidden, ffn, width = model.hidden_size, model.intermediate_size, model.head_dim
    groups, queries = model.num_kv_heads, model.queries_per_kv_head
    parameters = {
        "input_norm.scale": Parameter((hidden,), False),
        "qkv.kernel": Parameter((groups, queries + 2, width, hidden), True),
        "out.kernel": Parameter((hidden, groups, queries, width), True),
        "post_norm.scale": Parameter((hidden,), False),
        "gate_up.kernel": Parameter((2, ffn, hidden), True),
        "down.kernel": Parameter((hidden, ffn), True),
    }
    if model.qkv_bias:
        parameters["qkv.bias"] = Parameter((groups, queries + 2, width), True)
    if model.qk_norm:
        parameters["q_norm.scale"] = parameters["k_norm.scale"] = Parameter((width,), False)
    return parameters


@cache
def layer_shape(model: ModelConfig, tensor_size: int, dtype_bytes: int) -> LayerShape:
    """What one layer costs on one of the ``tensor_size`` devices of a replica."""
    parameters = layer_parameters(model)
    heads, kv_heads = model.num_heads // tensor_size, model.num_kv_heads // tensor_size
    matrices = sum(prod(p.shape) for name, p in parameters.items() if name.endswith("kernel"))
    return LayerShape(
        num_layers=model.num_layers,
        weight_bytes=dtype_bytes
        * sum(prod(p.shape) // (tensor_size if p.sharded else 1) for p in parameters.values()),
        flops_per_token=2.0 * matrices / tensor_size,
        activation_bytes=model.hidden_size * dtype_bytes,
        qkv_bytes=(heads + 2 * kv_heads) * model.head_dim * dtype_bytes,
        attended_bytes=heads * model.head_dim * dtype_bytes,
        reduced_bytes=2 * (tensor_size - 1) / tensor_size * model.hidden_size * dtype_bytes,
    )


@dataclass(frozen=True)
class Setting:
    """What all compared configurations share.

    Attributes:
        model: The model's architecture.
        hardware: One GPU of the node, and its link.
        dtype_bytes: Bytes of one value of weights, activations and KV cache.
        page_size: Tokens of a page of the KV cache.
        max_model_len: Longest sequence in tokens; a configuration must have room for one.
        gpu_memory_utilization: Share of a device's memory that may be used.
    """

    model: ModelConfig
    hardware: Hardware
    dtype_bytes: int
    page_size: int
    max_model_len: int
    gpu_memory_utilization: float

    @property
    def usable_bytes(self) -> int | None:
        """Bytes of a device that may be used; None where the profile does not know its memory."""
        return int(self.hardware.memory_bytes * self.gpu_memory_utilization) or None


@dataclass(frozen=True)
class Candidate:
    """One way to use the devices of a node: ``pools`` x ``pool_size`` x ``tensor_size``.

    Attributes:
        pool_size: Replicas that share one copy of the layers; 1 is plain.
        tensor_size: Devices of one replica.
        pools: Independent pools, each a job of its own.
        resident_layers: Layers that every replica keeps; all of them is plain.
        modes: Modes that steps may run in.
        max_num_seqs: Sequences of one replica.
        max_num_batched_tokens: Tokens of one replica's largest step.
        num_kv_pages: Pages of one replica; None is what the memory has room for.
        was_fetch: How a layer comes in WaS: ``collective``, ``copies``, or from the ``host``, which
            owns the layers of a pool of one.
    """

    pool_size: int
    tensor_size: int
    pools: int
    resident_layers: int
    modes: tuple[str, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_pages: int | None = None
    was_fetch: str = COLLECTIVE

    def __post_init__(self) -> None:
        if not set(self.modes) <= set(KNOWN_MODES):
            raise ValueError(
                f"modes={self.modes} can be estimated for {', '.join(KNOWN_MODES)} alone"
            )

    @property
    def num_replicas(self) -> int:
        """Replicas of all pools."""
        return self.pools * self.pool_size


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and the KV cache of one replica.

    Attributes:
        weights: Layers, embedding and head.
        layer_buffers: Layers in flight (WaS).
        activations: Temporaries of the largest step, in the mode that needs most.
        sampling: Logits, the sampler's state and workspace.
        kv_cache: What is left for keys and values, in whole pages.
        usable: What may be used; None where it is not known.
        kv_tokens: Tokens that one replica's cache holds.
        fits: Whether it runs: there is room for a sequence of ``max_model_len``.
        host: Bytes of layers in the host's pinned memory.
    """

    weights: int
    layer_buffers: int
    activations: int
    sampling: int
    kv_cache: int
    usable: int | None
    kv_tokens: int
    fits: bool
    host: int = 0


def memory(setting: Setting, candidate: Candidate) -> Memory:
    """Bytes per device of a configuration."""
    model, item, size = setting.model, setting.dtype_bytes, candidate.tensor_size
    layer_bytes = layer_shape(model, size, item).weight_bytes
    layout = _candidate_layout(model, candidate)
    weights = weight_bytes_per_device(
        layout,
        layer_bytes=layer_bytes,
        hidden_size=model.hidden_size,
        # The tables are cut over all devices of the pool: this is the part of one of each replica.
        vocab_size=padded_vocab(model.vocab_size, candidate.pool_size * size) // size,
        tied=model.tie_word_embeddings,
        dtype_bytes=item,
    )
    buffers = sum(fetch_bytes(setting, candidate)) if WAS in candidate.modes else 0
    activations = max(activation_bytes(setting, candidate).values())
    sampling = SAMPLING_BYTES * candidate.max_num_seqs * model.vocab_size
    page = kv_bytes_per_page(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads // size,
        head_dim=model.head_dim,
        page_size=setting.page_size,
        dtype_bytes=item,
    )
    longest = ceil(setting.max_model_len / setting.page_size)
    fixed, usable = weights + buffers + activations + sampling, setting.usable_bytes
    pages = candidate.num_kv_pages
    if pages is None and usable is None:
        pages = candidate.max_num_seqs * longest
    elif pages is None:
        pages = max(0, usable - fixed) // page
    fits = pages >= longest and (usable is None or fixed + pages * page <= usable)
    return Memory(
        weights,
        buffers,
        activations,
        sampling,
        pages * page,
        usable,
        pages * setting.page_size,
        fits,
        host=len(layout.pooled) * layer_bytes if layout.on_host else 0,
    )


def _candidate_layout(model: ModelConfig, candidate: Candidate) -> PoolLayout:
    on_host = candidate.was_fetch == HOST
    return _layout(model.num_layers, candidate.pool_size, candidate.resident_layers, on_host)


def fetch_bytes(setting: Setting, candidate: Candidate) -> list[int]:
    """Bytes that WaS fetches into: the kernels of a layer, and what of the next one comes early.

    That is its down projection, as the others arrive when their like have been used; by copies it
    is those of a row of the slab, and of all rows that are buffered beside it.
    """
    pooled = setting.model.num_layers - candidate.resident_layers
    if pooled == 0:
        return [0, 0]
    parameters = layer_parameters(setting.model)
    kernels = sum(prod(p.shape) for name, p in parameters.items() if name.endswith("kernel"))
    if candidate.was_fetch == COLLECTIVE:
        held = [kernels, prod(parameters["down.kernel"].shape) if pooled > 1 else 0]
    else:
        layout = _candidate_layout(setting.model, candidate)
        row = kernels * (1 if layout.on_host else layout.pool_size - 1)
        held = [row, (layout.buffered_rows - 1) * row]
    return [setting.dtype_bytes * n // candidate.tensor_size for n in held]


def activation_bytes(setting: Setting, candidate: Candidate) -> dict[str, int]:
    """Temporaries of each mode's largest step, without layer buffers.

    The residual stream and its normalised copy live beside either gate, up and their product, or
    queries, keys, values and the attention's result; later the logits and the parts that they are
    put together from. In lockstep CaS every GPU holds the tokens of all replicas; in staggered CaS
    a guest's beside its own. In WaS a down projection arrives ahead of its layer only once gate and
    up have been multiplied, and all buffers are free again at the logits; those of copied layers
    are held all the time. A mode's largest step is the largest that the policy can pick it
    for, as only those are compiled.
    """
    model, item, size = setting.model, setting.dtype_bytes, candidate.tensor_size
    shape = layer_shape(model, size, item)
    inner = max(3 * model.intermediate_size * item // size, shape.qkv_bytes + shape.attended_bytes)
    logits = LOGIT_BYTES * candidate.max_num_seqs * model.vocab_size
    exchanged = 2 * logits // size + (logits if size > 1 else 0)
    policy = policy_of(setting, candidate)
    needed = {}
    for mode in candidate.modes:
        sizes = [t for t in buckets(candidate) if policy.may_run(mode, t)]
        rows = max(sizes, default=0) * (candidate.pool_size if mode == CAS else 1)
        streams = 4 if mode == CAS_STAGGERED else 2
        busiest = rows * (streams * shape.activation_bytes + inner)
        if mode == WAS and candidate.was_fetch == COLLECTIVE:
            kernels, ahead = fetch_bytes(setting, candidate)
            product = rows * model.intermediate_size * item // size
            at_down = rows * streams * shape.activation_bytes + product
            needed[mode] = max(at_down, busiest - ahead, exchanged - kernels - ahead)
        else:
            needed[mode] = max(busiest, exchanged)
    return needed


@dataclass(frozen=True)
class Workload:
    """Requests of a job: mean tokens of their prompts and outputs, and their number if known.

    The estimates are of a steady state, whatever the number; 0 is not known.
    """

    prompt: int
    output: int
    requests: int = 0

    def __post_init__(self) -> None:
        if self.requests < 0:
            raise ValueError(f"workload: requests={self.requests} must be at least 0")
        if self.prompt < 1 or self.output < 1:
            raise ValueError(
                f"workload={self.prompt},{self.output} must be two counts of tokens of at least 1, "
                "prompt and output"
            )

    @property
    def mean_length(self) -> int:
        """Tokens of a running sequence, on average: half of its output is still to come."""
        return self.prompt + ceil(self.output / 2)


@dataclass(frozen=True)
class StepShape:
    """A compiled shape that steps run in.

    Attributes:
        tokens: Tokens of one replica, as padded.
        share: Share of the steps.
        mode: The mode that the policy picks for it.
        seconds: Time of such a step.
    """

    tokens: int
    share: float
    mode: str
    seconds: float


@dataclass(frozen=True)
class Throughput:
    """The steady state of a job, estimated; see ``FORMULA``.

    Attributes:
        concurrency: Sequences that one replica's KV cache has room for, without preemption.
        running: Sequences that one replica runs at a time.
        limit: What bounds them, or the tokens of a step.
        shapes: What steps look like, ascending in tokens.
        step_seconds: Time of a step, on average.
        output_tokens_per_second: Of all replicas together.
        requests_per_second: Of all replicas together.
    """

    concurrency: int
    running: int
    limit: str
    shapes: tuple[StepShape, ...]
    step_seconds: float
    output_tokens_per_second: float
    requests_per_second: float


def throughput(
    setting: Setting, candidate: Candidate, held: Memory, workload: Workload
) -> Throughput:
    """Estimates the steady state of a job on a configuration that fits."""
    budget = candidate.max_num_batched_tokens
    concurrency = _concurrency(setting, held.kv_tokens, workload)
    running = max(1, min(concurrency, candidate.max_num_seqs))
    limit = "KV cache" if running == concurrency else "max_num_seqs"
    decodes = budget / (1 + workload.prompt / workload.output)
    if decodes <= running:  # all steps are full, and decode takes its share of them
        shares, limit = {budget: 1.0}, "max_num_batched_tokens"
    else:
        decodes, shares = float(running), _shares(candidate, running, workload)
    policy = policy_of(setting, candidate)
    # A prompt's tokens attend to half of it, on average.
    pairs = decodes * workload.prompt / workload.output * workload.prompt / 2
    pairs *= _imbalance(candidate, running, workload)
    shapes = []
    for tokens, share in sorted(shares.items()):
        mode = policy.best(tokens)
        read = decodes * workload.mean_length
        chunks = [(pairs, workload.prompt)]
        attention = attention_seconds(setting, candidate, tokens, read, chunks)
        seconds = step_seconds(setting, candidate, policy, mode, tokens, attention)
        shapes.append(StepShape(tokens, share, mode, seconds))
    mean = sum(shape.share * shape.seconds for shape in shapes)
    rate = candidate.num_replicas * decodes / mean
    return Throughput(
        concurrency, running, limit, tuple(shapes), mean, rate, rate / workload.output
    )


def _concurrency(setting: Setting, kv_tokens: int, workload: Workload) -> int:
    """Sequences that a replica's cache holds with two standard deviations to spare.

    They are in all stages of their outputs, uniformly. With more of them the cache would run over
    again and again, and what is preempted is computed twice.
    """
    page = setting.page_size
    mean = ceil(workload.mean_length / page) * page
    spread = 2 * workload.output / sqrt(12)
    # n mean + sqrt(n) spread = tokens, solved for sqrt(n)
    root = (sqrt(spread**2 + 4 * mean * kv_tokens) - spread) / (2 * mean)
    return max(int(root**2), kv_tokens // (workload.prompt + workload.output + page))


def _imbalance(candidate: Candidate, running: int, workload: Workload) -> float:
    """How much more than the mean the replica that takes longest attends to.

    Of prompts that are computed in many chunks, each replica of a pool is at a random one, and the
    furthest of ``W`` random places in [0, 1] is at W / (W + 1), not at a half.
    """
    room = max(1, candidate.max_num_batched_tokens - running)
    chunks = max(1.0, workload.prompt / room)
    furthest = 2 * candidate.pool_size / (candidate.pool_size + 1)
    return 1 + (furthest - 1) * (1 - 1 / chunks)


def _shares(candidate: Candidate, running: int, workload: Workload) -> dict[int, float]:
    """Share of the steps by their tokens as padded, where not all are full.

    In each step every replica starts a new sequence for each one that ended, a number that is
    Poisson distributed about running / output; the replica of a pool that prefills most decides the
    shape. What the budget has no room for waits for the next steps, which are full then.
    """
    room = candidate.max_num_batched_tokens - running
    starts, most = running / workload.output, room // workload.prompt
    # Of so many prompts in a step: the probability of at most that many, and their mean.
    below, mean, probability, total = {}, 0.0, exp(-starts), 0.0
    for count in range(most):
        total += probability
        below[count * workload.prompt] = total
        mean += count * probability
        probability *= starts / (count + 1)
    # As many prompts as arrive have to be computed: so many steps more are full.
    whole = room / workload.prompt
    mean += (1 - total) * (most or whole)
    full = min(1.0, max(0.0, (starts - mean) / (whole - mean))) if most else 0.0
    below = {tokens: (1 - full) * probability for tokens, probability in below.items()}
    if not most:
        below[0] = max(0.0, 1 - starts / whole)
    below[room] = 1.0
    shares: dict[int, float] = {}
    before = 0.0
    for prefilled, probability in below.items():
        tokens = bucket(candidate, running + prefilled)
        until = probability**candidate.pool_size
        shares[tokens] = shares.get(tokens, 0.0) + until - before
        before = until
    return {tokens: share for tokens, share in shares.items() if share > 1e-3}


def policy_of(setting: Setting, candidate: Candidate) -> Policy:
    """The policy that the engine would decide with."""
    return _policy(
        setting.hardware,
        layer_shape(setting.model, candidate.tensor_size, setting.dtype_bytes),
        candidate.modes,
        candidate.pool_size,
        candidate.resident_layers,
        candidate.was_fetch,
    )


@cache
def _policy(
    hardware: Hardware,
    shape: LayerShape,
    modes: tuple[str, ...],
    pool_size: int,
    resident_layers: int,
    was_fetch: str,
) -> Policy:
    """One policy for all candidates that decide alike: it remembers what it has computed."""
    return Policy(
        modes, pool_size, shape, hardware, resident_layers=resident_layers, was_fetch=was_fetch
    )


_ladder = cache(token_buckets)


def buckets(candidate: Candidate) -> tuple[int, ...]:
    """Tokens of the compiled shapes, ascending."""
    return _ladder(candidate.max_num_batched_tokens, candidate.max_num_seqs)


def bucket(candidate: Candidate, tokens: int) -> int:
    """Tokens of the compiled shape that a step of so many runs in."""
    return next(size for size in buckets(candidate) if size >= tokens)


def attention_seconds(
    setting: Setting,
    candidate: Candidate,
    tokens: int,
    read_tokens: Number,
    prefills: list[tuple[Number, int]],
) -> float:
    """Seconds of one layer's attention and cache update, on one device of one replica.

    Args:
        setting: Model and hardware.
        candidate: The configuration.
        tokens: Tokens of the step, as padded.
        read_tokens: Tokens of the cache that decodes read.
        prefills: Pairs of query and key in each prefilled chunk, with its context in tokens.
    """
    model, size = setting.model, candidate.tensor_size
    kv_bytes = 2 * model.num_kv_heads * model.head_dim * setting.dtype_bytes / size
    flops = 4 * model.num_heads * model.head_dim / size
    products = ((pairs * flops, context) for pairs, context in prefills)
    hardware = setting.hardware
    attention = hardware.attention_seconds(read_tokens * kv_bytes, products)
    return attention + hardware.kv_update_seconds(tokens)


def step_seconds(
    setting: Setting,
    candidate: Candidate,
    policy: Policy,
    mode: str,
    tokens: int,
    attention: float,
) -> float:
    """Seconds of a step; see ``FORMULA``.

    Args:
        setting: Model and hardware.
        candidate: The configuration.
        policy: Its policy, ``policy_of``.
        mode: How its layers run.
        tokens: Tokens per replica, as padded.
        attention: Seconds of one layer's attention, of the replica that takes longest.
    """
    layers = policy.step_seconds(mode, tokens, attention)
    around = _around_seconds(setting, candidate, tokens)
    return layers + around + setting.hardware.step_overhead


def _around_seconds(setting: Setting, candidate: Candidate, tokens: int) -> float:
    """Embedding, output head and sampling: the same in every mode."""
    model, hardware = setting.model, setting.hardware
    pool, size = candidate.pool_size, candidate.tensor_size
    rows = min(tokens, candidate.max_num_seqs)
    shard = model.vocab_size * model.hidden_size / size / pool
    head = hardware.dense_seconds(pool * rows, shard * setting.dtype_bytes, 2 * shard)
    # All of a pool's tokens are looked up, and all of its rows multiplied, on every device.
    moved = (pool - 1) * (tokens + rows) * model.hidden_size * setting.dtype_bytes
    foreign = (pool - 1) / pool / size + (size - 1) / size
    moved += rows * model.vocab_size * LOGIT_BYTES * foreign
    # The sampler always sees the widest shape.
    logits = candidate.max_num_seqs * model.vocab_size * LOGIT_BYTES
    passes = LOGIT_PASSES * logits / hardware.memory_bandwidth
    return head + moved / hardware.link_bandwidth + passes


_layout = cache(PoolLayout)
