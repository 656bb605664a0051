"""The configuration of a run: a YAML file and ``key=value`` overrides, as one frozen dataclass.

Keys are flat and have the field's long names; ``sampling.*`` are the defaults of the requests.
Overrides beat the file, which beats the defaults. Importing this module does not import jax.
"""

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, no_type_check

import yaml

from sidp_jax.request import RequestError, SamplingParams

PACKAGE_FOLDER = Path(__file__).parent
CONFIG_FOLDER = PACKAGE_FOLDER / "configs"
PACKAGE_PREFIX = "package:"


class ConfigError(ValueError):
    """A configuration that cannot run; the message says what to set instead."""


# Key: the limit, the test of it, and the remedy.
_LIMITS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "model": (
        "not empty",
        bool,
        "set it to a folder with config.json, *.safetensors and tokenizer.json",
    ),
    "pool_size": (
        "at least 1",
        lambda x: x >= 1,
        "set it to the number of replicas that share the weights",
    ),
    "num_pools": (
        "at least 1",
        lambda x: x >= 1,
        "set it to the pools that share the input, each on GPUs of its own",
    ),
    "tensor_parallel_size": (
        "at least 1",
        lambda x: x >= 1,
        "set it to the devices that one replica spreads its heads over",
    ),
    "resident_layers": (
        "at least 0",
        lambda x: x >= 0,
        "0 leaves every layer to its one owner",
    ),
    "pool_host_layers": (
        "at least 0",
        lambda x: x >= 0,
        "0 keeps all layers on the GPU",
    ),
    "max_model_len": (
        "at least 2, one token of prompt and one of output",
        lambda x: x >= 2,
        "null takes the model's own limit",
    ),
    "max_num_seqs": (
        "at least 1",
        lambda x: x >= 1,
        "set it to the sequences that one replica may run at a time",
    ),
    "max_num_batched_tokens": (
        "at least 1",
        lambda x: x >= 1,
        "set it to the tokens that one replica may compute in one step",
    ),
    "page_size": ("at least 1", lambda x: x >= 1, "16 is a good start"),
    "gpu_memory_utilization": (
        "above 0 and at most 1",
        lambda x: 0 < x <= 1,
        "0.92 leaves room for what is allocated outside of jax",
    ),
    "num_kv_pages": (
        "at least 1",
        lambda x: x >= 1,
        "null takes as many as fit into the memory",
    ),
    "trust_remote_code": (
        "false: no code is ever run from a checkpoint",
        lambda x: x is False,
        "use a model of a supported architecture, and leave the key out",
    ),
    "seed": ("in 0..2**32-1", lambda x: 0 <= x < 2**32, "any fixed number will do"),
}

_NOUNS = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}


@no_type_check  # __post_init__ is the check, also where the tests check every annotation
@dataclass(frozen=True)
class EngineConfig:
    """All that a run can be told.

    Paths are relative to the working folder; ``package:assets/x`` is ``assets/x`` of the
    installed package.

    Attributes:
        model: Folder of a Hugging Face checkpoint.
        load_format: ``auto`` reads what the folder holds, ``orbax`` means one made by convert,
            ``dummy`` draws small random weights.
        dtype: Type of weights, activations and KV cache.
        pool_size: Replicas that share one copy of the layers.
        tensor_parallel_size: Devices of one replica, over which its heads are spread.
        num_pools: Pools, each a process of its own with its own devices and its own copy of the
            weights; they share one queue of requests. With ``pool_size=1`` that is plain data
            parallelism.
        mode: How a layer that a replica does not own is run; ``auto`` picks it step by step.
        cas_schedule: How replicas take turns at the owners in ``cas``: all at one layer
            (``lockstep``), or each one layer behind the one before it (``staggered``); ``auto``
            picks the cheaper one step by step, where the hardware's profile has an indexed GEMM,
            and is ``lockstep`` elsewhere and with resident layers.
        was_fetch: How a layer comes from its owner in ``was``: broadcast inside of the step's one
            program (``collective``), or copied by the GPUs' copy engines between programs of some
            layers each (``copies``), which leaves the cores to the compute and takes more buffers;
            ``auto`` copies in pools of two where the hardware's profile knows how fast.
        layer_loop: Form of the loop over the layers.
        resident_layers: Layers that every replica keeps.
        pool_host_layers: Layers that the host owns: they lie in its pinned memory and are fetched
            (WaS) step by step. For one GPU, whose memory they would not fit into.
        attention: Implementation of attention; ``auto`` is ``reference`` on the CPU and ``mosaic``
            (Hopper kernels) on a GPU, which on one that is no Hopper is an error that names the
            choice between ``cudnn`` and ``reference``.
        max_model_len: Longest sequence, prompt and output, in tokens; None is the model's own.
        max_num_seqs: Sequences that one replica runs at a time.
        max_num_batched_tokens: Tokens that one replica computes in one step.
        prefill: ``spread`` evens prefill out over the steps, ``first`` does it as soon as there is
            room in the cache.
        page_size: Tokens of one page of the KV cache.
        enable_prefix_caching: Whether prompts that begin alike share the pages of what they have in
            common, and compute it once; whole pages alone are shared.
        gpu_memory_utilization: Share of a device's memory that may be used.
        num_kv_pages: Pages of one replica's KV cache; None is what the memory has room for.
        platform: Where to run; on ``cpu`` the devices are virtual ones.
        hardware: Profile from which ``mode: auto`` computes: a name, or a path ending in ``.yaml``;
            ``auto`` goes by the device's name, ``measure`` times the machine.
        trust_remote_code: Only false is allowed.
        seed: Seed of the requests that bring none.
        input: File with one request per line.
        output: File with one result per line.
        overwrite: Whether to start anew where the output exists.
        sampling: What a request gets that does not say otherwise.

    Raises:
        ConfigError: A value has the wrong type or lies outside its limits.
    """

    model: str
    load_format: Literal["auto", "safetensors", "orbax", "dummy"] = "auto"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    pool_size: int = 1
    tensor_parallel_size: int = 1
    num_pools: int = 1
    mode: Literal["auto", "replicated", "was", "cas"] = "auto"
    cas_schedule: Literal["auto", "lockstep", "staggered"] = "auto"
    was_fetch: Literal["auto", "collective", "copies"] = "auto"
    layer_loop: Literal["auto", "scan", "unrolled"] = "auto"
    resident_layers: int = 0
    pool_host_layers: int = 0
    attention: Literal["auto", "reference", "mosaic", "cudnn"] = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    prefill: Literal["spread", "first"] = "spread"
    page_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.92
    num_kv_pages: int | None = None
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    hardware: str = "auto"
    trust_remote_code: bool = False
    seed: int = 0
    input: str | None = None
    output: str | None = None
    overwrite: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self):
        for key, entry in _FIELDS.items():
            if key == "sampling":  # has checked itself
                continue
            value = _typed(key, getattr(self, key), entry.type)
            object.__setattr__(self, key, value)
            limit, valid, remedy = _LIMITS.get(key, (None, None, None))
            if limit is not None and value is not None and not valid(value):
                raise ConfigError(f"{key}={value!r} must be {limit}; {remedy}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}, so that every sequence can decode in every "
                "step; raise the one or lower the other"
            )
        if self.cas_schedule == "staggered" and self.resident_layers:
            raise ConfigError(
                f"cas_schedule='staggered' needs resident_layers=0, got {self.resident_layers}: a "
                "layer that is everywhere has no owner to go to; set one of them back"
            )
        if self.was_fetch == "copies" and self.layer_loop == "scan":
            raise ConfigError(
                "was_fetch='copies' needs layer_loop=unrolled or auto, got 'scan': a copy takes "
                "whole arrays, not slices of a stack"
            )
        if self.pool_host_layers:
            self._check_host_layers()
        if self.hardware != "auto":
            from sidp_jax.hardware import MEASURE, is_profile_file, profile_names

            if not is_profile_file(self.hardware):
                _one_of("hardware", self.hardware, ("auto", MEASURE, *profile_names()))

    def _check_host_layers(self) -> None:
        count = self.pool_host_layers
        if self.num_devices != 1:
            raise ConfigError(
                f"pool_host_layers={count} is for one GPU, and pool_size x tensor_parallel_size is "
                f"{self.num_devices}; set it to 0: a larger pool keeps its layers on its GPUs"
            )
        if self.mode not in ("auto", "was"):
            raise ConfigError(
                f"pool_host_layers={count} needs mode=was or auto, got {self.mode!r}: the host "
                "computes nothing, its layers are fetched"
            )
        if self.resident_layers:
            raise ConfigError(
                f"pool_host_layers={count} needs resident_layers=0, got {self.resident_layers}: "
                "all other layers are on the GPU anyway"
            )
        if self.was_fetch == "collective":
            raise ConfigError(
                f"pool_host_layers={count} needs was_fetch=copies or auto, got 'collective': no "
                "collective reaches the host's memory"
            )
        if self.layer_loop == "scan":
            raise ConfigError(
                f"pool_host_layers={count} needs layer_loop=unrolled or auto, got 'scan'"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> "EngineConfig":
        """Makes a config of flat keys; a nested mapping is the same as keys with dots.

        Raises:
            ConfigError: A key is unknown, a required one is missing, or a value is not allowed.
        """
        values = dict(_flatten(values))
        known = [*_FIELDS, *_SAMPLING_FIELDS]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown key {key!r}; the nearest known one is {_near(key)!r}")
        sampling = {
            key.removeprefix("sampling."): _real(value, _SAMPLING_FIELDS[key].type)
            for key, value in values.items()
            if key in _SAMPLING_FIELDS
        }
        own = {key: value for key, value in values.items() if key in _FIELDS}
        if own.get("model") is None:
            raise ConfigError(f"model is not set; {_LIMITS['model'][2]}")
        base = own.pop("sampling", SamplingParams())
        if not isinstance(base, SamplingParams):
            raise ConfigError(f"sampling={base!r} must hold keys, such as temperature: 0")
        try:
            return cls(**own, sampling=replace(base, **sampling))
        except RequestError as error:
            raise ConfigError(f"sampling.{error}") from None

    @property
    def num_devices(self) -> int:
        """Devices of one pool."""
        return self.pool_size * self.tensor_parallel_size

    @property
    def model_path(self) -> Path:
        """Folder of the model."""
        return resolve_path(self.model)

    @property
    def input_path(self) -> Path | None:
        """The input file."""
        return None if self.input is None else resolve_path(self.input)

    @property
    def output_path(self) -> Path | None:
        """The output file."""
        return None if self.output is None else resolve_path(self.output)


def load_config(name: str | Path, overrides: Iterable[str] = ()) -> EngineConfig:
    """Reads a YAML file and applies ``key=value`` overrides.

    Args:
        name: A path, or the bare name of a file in the working folder or among those shipped.
        overrides: Strings ``key=value``; the value is YAML, as in the file.

    Raises:
        ConfigError: The file or an override is not what it has to be.
    """
    path = find_config(name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{path} must hold lines `key: value`, but is {values!r:.80}")
    flat = dict(_flatten(values))
    return EngineConfig.from_mapping(flat | dict(map(_parse_override, overrides)))


def find_config(name: str | Path) -> Path:
    """The file that a name means.

    Raises:
        ConfigError: There is no such file.
    """
    path = Path(name)
    bare = path.name == str(name)
    for candidate in (path, CONFIG_FOLDER / path) if bare else (path,):
        if candidate.is_file():
            return candidate
    shipped = ", ".join(sorted(config.name for config in CONFIG_FOLDER.glob("*.yaml")))
    raise ConfigError(
        f"no config file {str(name)!r} in {path.absolute().parent}; shipped with the package, "
        f"and found by their bare names, are {shipped}"
    )


def resolve_path(value: str) -> Path:
    """A path as it is used: ``package:x`` lies in the package, ``~`` is the home folder."""
    if value.startswith(PACKAGE_PREFIX):
        return PACKAGE_FOLDER / value.removeprefix(PACKAGE_PREFIX)
    return Path(value).expanduser()


_FIELDS = {field.name: field for field in fields(EngineConfig)}
_SAMPLING_FIELDS = {f"sampling.{field.name}": field for field in fields(SamplingParams)}


def _flatten(values: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Turns nested mappings into keys with dots, one level deep."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        elif not (key == "sampling" and value is None):  # an empty section
            yield key, value


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {text!r} must have the form key=value")
    if key in _FIELDS and str in (_FIELDS[key].type, *get_args(_FIELDS[key].type)):
        return key, None if value == "null" else value  # a path may look like a number
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r} is not valid YAML: {error}") from None


def _near(key: str) -> str:
    known = [name for name in (*_FIELDS, *_SAMPLING_FIELDS) if name != "sampling"]
    by_last_part = {name.rpartition(".")[2]: name for name in known}
    match = get_close_matches(key, known, n=1, cutoff=0.6)
    match = match or get_close_matches(key.rpartition(".")[2], by_last_part, n=1, cutoff=0.0)
    return by_last_part.get(match[0], match[0])


def _one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}={value!r} must be one of {', '.join(choices)}{hint}")


def _typed(key: str, value: Any, kind: Any) -> Any:
    """The value as its field's type, or an error that names both."""
    if get_origin(kind) is Literal:
        _one_of(key, value, get_args(kind))
        return value
    optional = get_origin(kind) is types.UnionType
    if optional:
        if value is None:
            return None
        kind = get_args(kind)[0]
    value = _real(value, kind)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        hint = "; put it in quotes" if kind is str and value is not None else ""
        default = _FIELDS[key].default
        hint = hint or ("" if default is MISSING else f"; the default is {default!r}")
        raise ConfigError(
            f"{key}={value!r} must be {_NOUNS[kind]}{' or null' if optional else ''}{hint}"
        )
    return value


def _real(value: Any, kind: Any) -> Any:
    """Accepts integers for reals, and the strings that YAML makes of numbers like ``1e-3``."""
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value
