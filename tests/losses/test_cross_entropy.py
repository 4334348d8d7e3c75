"""Values and gradients of both cross entropies against plain code in float64, memory, precision, edge cases, errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.losses import head
from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from tests.losses import reference
from tests.support import assert_trees_close, draw_normal, jit_grad, jit_value_and_grad, saved_bytes, temp_bytes, torch_reference

BATCH, FEATURES, VOCAB = (3, 5), 4, 7
LABELS = jnp.array([[2, 6, -100, 2, 0], [1, 1, 5, -100, 6], [0, 3, 4, 2, 2]])
WEIGHTS = jnp.array([0.5, 2.0, 1.0, 0.0, 3.0, 1.5, 0.7])
EVERYTHING = {"label_smoothing": 0.1, "z_loss": 0.05, "logit_soft_cap": 2.0, "class_weights": WEIGHTS}


def draw(seed, *shape, dtype=jnp.float64):
    return draw_normal(seed, shape, dtype)


def arguments(batch=BATCH, features=FEATURES, vocab=VOCAB, dtype=jnp.float64):
    return draw(1, *batch, features, dtype=dtype), draw(2, features, vocab, dtype=dtype), draw(3, vocab, dtype=dtype)


def linear(x, kernel, bias, labels, **options):
    return linear_cross_entropy(x, kernel, labels, bias, **options)


def softmax(x, kernel, bias, labels, **options):
    return softmax_cross_entropy(x @ kernel + bias, labels, **options)


def plain(x, kernel, bias, labels, **options):
    return reference.cross_entropy(x @ kernel + bias, labels, **options)


LOSSES = {"linear": linear, "softmax": softmax}
EVERY = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def results(loss, labels, args, *, compile_by=reference.jit_quickly, **options):
    """The outputs, and the gradients of all floating-point arguments from different gradients of every output."""
    differentiated = (*args, labels) if jnp.issubdtype(labels.dtype, jnp.floating) else args

    def run(*differentiated):
        call = lambda *m: loss(*m[:3], m[3] if len(m) > 3 else labels, **options)
        outputs, pull = jax.vjp(call, *differentiated)
        return outputs, pull(jax.tree.map(lambda y: jnp.cos(jnp.arange(y.size, dtype=y.dtype) + 0.3).reshape(y.shape), outputs))

    return compile_by(run)(*differentiated)


# Values and gradients


ALL_OUTPUTS = {"return_logsumexp": True, "return_accuracy": True}
CASES = {
    "linear mean": (linear, {}),
    "linear mean, all options": (linear, EVERYTHING | {"return_accuracy": True}),
    "linear sum, another ignored label": (linear, {"label_smoothing": 0.3, "reduction": "sum", "ignore_index": 2, "class_weights": WEIGHTS}),
    "linear none, all options": (linear, EVERYTHING | ALL_OUTPUTS | {"reduction": "none"}),
    "linear mean, logsumexp": (linear, EVERYTHING | {"return_logsumexp": True}),
    "softmax mean, all options": (softmax, EVERYTHING | ALL_OUTPUTS),
    "softmax none": (softmax, {"reduction": "none"}),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_plain_code_in_float64(name):
    loss, options = CASES[name]
    labels = jnp.where(LABELS == -100, 0, LABELS) if "ignore_index" in options else LABELS
    with jax.enable_x64(True):
        args = arguments()
        ours, theirs = results(loss, labels, args, **options, block_size=4), results(plain, labels, args, **options)
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("loss", "options"),
    [(linear, {}), (linear, EVERYTHING | {"reduction": "none"}), (softmax, EVERYTHING | ALL_OUTPUTS)],
    ids=["mean", "none", "logits"],
)
def test_distributions_as_labels_are_right_and_have_a_gradient(loss, options):
    with jax.enable_x64(True):
        args, labels = arguments(), jax.nn.softmax(draw(4, *BATCH, VOCAB))
        ours, theirs = results(loss, labels, args, **options, block_size=4), results(plain, labels, args, **options)
        assert_trees_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ["cross_entropy", "cross_entropy, mean", "cross_entropy, none", "cross_entropy, distributions"])
def test_losses_are_those_of_torch(case):
    r = torch_reference(case)
    options = {"class_weights" if k == "weight" else k: v for k, v in r.items() if k in ("label_smoothing", "weight", "reduction")}
    with jax.enable_x64(True):
        loss, pull = jax.vjp(lambda a: softmax_cross_entropy(a, r["labels"], **options), r["logits"])
        np.testing.assert_allclose(loss, r["loss"], rtol=1e-10)
        np.testing.assert_allclose(pull(jnp.cos(loss))[0], r["d_logits"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("loss", "reduction"), [(linear, "mean"), (linear, "none"), (softmax, "none")])
def test_forward_mode_and_second_derivatives_are_those_of_plain_code(loss, reduction):
    options = {"label_smoothing": 0.1, "z_loss": 0.05, "logit_soft_cap": 2.0, "reduction": reduction}
    with jax.enable_x64(True):
        args = arguments((5,))
        tangents = tuple(jnp.cos(3 * a) for a in args)

        def both(loss, **more):
            scalar = lambda *a: jnp.sin(3 * loss(*a, LABELS[0], **options, **more)).sum()
            gradient = jit_grad(scalar, (0, 1, 2))
            inner = lambda *a: sum((g * t).sum() for g, t in zip(gradient(*a), tangents, strict=True))
            return reference.jit_quickly(
                lambda *a: (jax.jvp(scalar, a, tangents)[1], jax.jvp(gradient, a, tangents)[1], jax.grad(inner, (0, 1, 2))(*a))
            )(*args)

        assert_trees_close(both(loss, block_size=2), both(plain), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("rows", "vocab", "block_size"), [(1, 11, None), (3, 1, 1), (11, 11, 4), (12, 8, 4)])
def test_any_number_of_rows_and_classes_fits_any_block(rows, vocab, block_size, monkeypatch):
    monkeypatch.setattr(head, "SLICE_BYTES", 4 * 4 * FEATURES)
    monkeypatch.setattr(head, "GROUP_BYTES", 2 * 4 * vocab)
    with jax.enable_x64(True):
        args, labels = arguments((rows,), vocab=vocab), jnp.arange(rows) % vocab
        ours = results(linear, labels, args, block_size=block_size)
        assert_trees_close(ours, results(plain, labels, args), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", ["x", "kernel"])
def test_gradient_of_what_is_frozen_is_not_computed(frozen):
    x, kernel, _ = arguments((64,), 32, 128, dtype=jnp.float32)
    labels = jnp.arange(64)
    loss = lambda x, k: linear_cross_entropy(x, k, labels, block_size=64)
    argument = 1 if frozen == "x" else 0
    flops = jax.jit(jax.grad(loss, argument)).lower(x, kernel).compile().cost_analysis()["flops"]
    whole = jax.jit(jax.grad(loss, (0, 1))).lower(x, kernel).compile().cost_analysis()["flops"]
    alone = jax.jit(loss).lower(x, kernel).compile().cost_analysis()["flops"]
    product = 2 * 64 * 32 * 128
    assert alone < 1.5 * product < 2 * product <= flops < 2.5 * product < 3 * product <= whole < 3.5 * product


@pytest.mark.parametrize(
    ("options", "products"), [({}, 3), ({"reduction": "sum"}, 3), ({"reduction": "none"}, 4), ({"return_logsumexp": True}, 4)], ids=str
)
def test_gradients_of_one_number_take_three_products_of_matrices(options, products):
    x, kernel, _ = arguments((64,), 32, 128, dtype=jnp.float32)

    def program(x, kernel):
        outputs, pull = jax.vjp(lambda x, k: linear_cross_entropy(x, k, jnp.arange(64), block_size=16, **options), x, kernel)
        return pull(jax.tree.map(jnp.ones_like, outputs))

    assert str(jax.make_jaxpr(program)(x, kernel)).count("dot_general[") == products


# Memory and precision


def optax_style(x, kernel, labels):
    logits = x @ kernel
    return (jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]).mean()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("shape", "share"), [((4096, 512, 32000), 0.10), ((2048, 1024, 128000), 0.03)], ids=["32k", "128k"])
def test_logits_are_never_whole_in_memory(shape, share, reduction):
    rows, features, vocab = shape
    args = (jax.ShapeDtypeStruct(s, d) for s, d in (((rows, features), jnp.float32), ((features, vocab), jnp.float32), ((rows,), jnp.int32)))
    x, kernel, labels = args
    ours = lambda x, k, y: linear_cross_entropy(x, k, y, reduction=reduction).mean()
    programs = [jit_value_and_grad(f, (0, 1)) for f in (ours, optax_style)]
    ours, theirs = (temp_bytes(p, x, kernel, labels) for p in programs)
    assert ours <= share * theirs
    if reduction == "none":
        assert saved_bytes(lambda x, k: linear_cross_entropy(x, k, jnp.zeros(rows, jnp.int32), reduction="none"), x, kernel) <= 4 * 4 * rows


def test_softmax_cross_entropy_keeps_two_numbers_a_row_and_its_gradient():
    logits, labels = jax.ShapeDtypeStruct((4096, 8192), jnp.bfloat16), jnp.zeros(4096, jnp.int32)
    loss = partial(softmax_cross_entropy, labels=labels, label_smoothing=0.1)
    assert saved_bytes(loss, logits) <= 4 * 4 * 4096
    assert temp_bytes(jax.value_and_grad(loss), logits) <= 0.5 * 2 * logits.size


@pytest.mark.parametrize(("reduction", "dtype", "vocab"), [("mean", jnp.float32, 20000), ("mean", jnp.bfloat16, 1000), ("none", jnp.bfloat16, 1000)])
def test_error_against_float64_is_not_above_that_of_autodiff(reduction, dtype, vocab):
    """Of the gradients: how close the rounded sum over rows comes is chance, so that the loss is held to a few roundings."""
    args = [(a * scale).astype(dtype) for a, scale in zip(arguments((128,), 64, vocab, dtype=jnp.float32), (2, 0.3, 1), strict=True)]
    labels = jnp.arange(128) * 37 % vocab
    with jax.enable_x64(True):
        run = lambda f, args: jax.tree.leaves(results(f, labels, args, compile_by=jax.jit, reduction=reduction))
        exact = run(plain, tuple(a.astype(jnp.float64) for a in args))
        ours, theirs = ([relative_error(a, e) for a, e in zip(run(f, args), exact, strict=True)] for f in (partial(linear, block_size=32), plain))
    assert ours[0] <= max(theirs[0], 4 * float(jnp.finfo(jnp.float32).eps))
    assert all(a <= 1.01 * b for a, b in zip(ours[1:], theirs[1:], strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_error_of_the_gradient_of_logits_is_not_above_that_of_autodiff(dtype):
    logits, labels = (3 * draw(1, 64, 3000, dtype=jnp.float32)).astype(dtype), jnp.arange(64)
    with jax.enable_x64(True):
        exact = jit_grad(reference.cross_entropy)(logits.astype(jnp.float64), labels)
        ours, theirs = (relative_error(jax.jit(jax.grad(f))(logits, labels), exact) for f in (softmax_cross_entropy, reference.cross_entropy))
    assert ours <= 1.01 * theirs


def relative_error(actual, expected):
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def test_bfloat16_gets_a_wide_loss_and_narrow_gradients():
    args = arguments(dtype=jnp.bfloat16)
    value, gradients = results(linear, LABELS, args)
    assert value.dtype == jnp.float32
    assert {g.dtype for g in gradients} == {jnp.dtype(jnp.bfloat16)}


# Edge cases


@pytest.mark.parametrize("case", ["empty batch", "all ignored", "no weight"])
@pytest.mark.parametrize(("loss", "reduction"), [(linear, "mean"), (linear, "none"), (softmax, "mean")])
def test_nothing_that_counts_gives_zero_and_zero_gradients(loss, case, reduction):
    batch = (0,) if case == "empty batch" else (5,)
    labels = jnp.full(batch, -100 if case == "all ignored" else 3)
    options = {"class_weights": WEIGHTS} if case == "no weight" else {}
    value, gradients = results(loss, labels, arguments(batch, dtype=jnp.float32), reduction=reduction, return_accuracy=True, **options)
    for y in jax.tree.leaves((value[0], gradients)):
        np.testing.assert_array_equal(y, jnp.zeros_like(y))


@EVERY
def test_label_that_is_no_class_gives_nan_and_no_wrong_number(loss):
    labels = jnp.array([2, -1, VOCAB, 10**6, 0])
    value, gradients = results(loss, labels, arguments((5,), dtype=jnp.float32), reduction="none")
    np.testing.assert_array_equal(jnp.isnan(value), [False, True, True, True, False])
    np.testing.assert_array_equal(jnp.isnan(gradients[0]).all(-1), jnp.isnan(value))
    assert jnp.isnan(loss(*arguments((5,), dtype=jnp.float32), labels))


@pytest.mark.parametrize("size", [1e4, 1e30])
@EVERY
def test_huge_logits_have_exact_losses_and_finite_gradients(loss, size):
    x, kernel = jnp.full((2, 1), size), jnp.array([[1.0, 0.5, -1.0]])
    value, gradients = results(loss, jnp.array([0, 1]), (x, kernel, jnp.zeros(3)), reduction="none")
    np.testing.assert_allclose(value, [0, size / 2], rtol=1e-6)
    assert all(jnp.isfinite(g).all() for g in gradients)


INF = jnp.inf
ROWS = {
    "a class is impossible": ([0.0, -INF, 0.0], 0, np.log(2), [-0.5, 0, 0.5]),
    "an impossible label": ([0.0, -INF, 0.0], 1, INF, [0.5, -1, 0.5]),
    "certain": ([0.0, INF, 3.0], 1, 0.0, [0, 0, 0]),
    "certain and wrong": ([0.0, INF, 3.0], 0, INF, [-1, 1, 0]),
    "two are infinite": ([INF, INF, -INF], 0, np.log(2), [-0.5, 0.5, 0]),
    "nothing is possible": ([-INF, -INF, -INF], 0, np.log(3), [-2 / 3, 1 / 3, 1 / 3]),
}


@pytest.mark.parametrize("name", ROWS)
def test_infinite_logits_give_the_limit_and_finite_gradients(name):
    logits, label, value, gradient = ROWS[name]
    found = jit_value_and_grad(softmax_cross_entropy)(jnp.array([logits]), jnp.array([label]))
    np.testing.assert_allclose(found[0], value, rtol=1e-6)
    np.testing.assert_allclose(found[1], [gradient], rtol=1e-6)


def test_weight_of_zero_outweighs_an_infinite_loss():
    logits = jnp.array([[0.0, -INF, 1.0]])
    for options in ({"class_weights": jnp.array([1.0, 0.0, 1.0]), "label_smoothing": 0.1}, {"ignore_index": 1}):
        value, gradient = jit_value_and_grad(partial(softmax_cross_entropy, reduction="sum", **options))(logits, jnp.array([1]))
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


@EVERY
def test_zero_rows_are_uniform(loss):
    args = (jnp.zeros((3, FEATURES)), arguments(dtype=jnp.float32)[1], jnp.zeros(VOCAB))
    value, gradients = results(loss, jnp.array([0, 1, 1]), args)
    np.testing.assert_allclose(value, np.log(VOCAB), rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], jnp.zeros((FEATURES, VOCAB)))


def test_one_row_without_a_batch_axis():
    with jax.enable_x64(True):
        args = arguments(())
        assert_trees_close(results(linear, jnp.array(3), args), results(plain, jnp.array(3), args), rtol=1e-10, atol=1e-12)


def test_class_weights_are_constants():
    gradient = jit_grad(lambda w: softmax_cross_entropy(draw(1, 15, VOCAB, dtype=jnp.float32), LABELS.reshape(-1), class_weights=w))(WEIGHTS)
    np.testing.assert_array_equal(gradient, jnp.zeros(VOCAB))


# Devices


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    ("loss", "options"), [(linear, {"reduction": "sum"}), (linear, {"reduction": "none", "z_loss": 0.1}), (softmax, {"reduction": "sum"})]
)
def test_data_parallel_devices_give_the_gradients_of_one(loss, options):
    args, labels = arguments((8, 3), dtype=jnp.float32), jnp.arange(24).reshape(8, 3) % VOCAB
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    specs = (P("data"), P(), P(), P("data"))
    local = lambda *a: jax.lax.psum(loss(*a, block_size=4, **options).sum(), "data")
    shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    one = jit_value_and_grad(lambda *a: loss(*a, labels, **options).sum(), (0, 1, 2))
    assert_trees_close(jax.jit(jax.value_and_grad(lambda *a: shared(*a, labels), (0, 1, 2)))(*args), one(*args), rtol=1e-5, atol=1e-6)
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((*args, labels), specs, strict=True)]
    program = jax.jit(jax.value_and_grad(lambda *a: loss(*a, block_size=4, **options).sum(), (0, 1, 2)))
    assert_trees_close(program(*placed), one(*args), rtol=1e-5, atol=1e-6)


# Errors


X, KERNEL, Y = jnp.ones((3, FEATURES)), jnp.ones((FEATURES, VOCAB)), jnp.zeros(3, jnp.int32)
WRONG = {
    "kernel transposed": (lambda: linear_cross_entropy(X, KERNEL.T, Y), ValueError, "transpose it, kernel.T"),
    "kernel without classes": (lambda: linear_cross_entropy(X, KERNEL[:, :0], Y), ValueError, "at least one class"),
    "bias of another size": (lambda: linear_cross_entropy(X, KERNEL, Y, jnp.ones(3)), ValueError, r"bias has shape \(3,\)"),
    "labels of another shape": (
        lambda: linear_cross_entropy(X, KERNEL, Y[:2]),
        ValueError,
        r"labels has shape \(2,\), but must be \(\*batch\) = \(3,\)",
    ),
    "labels as floats": (lambda: softmax_cross_entropy(X, Y.astype(float)), ValueError, r"distributions \(\*batch, vocab\).*= \(3, 4\)"),
    "labels as bools": (lambda: softmax_cross_entropy(X, Y == 0), TypeError, "labels is of dtype bool"),
    "integer logits": (lambda: softmax_cross_entropy(Y[:, None], Y), TypeError, "logits is of dtype int32"),
    "integer x": (lambda: linear_cross_entropy(X.astype(int), KERNEL, Y), TypeError, "x is of dtype int32"),
    "scalar logits": (lambda: softmax_cross_entropy(1.0, Y), ValueError, "at least one class"),
    "unknown reduction": (lambda: linear_cross_entropy(X, KERNEL, Y, reduction="batchmean"), ValueError, "one of 'mean', 'sum', 'none'"),
    "smoothing above one": (lambda: linear_cross_entropy(X, KERNEL, Y, label_smoothing=1.1), ValueError, r"must be a number in \[0, 1\]"),
    "negative z-loss": (lambda: linear_cross_entropy(X, KERNEL, Y, z_loss=-1.0), ValueError, "z_loss is -1.0, but must be a number of at least 0"),
    "cap of zero": (lambda: linear_cross_entropy(X, KERNEL, Y, logit_soft_cap=0.0), ValueError, "must be a number above 0"),
    "weights of another size": (lambda: linear_cross_entropy(X, KERNEL, Y, class_weights=jnp.ones(3)), ValueError, r"\(vocab,\) = \(7,\)"),
    "empty block": (
        lambda: linear_cross_entropy(X, KERNEL, Y, block_size=0),
        ValueError,
        "block_size is 0, but must be a whole number of at least 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_argument_is_named_with_what_must_hold(name):
    call, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        call()
