"""Every test runs on 8 CPU devices with float64 available through `jax.enable_x64`.

`JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest` runs them on a GPU instead, where those of several devices and of the memory that
XLA plans on a CPU do not hold.
"""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"  # to compile takes a third of the time; newer XLA ignores it
        " --xla_cpu_parallel_codegen_split_count=1"  # to split modules as small as these takes longer than to compile them
    ).strip()

import jax
import pytest

OPTIMIZED = ("tests.activations", "tests.core.test_transforms", "tests.losses.test_cross_entropy", "tests.tools")
"""Modules and packages that are compiled as users compile: they run long, or compare the last bit of float32 with that of NumPy or another program.

Compilation takes most of the time of the others, and is quicker without LLVM's optimisations. What XLA plans for memory is the same with and without,
and with either of its emitters.
"""


@pytest.fixture(autouse=True, scope="module")
def _caches_of_a_file_only():
    """JAX keeps every compiled program: gigabytes over the whole suite."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(request):
    before = jax.config.read("jax_disable_most_optimizations")
    quick = jax.default_backend() == "cpu" and not request.module.__name__.startswith(OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
