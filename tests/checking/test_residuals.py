"""The audit names every array that backward keeps, with its bytes, layer and line, and agrees with XLA."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

from layers.checking import audit
from layers.checking.residuals import residuals
from layers.function.function import Function

X = jnp.linspace(-1.0, 1.0, 32).reshape(4, 8)
W = jnp.linspace(0.0, 1.0, 64).reshape(8, 8)


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, jnp.sin(x))
        return x * x

    @staticmethod
    def backward(ctx, dy):
        x, _ = ctx.saved_tensors
        return 2 * x * dy


def looped(x, w):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=5)[0]


def xla_residual_bytes(fn, *args):
    """What XLA's own count of the outputs of `jax.vjp` leaves for the residuals."""
    compiled = jax.jit(lambda *a: jax.vjp(fn, *a)).lower(*args).compile()
    outputs = jax.tree.leaves(jax.eval_shape(fn, *args))
    pointers = 8 * len(jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(fn, *a), *args)))
    return compiled.memory_analysis().output_size_in_bytes - pointers - sum(o.size * o.dtype.itemsize for o in outputs)


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda m, x: m(x), (Model(nnx.Rngs(0)), X)),
        (looped, (X, W)),
        (jax.checkpoint(looped), (X, W)),
        (lambda x: Square.apply(jnp.cos(x)), (X,)),
    ],
    ids=["nnx", "scan", "remat", "custom rule"],
)
def test_total_agrees_with_xla(fn, args):
    assert residuals(fn, *args).total == xla_residual_bytes(fn, *args)


def test_layers_are_the_paths_of_nnx_modules():
    layers_of = residuals(Model(nnx.Rngs(0)), X).by_layer()
    assert {"Model/blocks.0/norm", "Model/blocks.1/up"} <= set(layers_of)


def test_layers_are_the_names_of_linen_modules():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.gelu(linen.Dense(8, name="first")(x))

    net = Net()
    params = net.init(jax.random.key(0), X)
    assert any("first" in r.layer for r in residuals(net.apply, params, X).rows if r.kind == "extra")


def test_arguments_are_named_and_not_extra():
    report = residuals(lambda p, x: jnp.sin(x @ p["w"]), {"w": W}, X)
    assert {r.layer for r in report.rows if r.kind == "argument"} == {"args[0]['w']", "args[1]"}
    assert report.extra == X.nbytes


def test_source_line_is_the_users():
    row = next(r for r in residuals(lambda x: jnp.sin(x * 2), X).rows if r.kind == "extra")
    assert row.source.startswith("test_residuals.py:")


def test_stacked_residuals_of_a_scan_say_how_often():
    assert {r.repeats for r in residuals(looped, X, W).rows if r.operation != "scan" and r.kind == "extra"} == {(5,)}


def test_remat_keeps_only_arguments():
    assert residuals(jax.checkpoint(looped), X, W).extra == 0


def test_custom_rule_shows_what_it_saves_and_never_reads():
    row = next(r for r in residuals(lambda x: Square.apply(x), X).rows if r.kind == "extra")
    assert row.name == "Square.saved1"
    assert row.bytes == X.nbytes
    assert not row.used


def test_frozen_arguments_are_left_out_by_wrt():
    f = lambda x, w: jnp.sum(x @ w)
    assert {r.layer for r in residuals(f, X, W, wrt=0).rows} == {"args[1]"}


def test_nothing_to_differentiate_is_an_error():
    with pytest.raises(TypeError, match="floating-point"):
        residuals(lambda i: i, jnp.arange(3))


def test_prints_and_shows_in_a_notebook_and_plots():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    report = residuals(Model(nnx.Rngs(0)), X)
    assert "blocks.0" in str(report)
    assert "<table>" in report._repr_html_()
    assert len(report.plot().patches) == len(report.by_layer())


def test_compare_gives_the_ratio_of_what_is_extra():
    comparison = residuals(looped, X, W).compare(jax.checkpoint(looped), X, W)
    assert comparison.ratio == 0
    assert "0 of the first" in " ".join(str(comparison).split())


def test_compare_without_arguments_takes_those_of_the_audit():
    assert residuals(looped, X, W, wrt=1).compare(jax.checkpoint(looped)).second.rows == residuals(jax.checkpoint(looped), X, W, wrt=1).rows


def test_compare_puts_another_module_in_the_place_of_the_first():
    comparison = residuals(Model(nnx.Rngs(0)), X, wrt=-1).compare(Block(nnx.Rngs(0)))
    assert comparison.second.rows == residuals(Block(nnx.Rngs(0)), X, wrt=1).rows


def test_compare_gives_a_function_the_arguments_of_the_module():
    assert residuals(Model(nnx.Rngs(0)), X, wrt=(0, 1)).compare(jnp.sin).second.extra == X.nbytes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, "abc"), r"residuals: args\[1\] is 'abc', but must be an array or a number"),
        (({"x": object()},), r"residuals: args\[0\]\['x'\] is an object"),
    ],
)
def test_argument_that_is_no_array_is_named(args, message):
    with pytest.raises(TypeError, match=message):
        residuals(lambda *a: a[0], *args)


@pytest.mark.parametrize("wrt", [2, -3, (0, 5)], ids=str)
def test_wrt_out_of_range_is_an_error(wrt):
    with pytest.raises(ValueError, match="it must lie from -2 to 1"):
        residuals(looped, X, W, wrt=wrt)


def test_negative_wrt_counts_from_the_end():
    assert residuals(looped, X, W, wrt=-1).rows == residuals(looped, X, W, wrt=1).rows


def activated(x, w, labels):
    x = jax.nn.silu(x @ w)
    x = jnp.where(x > 0.1, x, 0.5 * x)
    return jnp.sum(jax.nn.one_hot(labels, 8) * jax.nn.log_softmax(x))


def test_what_jitted_functions_of_jax_make_has_the_line_that_calls_them():
    jax.jit(jax.nn.silu)(X)  # traced before, at another line
    first = activated.__code__.co_firstlineno
    rows = [r for r in residuals(activated, X, W, jnp.arange(4), wrt=0).rows if r.kind == "extra"]
    assert rows and all(r.source.startswith("test_residuals.py:") and r.source.endswith("(activated)") for r in rows)
    found = {r.operation.partition(" in ")[2]: int(r.source.split(":")[1].split()[0]) - first for r in rows if " in " in r.operation}
    assert {"silu": 1, "one_hot": 3}.items() <= found.items()
    assert found.items() <= {"silu": 1, "where": 2, "one_hot": 3, "log_softmax": 3}.items()


def test_table_has_the_sum_of_each_layer_above_its_arrays():
    report = residuals(Model(nnx.Rngs(0)), X)
    cells = report._cells()
    sums = [c for c in cells if c[2].endswith(" arrays")]
    assert [c[3] for c in sums] == [layer for layer in report.by_layer() if len(report.of_layer(layer)) > 1]
    assert len(cells) == len(sums) + len(report.rows)


def test_summary_says_what_each_way_would_keep(monkeypatch):
    monkeypatch.setattr(audit, "WAYS", {"jax.checkpoint(fn)": lambda fn, args: (fn, args, jax.checkpoint), "nothing(fn)": lambda *_: None})
    report = residuals(looped, X, W)
    assert list(report.with_ways) == ["jax.checkpoint(fn)"]
    assert "jax.checkpoint(fn) would keep 0 B extra" in " ".join(str(report).split())


def test_swap_is_a_way_where_a_model_has_layers_to_swap():
    model = nnx.Sequential(nnx.LayerNorm(8, rngs=nnx.Rngs(0)), jnp.sin)
    report = residuals(lambda m, x: m(x), model, X)
    assert report.with_ways["layers.swap(model)"].extra < report.extra
    assert type(model.layers[0]) is nnx.LayerNorm
    assert "layers.swap(model)" not in residuals(looped, X, W).with_ways
