"""Test set-up: eight virtual CPU devices, and every shape annotation checked at run time."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    flags = os.environ.get("XLA_FLAGS", "")
    # XLA has a thread for each device, or core. Interpreted GPU kernels, whose warpgroups wait in
    # callbacks, need several: with two they hang now and then.
    if "xla_force_host_platform_device_count" not in flags:
        flags += " --xla_force_host_platform_device_count=8"
    # The tests spend their time in compilation, not in what was compiled.
    flags += " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = flags.strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="sidp_jax_tests_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook("sidp_jax", "beartype.beartype")

# Runs are reproducible, and a slow machine is no failure.
settings.register_profile("sidp_jax", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("sidp_jax")


@pytest.fixture
def hopper():
    """The GPU that our kernels are for; without one the test is skipped."""
    device = jax.devices()[0]
    if getattr(device, "compute_capability", None) != "9.0":
        pytest.skip("needs a Hopper GPU")
    return device
