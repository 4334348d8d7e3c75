"""Every test runs on 8 CPU devices with float64 available through `jax.enable_x64`."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

VALUES_ONLY = ("tests.test_contract", "tests.check.test_gradcheck")
"""Modules that compare values and no memory: most of their time is compilation, which is quicker without XLA's optimisations."""


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(request):
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", request.module.__name__ in VALUES_ONLY)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
