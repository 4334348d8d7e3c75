"""Compiles for devices that are not there: XLA's compilers for GPUs and TPUs run on any machine that has their plugin.

What XLA plans for temporary memory is what the device will take, to a percent, but for the workspaces of products that cuBLAS chooses there: 32 to
64 MiB where a large product is. Time is not known. The plugins come with `pip install "vjp-layers[aot]"`; nothing runs on them here.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from layers.core.machine import compiling_for

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Device:
    """A device to compile for.

    Attributes:
        title: its name.
        platform: what JAX calls its kind.
        architecture: which of that kind, as `layers.compiling_for` takes it.
        plugins: the packages of which one holds its compiler.
        topology: the name and the options by which the compiler knows it.
    """

    title: str
    platform: str
    architecture: str
    plugins: tuple[str, ...]
    topology: tuple[str, dict[str, str]]


DEVICES = {
    "h100": Device("NVIDIA H100", "cuda", "9.0", ("jax_cuda13_plugin", "jax_cuda12_plugin"), ("h100", {"target_config": _H100, "topology": "1x1x1"})),
    "v5p": Device("TPU v5p", "tpu", "TPU v5", ("libtpu",), ("v5p:2x2x1", {})),
}


def available(name: str) -> bool:
    """Whether this machine has the compiler for a device."""
    return any(importlib.util.find_spec(p) is not None for p in DEVICES[name].plugins)


@functools.cache
def _sharding(name: str) -> Any:
    from jax.experimental import topologies

    device = DEVICES[name]
    if not available(name):
        raise ModuleNotFoundError(f'compiling for the {device.title} takes the package {device.plugins[0]}: pip install "vjp-layers[aot]"')
    if device.platform == "tpu":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu would look for the machine that it is on
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # and lock it against other processes: a compiler serves any number
    topology, options = device.topology
    return jax.sharding.SingleDeviceSharding(topologies.get_topology_desc(topology, device.platform, **options).devices[0])


def compile_for(name: str, fn: Callable[..., Any], args: Any, **options: Any) -> Any:
    """`fn` compiled for one device.

    Args:
        name: one of `DEVICES`.
        fn: a function of arrays; its layers are traced for that device.
        args: a tuple of its arguments, of arrays or of what has their shapes and dtypes.
        **options: those of `jax.jit`.

    Returns:
        The compiled program, with `memory_analysis()`; it cannot be run.

    Raises:
        ModuleNotFoundError: without the device's plugin.
    """
    sharding = _sharding(name)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    platform = DEVICES[name].platform
    with compiling_for(platform, DEVICES[name].architecture):
        return jax.jit(fn, **options).trace(*placed).lower(lowering_platforms=(platform,)).compile()
