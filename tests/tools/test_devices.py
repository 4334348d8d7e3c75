"""Programs for an H100 and a TPU that are not here: each layer compiles, rows keep their memory. They run where the compilers are, as in CI."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.checking.contract import catalogue
from layers.core.trees import replaced
from layers.tools import bench_devices, devices, goals_table, kernel_registers, readme
from layers.tools.llama_step import WAYS, make_step

SMALL = {"vocab": 64, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 24, "batch": 2, "time": 8}


def compiler(name):
    return pytest.param(name, marks=pytest.mark.skipif(not devices.available(name), reason="its compiler is not installed: the extra 'aot'"))


DEVICES = [compiler(name) for name in devices.DEVICES]


def test_device_without_its_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    devices._sharding.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"compiling for the NVIDIA H100 takes the package jax_cuda13_plugin: pip install .*\[aot\]"):
        devices.compile_for("h100", jnp.sin, (jnp.ones(3),))
    devices._sharding.cache_clear()


def test_unknown_row_is_an_error():
    with pytest.raises(ValueError, match="no row is named 'nothing'"):
        bench_devices.main(["nothing"], "h100")


def test_committed_figures_have_every_row_of_every_device():
    results = json.loads(bench_devices.RESULTS.read_text())
    assert set(results) == set(devices.DEVICES)
    assert all(set(rows) == set(bench_devices.names()) for rows in results.values())
    assert (
        readme.devices_table().count("\n| ") + goals_table.table().count("\n| ") == len(bench_devices.names()) + 2
    )  # the step stands in one and, two ways, in the other
    assert all(bench_devices.BY_KERNEL in rows[bench_devices.STEP] for rows in results.values())


def test_both_ways_of_the_step_compute_the_same_loss():
    losses = []
    for way in WAYS:
        step, shapes = make_step(way, SMALL)
        params = jax.tree.map(drawn_by_shape, shapes[0])
        moments = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1])
        tokens = jax.random.randint(jax.random.key(1), shapes[2].shape, 0, SMALL["vocab"])
        losses.append(jax.jit(step)(params, moments, tokens)[2])
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)


def drawn_by_shape(x):
    """A normal parameter, the same for one of this shape whatever the module that holds it is called."""
    return 0.1 * jax.random.normal(jax.random.key(sum(x.shape)), x.shape, x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layer", catalogue(), ids=lambda c: c.__name__)
def test_layer_compiles_forward_and_backward(device, layer):
    args = layer.example(jax.random.key(0), jnp.bfloat16)
    leaves, tree = jax.tree.flatten(args)
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
    differentiated = [i for i in arrays if jnp.issubdtype(leaves[i].dtype, jnp.floating)]

    def gradient(*given):
        def loss(*moved):
            now = replaced(replaced(leaves, arrays, given), differentiated, moved)
            outputs = jax.tree.leaves(layer.apply(*tree.unflatten(now)))
            return sum(y.astype(jnp.float32).sum() for y in outputs if jnp.issubdtype(y.dtype, jnp.floating))

        return jax.grad(loss, tuple(range(len(differentiated))))(*[given[arrays.index(i)] for i in differentiated])

    assert devices.compile_for(device, gradient, tuple(leaves[i] for i in arrays)).memory_analysis() is not None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["attention", "stack_mlp_scanned", "linear_cross_entropy", "lstm", "short_convolution", bench_devices.STEP])
def test_memory_of_a_row_is_at_most_the_committed_figure(device, name):
    committed = json.loads(bench_devices.RESULTS.read_text())[device][name]["ours"]
    assert bench_devices.temp_bytes(name, device, ("ours",))["ours"] <= 1.02 * committed


@pytest.mark.parametrize("device", DEVICES)
def test_step_with_attention_by_a_kernel_keeps_its_memory(device):
    committed = json.loads(bench_devices.RESULTS.read_text())[device][bench_devices.STEP][bench_devices.BY_KERNEL]
    found = bench_devices.temp_bytes(bench_devices.STEP, device, (bench_devices.BY_KERNEL,))
    assert found[bench_devices.BY_KERNEL] <= 1.02 * committed


def test_step_on_one_gpu_takes_less_with_attention_by_a_kernel():
    step = json.loads(bench_devices.RESULTS.read_text())["h100"][bench_devices.STEP]
    assert step[bench_devices.BY_KERNEL] < step["ours"] and step[bench_devices.BY_KERNEL] <= 5.8e9


def test_step_on_one_gpu_takes_a_seventh_of_the_memory_of_the_plain_one():
    rows = json.loads(bench_devices.RESULTS.read_text())["h100"][bench_devices.STEP]
    assert rows["ours"] <= min(6.2e9, rows["idiomatic"] / 7)


@pytest.mark.parametrize("device", DEVICES)
def test_command_needs_no_setting_of_the_environment(device):
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "layers", "bench", "relu", "--compile-for", device]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "relu: idiomatic" in ran.stdout, ran.stderr


def scan_shapes():
    rows, states = (jax.ShapeDtypeStruct((2, 256, n), jnp.bfloat16) for n in (128, 16))
    return rows, rows, jax.ShapeDtypeStruct((128, 16), jnp.bfloat16), states, states


BY_MOSAIC = {
    "softmax_cross_entropy": (
        lambda z: layers.softmax_cross_entropy(z, jnp.zeros(64, int), implementation="mosaic"),
        lambda: (jax.ShapeDtypeStruct((64, 32001), jnp.bfloat16),),
        1 << 16,
    ),
    "selective_scan": (
        lambda u, delta, *rest: layers.selective_scan(u, delta, *rest, delta_softplus=True, implementation="mosaic"),
        scan_shapes,
        1 << 21,
    ),
}


@pytest.mark.parametrize("device", [compiler("h100")])
@pytest.mark.parametrize("name", BY_MOSAIC)
def test_layer_by_its_own_kernel_compiles_forward_and_backward_in_little_memory(device, name):
    fn, shapes, most = BY_MOSAIC[name]
    args = shapes()
    compiled = devices.compile_for(device, jax.value_and_grad(lambda *a: fn(*a).astype(jnp.float32).sum(), tuple(range(len(args)))), args)
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 2
    assert compiled.memory_analysis().temp_size_in_bytes <= most


def test_committed_registers_are_of_every_kernel_and_none_spills():
    found = json.loads(kernel_registers.RESULTS.read_text())
    assert set(found) == {"jax", *kernel_registers.calls()}
    assert all(figures["spilled"] == 0 for name, figures in found.items() if name != "jax")


@pytest.mark.parametrize("device", [compiler("h100")])
def test_registers_are_those_that_the_assembler_says(device, tmp_path):
    path = tmp_path / "found.json"
    ran = subprocess.run([sys.executable, "-m", "layers.tools.kernel_registers", str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(path.read_text())
    assert all(figures["spilled"] == 0 and 16 <= figures["registers"] <= 255 for name, figures in found.items() if name != "jax")
