"""What a configuration would hold and how fast it would be: arithmetic of numbers, without jax.

All figures are estimates. Ownership and bytes of weights and cache are those of ``pool.py``, the
cost of a layer in each mode is ``modes.policy.layer_seconds``; this module adds what surrounds
them: activations, attention, reductions over the devices of a replica, and the output head.
``FORMULA`` states the whole estimate of throughput.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from math import ceil, prod

from sidp_jax.hardware import Hardware
from sidp_jax.models.config import ModelConfig
from sidp_jax.modes.policy import CAS, REPLICATED, WAS, LayerShape, Policy, layer_seconds
from sidp_jax.pool import PoolLayout, kv_bytes_per_page, padded_vocab, weight_bytes_per_device

LAYER_BUFFERS = 2
"""Layers in flight in WaS: the one in use and the one that arrives."""

SAMPLING_BYTES = 2 * 9 + 16
"""Bytes per sequence and token of the vocabulary: logits (4) and the penalties' state (5), each
reserved twice, and the sampler's workspace, as XLA reports it for the CPU."""

LOGIT_BYTES = 4
KNOWN_MODES = (REPLICATED, WAS, CAS)
"""Modes whose time and memory this module knows; CaS is the lockstep schedule."""

FORMULA = (
    "n = min(max_num_seqs, KV pages / pages of a sequence of mean length, in + out/2)",
    "t = min(max_num_batched_tokens, n (1 + in/out)), the tokens of a replica's step",
    "d = t / (1 + in/out), those of them that are decoded",
    "dense(t) = max(t x FLOPs / (FLOP/s), layer bytes / memory bandwidth)",
    "attention = d (in + out/2) KV bytes / memory bandwidth "
    "+ (t - d) 2 heads head_dim in / (FLOP/s)",
    "reductions, with TP > 1 = 2 (2 (TP-1)/TP x t x hidden bytes / link + latency)",
    "replicated: a layer takes dense(t) + attention + reductions",
    "was: a fetch (layer bytes / link) rides under the layers before it; the longer one counts",
    "cas, lockstep: a layer takes dense(pool x t) + hops + attention + everyone's reductions",
    "head = max(d x FLOPs / (FLOP/s), its bytes / memory bandwidth) + exchange of the logits",
    "output tokens/s = replicas x d / (layers + head)",
    "not counted: padding of steps to compiled shapes, sampling, the host, preemption, the tail",
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
    """

    pool_size: int
    tensor_size: int
    pools: int
    resident_layers: int
    modes: tuple[str, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_pages: int | None = None

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
    """

    weights: int
    layer_buffers: int
    activations: int
    sampling: int
    kv_cache: int
    usable: int | None
    kv_tokens: int
    fits: bool


def memory(setting: Setting, candidate: Candidate) -> Memory:
    """Bytes per device of a configuration."""
    model, item, size = setting.model, setting.dtype_bytes, candidate.tensor_size
    layer_bytes = layer_shape(model, size, item).weight_bytes
    layout = _layout(model.num_layers, candidate.pool_size, candidate.resident_layers)
    weights = weight_bytes_per_device(
        layout,
        layer_bytes=layer_bytes,
        hidden_size=model.hidden_size,
        # The tables are cut over all devices of the pool: this is the part of one of each replica.
        vocab_size=padded_vocab(model.vocab_size, candidate.pool_size * size) // size,
        tied=model.tie_word_embeddings,
        dtype_bytes=item,
    )
    pooled = model.num_layers - candidate.resident_layers
    buffers = min(LAYER_BUFFERS, pooled) * layer_bytes if WAS in candidate.modes else 0
    activations = max(activation_bytes(setting, candidate, mode) for mode in candidate.modes)
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
    tokens = pages * setting.page_size
    return Memory(weights, buffers, activations, sampling, pages * page, usable, tokens, fits)


def activation_bytes(setting: Setting, candidate: Candidate, mode: str) -> int:
    """Temporaries of the largest step in one mode, without layer buffers.

    The residual stream and its normalised copy live beside either gate, up and their product, or
    queries, keys, values and the attention's result; later the logits and the parts that they are
    put together from. In lockstep CaS every GPU holds the tokens of all replicas.
    """
    model, item, size = setting.model, setting.dtype_bytes, candidate.tensor_size
    shape = layer_shape(model, size, item)
    inner = max(3 * model.intermediate_size * item // size, shape.qkv_bytes + shape.attended_bytes)
    rows = candidate.max_num_batched_tokens * (candidate.pool_size if mode == CAS else 1)
    logits = LOGIT_BYTES * candidate.max_num_seqs * model.vocab_size
    exchanged = 2 * logits // size + (logits if size > 1 else 0)
    return max(rows * (2 * shape.activation_bytes + inner), exchanged)


@dataclass(frozen=True)
class Workload:
    """Requests of a job: mean tokens of their prompts and outputs."""

    prompt: int
    output: int

    def __post_init__(self) -> None:
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
class Throughput:
    """The steady state of a job, estimated; see ``FORMULA``.

    Attributes:
        concurrency: Sequences that one replica's KV cache has room for.
        running: Sequences that one replica runs at a time.
        limit: What bounds them, or the tokens of a step.
        step_tokens: Tokens of one replica in a step.
        mode: The mode that the policy picks for such a step.
        step_seconds: Time of a step.
        output_tokens_per_second: Of all replicas together.
        requests_per_second: Of all replicas together.
    """

    concurrency: int
    running: int
    limit: str
    step_tokens: int
    mode: str
    step_seconds: float
    output_tokens_per_second: float
    requests_per_second: float


def throughput(
    setting: Setting, candidate: Candidate, held: Memory, workload: Workload
) -> Throughput:
    """Estimates the steady state of a job on a configuration that fits."""
    page = setting.page_size
    concurrency = held.kv_tokens // (ceil(workload.mean_length / page) * page)
    running = max(1, min(concurrency, candidate.max_num_seqs))
    limit = "KV cache" if running == concurrency else "max_num_seqs"
    tokens_per_output = 1 + workload.prompt / workload.output
    tokens = running * tokens_per_output
    if tokens > candidate.max_num_batched_tokens:
        tokens, limit = candidate.max_num_batched_tokens, "max_num_batched_tokens"
    decodes = tokens / tokens_per_output
    policy = policy_of(setting, candidate)
    mode = min(candidate.modes, key=lambda mode: policy.seconds(mode, ceil(tokens)))
    seconds = step_seconds(setting, candidate, mode, ceil(tokens), decodes, workload)
    rate = candidate.num_replicas * decodes / seconds
    return Throughput(
        concurrency, running, limit, ceil(tokens), mode, seconds, rate, rate / workload.output
    )


def policy_of(setting: Setting, candidate: Candidate) -> Policy:
    """The policy that the engine would decide with."""
    shape = layer_shape(setting.model, candidate.tensor_size, setting.dtype_bytes)
    return Policy(candidate.modes, candidate.pool_size, shape, setting.hardware)


def step_seconds(
    setting: Setting,
    candidate: Candidate,
    mode: str,
    tokens: int,
    decodes: float,
    workload: Workload,
) -> float:
    """Seconds of a step of ``tokens`` per replica, ``decodes`` of them decoded; see ``FORMULA``."""
    model, hardware, size = setting.model, setting.hardware, candidate.tensor_size
    policy = policy_of(setting, candidate)
    attention = _attention_seconds(setting, size, tokens, decodes, workload)
    reduction = _reduction_seconds(setting, size, tokens)
    home = policy.seconds(REPLICATED, tokens) + attention + reduction
    first, *later = _spans(model.num_layers, candidate.pool_size, candidate.resident_layers)
    if mode == REPLICATED or not later:
        layers = model.num_layers * home
    elif mode == WAS:
        fetch = fetch_seconds(policy)
        # Reductions share the link with the fetch, so they lengthen it.
        before = [first, *later[:-1]]
        layers = sum(max(count * home, fetch + count * reduction) for count in before)
        layers += later[-1] * home
    else:
        everyone = _reduction_seconds(setting, size, candidate.pool_size * tokens)
        served = policy.seconds(CAS, tokens) + attention + everyone
        layers = len(later) * served + candidate.resident_layers * home
    values = decodes * model.vocab_size
    shard = model.vocab_size * model.hidden_size * setting.dtype_bytes / size / candidate.pool_size
    head = max(
        2 * values * model.hidden_size / size / hardware.flops, shard / hardware.memory_bandwidth
    )
    foreign = (candidate.pool_size - 1) / candidate.pool_size / size + (size - 1) / size
    return layers + head + values * LOGIT_BYTES * foreign / hardware.link_bandwidth


def fetch_seconds(policy: Policy) -> float:
    """Seconds that one layer takes over the link: WaS on a GPU that computes in no time."""
    instant = replace(policy.hardware, memory_bandwidth=float("inf"))
    return layer_seconds(WAS, 0, policy.pool_size, policy.shape, instant)


def hop_seconds(policy: Policy, tokens: int) -> float:
    """Seconds that the activations of one layer are under way in lockstep CaS."""
    return policy.seconds(CAS, tokens) - policy.seconds(REPLICATED, policy.pool_size * tokens)


def _attention_seconds(
    setting: Setting, size: int, tokens: int, decodes: float, workload: Workload
) -> float:
    """One layer's attention: decodes read their context, prefill computes half of a square."""
    model, hardware = setting.model, setting.hardware
    kv_bytes = 2 * model.num_kv_heads * model.head_dim * setting.dtype_bytes / size
    read = decodes * workload.mean_length * kv_bytes / hardware.memory_bandwidth
    flops = 2 * model.num_heads * model.head_dim * workload.prompt / size
    return read + max(0.0, tokens - decodes) * flops / hardware.flops


def _reduction_seconds(setting: Setting, size: int, tokens: int) -> float:
    """Two all-reduces of the residual stream over the devices of a replica."""
    if size == 1:
        return 0.0
    hidden = setting.model.hidden_size * setting.dtype_bytes
    moved = 2 * (size - 1) / size * tokens * hidden
    return 2 * (moved / setting.hardware.link_bandwidth + setting.hardware.hop_latency)


_layout = cache(PoolLayout)


@cache
def _spans(num_layers: int, pool_size: int, resident_layers: int) -> tuple[int, ...]:
    """Layers before the first pooled one, then from each pooled one to the next."""
    pooled = _layout(num_layers, pool_size, resident_layers).pooled
    edges = (0, *pooled, num_layers)
    return tuple(end - start for start, end in pairwise(edges))
