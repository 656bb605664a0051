"""Compiled programs on disk: found without tracing, never where anything differs."""

import logging
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_engine, run_requests
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sidp_jax import program_cache
from sidp_jax.program_cache import KEPT_DAYS, LoweredProgram, ProgramCache
from sidp_jax.request import SamplingParams

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"


@pytest.fixture
def lowered():
    """Names of the programs that were lowered, as jax tells them."""
    names = []

    def listen(event, _, fun_name="", **__):
        if event == _LOWERED:
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def outputs(engine):
    """Tokens of a greedy request, of a random one, and of one with all options."""
    every = SamplingParams(max_tokens=5, logprobs=2, presence_penalty=1, seed=3, ignore_eos=True)
    requests = {
        "greedy": ([5, 6, 7, 8, 9] * 3, SamplingParams(temperature=0, max_tokens=6)),
        "random": ([3, 4], SamplingParams(max_tokens=6, seed=5)),
        "full": ([7] * 9, every),
    }
    finished = run_requests(engine, requests)
    return {name: output.outputs[0].token_ids for name, output in finished.items()}


@pytest.mark.parametrize(
    "options",
    [
        {"modes": ("was", "cas")},
        {"modes": ("cas_staggered",), "layer_loop": "unrolled"},
        {"modes": ("was",), "layer_loop": "unrolled", "was_fetch": "copies"},
        {"modes": ("replicated",), "pool_size": 1, "tensor_size": 2},
    ],
    ids=lambda options: options["modes"][0] + options.get("was_fetch", ""),
)
def test_a_second_engine_lowers_none_of_its_programs(options, tmp_path, lowered):
    cache = ProgramCache(tmp_path)
    first = outputs(make_engine(**options, cache=cache))
    assert any("_forward" in name or "_period" in name for name in lowered)
    lowered.clear()
    assert outputs(make_engine(**options, cache=cache)) == first
    steps = ("_forward", "_period", "_end", "_sample")
    assert not [name for name in lowered if any(step in name for step in steps)]
    assert outputs(make_engine(**options)) == first


def keep(folder, function=jnp.sin, size=8, identity=("sine",), options=None):
    """Lowers and compiles a function of one array; whether it had to be traced, and the result."""
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    program = ProgramCache(folder).program(
        jax.jit(function, donate_argnums=0, out_shardings=sharding), (device,), *identity
    )
    lowered = program.lower(jax.ShapeDtypeStruct((size,), jnp.float32, sharding=sharding))
    assert isinstance(lowered, LoweredProgram)
    return lowered.lowered is not None, lowered.compile(options)


def test_what_is_kept_is_found_by_what_decides_it(tmp_path, monkeypatch):
    assert keep(tmp_path)[0]
    assert not keep(tmp_path)[0]
    assert keep(tmp_path, size=9)[0]
    assert keep(tmp_path, identity=("cosine",))[0]
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", "") + " ")
    program_cache._surroundings.cache_clear()
    assert keep(tmp_path)[0]
    monkeypatch.undo()
    program_cache._surroundings.cache_clear()
    assert not keep(tmp_path)[0]
    monkeypatch.setattr(program_cache, "_sources", lambda: "edited")
    program_cache._surroundings.cache_clear()
    assert keep(tmp_path)[0]
    monkeypatch.undo()
    program_cache._surroundings.cache_clear()


def test_what_jax_has_in_its_own_cache_is_compiled_anew(tmp_path):
    """On CPUs what was loaded from there is written without its functions."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for name, value in zip(names, (str(tmp_path / "jax"), 0.0, -1), strict=True):
            jax.config.update(name, value)
        reset_cache()

        def function(x):
            return jnp.sort(jnp.sin(x) / (1 + x**2))[::-1] * 2

        keep(tmp_path / "first", function)
        x = np.arange(8, dtype=np.float32)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        expected = jax.jit(function, donate_argnums=0, out_shardings=sharding)(jnp.array(x))
        assert list((tmp_path / "jax").glob("*function*"))
        keep(tmp_path / "second", function)
        traced, loaded = keep(tmp_path / "second", function)
        assert not traced
        np.testing.assert_array_equal(loaded(jnp.array(x)), expected)
        assert jax.config.jax_enable_compilation_cache
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def test_options_of_the_compiler_make_another_program(tmp_path):
    keep(tmp_path)
    keep(tmp_path, options={"xla_llvm_disable_expensive_passes": True})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_loaded_program_still_takes_over_its_argument(tmp_path):
    keep(tmp_path)
    _, loaded = keep(tmp_path)
    x = jnp.arange(8.0)
    np.testing.assert_allclose(loaded(x), np.sin(np.arange(8)), rtol=1e-6)
    assert x.is_deleted()


def test_a_damaged_file_is_made_anew(tmp_path, caplog):
    keep(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    with caplog.at_level(logging.WARNING):
        _, compiled = keep(tmp_path)
    assert f"{path} cannot be loaded" in caplog.text
    assert compiled(jnp.zeros(8))[0] == 0
    caplog.clear()
    keep(tmp_path)
    assert not caplog.text


def test_a_folder_that_takes_nothing_costs_nothing_but_time(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("")
    _, compiled = keep(blocked / "programs")
    assert compiled(jnp.zeros(8))[0] == 0
    assert "will be compiled again" in caplog.text


def test_programs_that_nobody_used_are_forgotten(tmp_path):
    keep(tmp_path)
    keep(tmp_path, size=9)
    used, unused = tmp_path.iterdir()
    old = time.time() - (KEPT_DAYS + 1) * 86_400
    os.utime(unused, (old, old))
    ProgramCache(tmp_path).forget_unused()
    assert list(tmp_path.iterdir()) == [used]
    os.utime(used, (old, old))
    for size in (8, 9):  # to use one is to keep it
        keep(tmp_path, size=size)
    ProgramCache(tmp_path).forget_unused()
    assert len(list(tmp_path.iterdir())) == 2


def test_it_lies_beside_the_cache_of_jax_on_gpus(tmp_path):
    names = "jax_compilation_cache_dir", "jax_enable_compilation_cache"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        assert ProgramCache.beside_jax("gpu") == ProgramCache(tmp_path / "programs")
        assert ProgramCache.beside_jax("cpu") is None
        jax.config.update("jax_enable_compilation_cache", False)
        assert ProgramCache.beside_jax("gpu") is None
        jax.config.update("jax_enable_compilation_cache", True)
        for elsewhere in (None, "gs://bucket/cache"):
            jax.config.update("jax_compilation_cache_dir", elsewhere)
            assert ProgramCache.beside_jax("gpu") is None
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


_NAME = """
import sys; sys.path.insert(0, "tests")
from helpers import make_engine
from pathlib import Path
from sidp_jax.program_cache import ProgramCache
make_engine(modes=("was",), cache=ProgramCache(Path(sys.argv[1])))
print(sorted(path.name for path in Path(sys.argv[1]).iterdir()))
"""


def test_names_are_the_same_in_every_process(tmp_path):
    def run():
        command = [sys.executable, "-c", _NAME, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = run()
    assert first.count(",") >= 3
    assert run() == first
