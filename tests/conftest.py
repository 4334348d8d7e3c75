"""Every test runs on 8 CPU devices with float64 available through `jax.enable_x64`.

`JAX_PLATFORMS=cuda,cpu JAX_DEFAULT_MATMUL_PRECISION=highest` runs them on a GPU instead, where those are skipped that take more devices
than there are (the marker `devices`, and `mesh_of` of `tests/support.py`) or the memory that XLA plans on a CPU (`planned_bytes` there).
`LAYERS_ENGINE=custom_vjp` runs them with the other engine, without those of the marker `linear_engine`.
"""

import ctypes
import gc
import os
import pathlib
import resource
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters=true"  # to compile takes a third of the time; newer XLA ignores it
        " --xla_cpu_parallel_codegen_split_count=1"  # to split modules as small as these takes longer than to compile them
    ).strip()

import jax
import pytest

from tests import contexts

OPTIMIZED = ("tests.activations", "tests.core.test_transforms", "tests.losses.test_cross_entropy")
"""Modules and packages that are compiled as users compile: they run long, or compare the last bit of float32 with that of NumPy or another program.

Compilation takes most of the time of the others, and is quicker without LLVM's optimisations. What XLA plans for memory is the same with and without,
and with either of its emitters.
"""


MEMORY = 3 * 2**29
"""Bytes a worker may hold after a test before it drops what JAX keeps: every program that was compiled."""

PROGRAMS = pytest.StashKey[str]()
"""The folder with the programs that were compiled: workers, and files after one another, compile what is equal once."""

contexts.share()


def pytest_configure(config):
    shared = getattr(config, "workerinput", {}).get("programs")
    if shared is None:
        shared = tempfile.mkdtemp(prefix="layers-tests-")
        config.add_cleanup(lambda: shutil.rmtree(shared, ignore_errors=True))
    config.stash[PROGRAMS] = shared
    jax.config.update("jax_compilation_cache_dir", shared)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["programs"] = node.config.stash[PROGRAMS]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With `-n`, a file's tests stay with one worker, which compiles what they share once; the contract's, which share nothing, each go alone.

    xdist hands out the files with the most tests first, so the contract comes last, and all workers end at the same time.
    """
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if nodeid.startswith("tests/test_contract.py") else nodeid.split("::")[0]

    return ByFile(config, log)


def pytest_runtest_setup(item):
    if item.get_closest_marker("linear_engine") and os.environ.get("LAYERS_ENGINE", "linear") != "linear":
        pytest.skip("needs the engine 'linear'")
    devices = item.get_closest_marker("devices")
    if devices and jax.device_count() < devices.args[0]:
        pytest.skip(f"needs {devices.args[0]} devices")


def pytest_collection_finish():
    """What was imported stays: it need not be searched for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or nextitem.path != item.path or _resident() > MEMORY:
        jax.clear_caches()
        contexts.renew()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what is freed
        if trim:
            trim(0)


def _resident():
    """Bytes in memory of this process, 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(request):
    before = jax.config.read("jax_disable_most_optimizations")
    quick = jax.default_backend() == "cpu" and not request.module.__name__.startswith(OPTIMIZED)
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
