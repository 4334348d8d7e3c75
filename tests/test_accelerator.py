"""What an accelerator is given: the same values and gradients as a CPU, by larger blocks and by other ways through time.

Programs that are traced for a GPU run on the CPU here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import layers
from layers.core import machine
from layers.core.numerics import wide


def normal(*shapes, dtype=None):
    dtype = dtype or jnp.result_type(float)
    keys = jax.random.split(jax.random.key(3), len(shapes))
    return [jax.random.normal(k, s, dtype) / (s[0] ** 0.5 if i else 1) for i, (k, s) in enumerate(zip(keys, shapes, strict=True))]


def labels(rows, classes):
    return jax.random.randint(jax.random.key(4), (rows,), 0, classes)


def scan_arguments():
    u, delta, a, b, c = normal((1, 700, 3), (1, 700, 3), (3, 2), (1, 700, 2), (1, 700, 2))
    return u, jax.nn.softplus(delta), -jnp.exp(a), b, c


LAYERS = {
    "rms_norm": (layers.rms_norm, lambda: normal((1200, 128), (128,))),
    "layer_norm": (layers.layer_norm, lambda: normal((1200, 128), (128,), (128,))),
    "linear_cross_entropy": (lambda x, w: layers.linear_cross_entropy(x, w, labels(5000, 40), z_loss=0.1), lambda: normal((5000, 8), (8, 40))),
    "softmax_cross_entropy": (lambda a: layers.softmax_cross_entropy(a, labels(700, 500), label_smoothing=0.1), lambda: normal((700, 500))),
    "linear_jsd": (layers.linear_jsd, lambda: normal((2100, 4), (4, 30), (2100, 4), (4, 30))),
    "mlp": (layers.mlp, lambda: normal((5000, 4), (4, 600), (600, 3))),
    "gated_mlp": (layers.gated_mlp, lambda: normal((2300, 4), (4, 600), (4, 600), (600, 3))),
    "attention": (lambda q, k, v: layers.dot_product_attention(q, k, v, is_causal=True), lambda: normal(*[(1, 300, 2, 8)] * 3)),
    "linear_recurrence": (layers.linear_recurrence, lambda: normal((700, 3), (700, 3), (3,))),
    "linear_recurrence, complex": (lambda a, b: layers.linear_recurrence(a + 0.3j, b - 1j, axis=1).real, lambda: normal((2, 50), (2, 50))),
    "selective_scan": (layers.selective_scan, scan_arguments),
    "short_convolution": (
        lambda x, k, b: layers.short_convolution(x, k, b, activation="silu"),
        lambda: normal((2, 300, 3), (4, 3), (3,)),
    ),
    "gated_linear_attention": (
        lambda q, k, v, g: layers.gated_linear_attention(q, k, v, -jnp.abs(g)),
        lambda: normal((2, 300, 2, 4), (2, 300, 2, 4), (2, 300, 2, 3), (2, 300, 2, 4)),
    ),
}


@pytest.fixture
def on_a_gpu():
    with layers.compiling_for("cuda"):
        yield


def errors(got, exact):
    """The norm of each array's difference."""
    pairs = zip(*map(jax.tree.leaves, (got, exact)), strict=True)
    return [float(jnp.linalg.norm(x.astype(jnp.float32) - e.astype(jnp.float32))) for x, e in pairs]


def value_and_gradients(fn, args):
    def program(*args):
        out, pull = jax.vjp(fn, *args)
        cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).astype(jnp.bfloat16)  # the same numbers in every dtype
        return out, pull(cotangent.reshape(out.shape).astype(out.dtype))

    return jax.jit(program)(*args)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_a_cpu(name):
    fn, arguments = LAYERS[name]
    with jax.enable_x64(True):
        args = arguments()
        here = value_and_gradients(fn, args)
        with layers.compiling_for("cuda"):
            there = value_and_gradients(fn, args)
        for x, y in zip(jax.tree.leaves(here), jax.tree.leaves(there), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10 * float(abs(x).max()))


def loops(fn, args):
    return str(jax.make_jaxpr(lambda *a: value_and_gradients(fn, a))(*args)).count("scan[")


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "softmax_cross_entropy", "linear_recurrence"])
def test_there_is_no_loop(name):
    fn, arguments = LAYERS[name]
    args = arguments()
    assert loops(fn, args) > 0
    with layers.compiling_for("cuda"):
        assert loops(fn, args) == 0


def test_the_default_device_decides(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert machine.on_accelerator()
    with jax.default_device(jax.devices("cpu")[0]):
        assert not machine.on_accelerator()
    with jax.default_device("cpu"):
        assert not machine.on_accelerator()


def test_what_is_asked_for_goes_before_the_default_device():
    with layers.compiling_for("tpu"):
        assert machine.platform() == "tpu"
        with layers.compiling_for("cpu"):
            assert not machine.on_accelerator()
    assert machine.platform() == "cpu"
    with (
        pytest.raises(ValueError, match="compiling_for: platform is 'h100', but must be one of 'cpu', 'cuda', 'rocm', 'tpu'"),
        layers.compiling_for("h100"),
    ):
        pass


def test_architecture_is_that_of_the_default_device_unless_it_is_asked_for():
    assert machine.architecture() == jax.devices()[0].device_kind
    with layers.compiling_for("cuda"):
        assert machine.architecture() is None and machine.is_asked_for()
    with layers.compiling_for("cuda", "9.0"):
        assert machine.architecture() == "9.0"
    with jax.default_device("cpu"):
        assert machine.architecture() == jax.devices("cpu")[0].device_kind
    with pytest.raises(TypeError, match=r"compiling_for: architecture is 9\.0, but must be a text"), layers.compiling_for("cuda", 9.0):
        pass


def test_function_compiled_outside_is_traced_anew_inside():
    x, scale = normal((1200, 128), (128,))
    fn = jax.jit(jax.grad(lambda x: layers.rms_norm(x, scale).sum()))
    outside = fn.lower(x).as_text().count("while")
    with layers.compiling_for("cuda"):
        assert fn.lower(x).as_text().count("while") == 0 < outside


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_exported_program_has_the_blocks_of_its_platform(platform):
    x, scale = normal((1200, 128), (128,))
    with layers.compiling_for(platform):
        exported = jax.export.export(jax.jit(jax.grad(lambda x: layers.rms_norm(x, scale).sum())), platforms=[platform])(x)
    assert "while" not in exported.mlir_module()


def test_coefficients_whose_product_overflows_leave_a_state_of_zeros_alone(on_a_gpu):
    a, b = jnp.full((600,), 2.0), jnp.zeros(600).at[-2].set(1.0)

    @jax.jit
    def program(a, b, dh):
        h, pull = jax.vjp(layers.linear_recurrence, a, b)
        return h, pull(dh)[1]

    h, db = program(a, b, jnp.zeros(600).at[2].set(1.0))
    np.testing.assert_array_equal(h[-3:], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(db[:4], [4.0, 2.0, 1.0, 0.0])


@pytest.mark.parametrize("shape", [(0, 3), (1, 3)])
def test_short_recurrences(shape, on_a_gpu):
    a, b, start = jnp.full(shape, 0.5), jnp.ones(shape), jnp.ones(3)
    np.testing.assert_array_equal(layers.linear_recurrence(a, b, start), jnp.full(shape, 1.5))


@pytest.mark.parametrize("name", ["mlp", "gated_mlp"])
def test_errors_in_bfloat16_are_not_above_those_of_autodiff(name, on_a_gpu):
    fn = getattr(layers, name)
    shapes = (400, 32), *[(32, 300)] * (1 if name == "mlp" else 2), (300, 16)
    args = normal(*shapes, dtype=jnp.bfloat16)

    def plain(x, *kernels):
        *ups, down = kernels
        a = [x @ k for k in ups]
        return (jax.nn.gelu(a[0]) if len(a) == 1 else jax.nn.silu(a[0]) * a[1]) @ down

    with jax.enable_x64(True):
        exact = value_and_gradients(plain, [x.astype(jnp.float64) for x in args])
    ours, theirs = (value_and_gradients(f, args) for f in (lambda *a: fn(*a), plain))

    for mine, their in zip(errors(ours, exact), errors(theirs, exact), strict=True):
        assert mine <= 1.02 * their


def test_errors_of_a_bfloat16_convolution_are_not_above_those_of_plain_code(on_a_gpu):
    args = normal((2, 300, 16), (4, 16), dtype=jnp.bfloat16)

    def plain(x, kernel):
        steps = [jnp.pad(x, ((0, 0), (3 - i, 0), (0, 0)))[:, : x.shape[1]] for i in range(4)]
        return jax.nn.silu(sum(k * s for k, s in zip(kernel, steps, strict=True)))

    with jax.enable_x64(True):
        exact = value_and_gradients(plain, [x.astype(jnp.float64) for x in args])
    ours = value_and_gradients(lambda x, k: layers.short_convolution(x, k, activation="silu"), args)
    assert all(a <= b for a, b in zip(errors(ours, exact), errors(value_and_gradients(plain, args), exact), strict=True))


def test_tangents_of_a_convolution_are_those_of_a_cpu():
    x, kernel = normal((1, 9, 3), (4, 3))
    tangent = lambda x: jax.jvp(lambda x: layers.short_convolution(x, kernel, activation="silu"), (x,), (jnp.cos(x),))[1]
    with layers.compiling_for("cuda"):
        there = tangent(x)
    np.testing.assert_allclose(there, tangent(x), rtol=1e-5, atol=1e-6)


def mixture_divergence(q, p, beta=0.4):
    m = jnp.logaddexp(p + jnp.log(beta), q + jnp.log1p(-beta))
    return (beta * (jnp.exp(p) * (p - m)).sum(-1) + (1 - beta) * (jnp.exp(q) * (q - m)).sum(-1)).mean()


def preference(x, kernel, y):
    pairs = [(a.reshape(-1, 100, 64), b.reshape(-1, 100)) for a, b in zip(jnp.split(x, 2), jnp.split(y, 2), strict=True)]
    return layers.linear_dpo(pairs[0][0], pairs[1][0], kernel, pairs[0][1], pairs[1][1], loss_type="simpo")


def plain_preference(x, kernel, y):
    """The two halves by themselves, as the layer takes them: each rounds its gradient of the kernel."""

    def of(x, y):
        log_probs = jax.nn.log_softmax(plain_logits(x, kernel))
        return jnp.take_along_axis(log_probs, y[:, None], 1).reshape(-1, 100).mean(-1)

    chosen, rejected = (of(a, b) for a, b in zip(jnp.split(x, 2), jnp.split(y, 2), strict=True))
    return -jax.nn.log_sigmoid(0.1 * (chosen - rejected) - 0.5).mean()


def plain_logits(x, kernel):
    return (x @ kernel).astype(wide(x.dtype))


def log_softmaxes(x, kernel):
    """Those of a student, and of a teacher that sees other rows: a constant."""
    teacher = jax.lax.stop_gradient(plain_logits(jnp.flip(x, 0), kernel))
    return jax.nn.log_softmax(plain_logits(x, kernel)), jax.nn.log_softmax(teacher)


def plain_divergence(x, kernel, y):
    q, p = log_softmaxes(x, kernel)
    return (jnp.exp(p) * (p - q)).sum(-1).mean()


HEADS = {
    "linear_cross_entropy": (
        layers.linear_cross_entropy,
        lambda x, k, y: -jnp.take_along_axis(jax.nn.log_softmax(plain_logits(x, k)), y[:, None], 1).mean(),
    ),
    "linear_kl_divergence": (lambda x, k, y: layers.linear_kl_divergence(x, k, jnp.flip(x, 0), k), plain_divergence),
    "linear_jsd": (lambda x, k, y: layers.linear_jsd(x, k, jnp.flip(x, 0), k, beta=0.4), lambda x, k, y: mixture_divergence(*log_softmaxes(x, k))),
    "linear_dpo": (preference, plain_preference),
}


@pytest.mark.parametrize("name", HEADS)
def test_errors_of_a_bfloat16_head_are_not_above_those_of_plain_code(name, on_a_gpu):
    """Plain code's logits are of bfloat16, too; of the loss the rounding of its sum in float32 is left. No probability is that of many labels."""
    x, kernel = normal((2200, 64), (64, 500), dtype=jnp.bfloat16)
    x = 3 * x
    y = labels(2200, 500)
    ours, plain = (lambda x, k, f=f: f(x, k, y) for f in HEADS[name])
    with jax.enable_x64(True):
        exact = value_and_gradients(plain, [a.astype(jnp.float64) for a in (x, kernel)])
    (loss, *mine), (_, *theirs) = (errors(value_and_gradients(f, (x, kernel)), exact) for f in (ours, plain))
    assert loss <= 1e-6 * abs(float(exact[0]))
    assert all(a <= 1.02 * b for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_logits_of_a_head_are_one_product_and_never_float32(name, on_a_gpu):
    """What is written of a block is of 16 bits: the product gives it, and what follows is elementwise."""
    x, kernel = normal((2200, 64), (64, 500), dtype=jnp.bfloat16)
    y = labels(2200, 500)
    text = str(jax.make_jaxpr(jax.grad(HEADS[name][0], (0, 1)))(x, kernel, y))
    products = [line for line in text.splitlines() if "dot_general" in line and ",500]" in line.split("=")[0]]
    logits = [line for line in products if "[64,500]" not in line.split("=")[0]]
    assert logits and all(":bf16[" in line for line in logits)
