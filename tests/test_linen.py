"""The Linen modules hold the parameters and give the values of the nnx modules that they are derived from."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors as nn_errors
from flax import linen as nn
from flax import nnx

import layers
import layers.linen
from tests.support import assert_trees_close, temp_bytes

X = jnp.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)

CASES = {"Linear": ((4, 5), {}, X)}


@pytest.mark.parametrize("name", CASES)
def test_linen_module_is_the_nnx_module(name):
    args, options, x = CASES[name]
    module = getattr(layers.linen, name)(*args, **options)
    variables = module.init(jax.random.key(0), x)
    twin = getattr(layers, name)(*args, **options, rngs=nnx.Rngs(0))
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(twin, nnx.Param))}
    flat = {"/".join(k.key for k in path): v for path, v in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert set(flat) == names
    state = nnx.state(twin, nnx.Param)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = flat["/".join(map(str, path))]
    nnx.update(twin, state)
    np.testing.assert_allclose(module.apply(variables, x), twin(x), rtol=1e-5, atol=1e-6)


def test_trains_inside_a_linen_model():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.linen.Linear(5, 1, name="head")(layers.linen.LayerNorm()(nn.tanh(layers.linen.Linear(4, 5)(x))))

    net = Net()
    variables = net.init(jax.random.key(0), X)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(net.apply(v, X) ** 2)))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["params"]["head"]["kernel"]).max()) > 0


class _Block(nn.Module):
    """A step of a stack: `(carry, _) -> (carry, None)`."""

    @nn.compact
    def __call__(self, x, _):
        return x + layers.linen.Linear(4, 4, name="linear")(layers.linen.RMSNorm(name="norm")(x)), None


def _stack(block, depth=3):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)()


def _by_hand(params, x):
    for i in range(3):
        p = jax.tree.map(lambda a, i=i: a[i], params)
        normed = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * p["norm"]["scale"]
        x = x + normed @ p["linear"]["kernel"] + p["linear"]["bias"]
    return x


@pytest.mark.parametrize("lift", [lambda b: b, nn.remat], ids=["scan", "remat in scan"])
def test_derived_modules_under_linen_scan_and_remat_have_the_gradient_of_the_formula(lift):
    stack = _stack(lift(_Block))
    variables = stack.init(jax.random.key(0), X, None)
    assert variables["params"]["linear"]["kernel"].shape == (3, 4, 4)

    def loss(variables):
        return jnp.sum(jnp.sin(stack.apply(variables, X, None)[0]))

    expected = jax.grad(lambda p: jnp.sum(jnp.sin(_by_hand(p, X))))(variables["params"])
    given = jax.jit(jax.grad(loss))(variables)["params"]
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=2e-4, atol=2e-5), given, expected)


SEQUENCE = jnp.linspace(-1.0, 1.0, 40).reshape(2, 5, 4)
FURTHER = {
    "MLP": ((4, 6), {}),
    "GatedMLP": ((4, 6), {}),
    "MoE": ((4, 6, 3, 2), {}),
    "GatedMoE": ((4, 6, 3, 2), {}),
    "LSTM": ((4, 6), {}),
    "GRU": ((4, 6), {}),
    "Mamba": ((4,), {}),
    "Int8Linear": ((4, 6), {}),
    "VectorQuantizer": ((8, 4), {}),
}


@pytest.mark.parametrize("name", FURTHER)
def test_modules_without_a_twin_in_flax_are_derived_too(name):
    args, options = FURTHER[name]
    module = getattr(layers.linen, name)(*args, **options)
    variables = module.init(jax.random.key(0), SEQUENCE)
    nnx_module = getattr(layers, name)(*args, **options, rngs=nnx.Rngs(0))
    ours = {"/".join(map(str, path)): v for path, v in nnx.to_flat_state(nnx.state(nnx_module, nnx.Param))}
    theirs = {"/".join(k.key for k in path): v for path, v in jax.tree_util.tree_leaves_with_path(variables["params"])}
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    out = jax.tree.leaves(module.apply(variables, SEQUENCE))
    assert all(np.isfinite(x).all() for x in out)


def test_every_nnx_module_of_the_library_is_a_linen_class():
    names = [name for name, value in vars(layers).items() if isinstance(value, type) and issubclass(value, nnx.Module)]
    assert len(names) >= 18
    assert all(issubclass(getattr(layers.linen, name), nn.Module) for name in names)


@pytest.mark.parametrize("name", ["DEQ", "ReversibleStack"])
def test_modules_of_modules_take_the_arguments_of_the_nnx_module(name):
    def arguments(kind):
        found = inspect.signature(getattr(kind, name).__init__).parameters.values()
        return [(p.name, p.kind, p.default) for p in found if p.name not in ("rngs", "parent", "name")]

    assert arguments(layers.linen) == arguments(layers)


@pytest.mark.parametrize("lift", [nn.remat, nn.jit])
def test_lifted_class_takes_the_arguments_of_the_class(lift):
    module = lift(layers.linen.MLP)(4, hidden_features=6, name="mlp")
    variables = module.init(jax.random.key(0), X)
    assert variables["params"]["up"]["kernel"].shape == (4, 6)
    np.testing.assert_allclose(module.apply(variables, X), layers.linen.MLP(4, 6).apply(variables, X), rtol=1e-5, atol=1e-6)


# Modules made of modules

BATCH = jnp.sin(jnp.arange(24.0)).reshape(4, 6)
SOLVERS = {"solver": "iteration", "backward": "iteration"}  # compiled in less time than those by default
KEYS = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
WAYS = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scan"])


class Half(nn.Module):
    """A small MLP, and what is asked for in its middle."""

    features: int = 3
    rate: float = 0.0
    norm: bool = False
    penalty: bool = False
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x, scale=1.0):
        x = jnp.tanh(nn.Dense(5, name="up", param_dtype=self.dtype)(x)) * scale
        if self.norm:
            x = nn.BatchNorm(use_running_average=False, name="norm", param_dtype=self.dtype)(x)
        x = layers.linen.Dropout(self.rate, deterministic=False)(x) if self.rate else x
        if self.penalty:
            self.sow("losses", "penalty", jnp.mean(x**2))
        return nn.Dense(self.features, name="down", param_dtype=self.dtype)(x)


def pairs(**options):
    return lambda: (Half(**options), Half(**options))


class Coupling(nn.Module):
    """The stack by autodiff, unrolled, with the same names."""

    options: dict
    depth: int

    def setup(self):
        self.f, self.g = ([Half(**self.options) for _ in range(self.depth)] for _ in "fg")

    def __call__(self, x):
        x1, x2 = jnp.split(x, 2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + f(x2)
            x2 = x2 + g(x1)
        return jnp.concatenate([x1, x2], -1)


def unrolled(tree):
    """Variables of a stack that is a loop as those of one that is unrolled."""
    depth = len(jax.tree.leaves(tree)[0])
    return {f"{name}_{i}": jax.tree.map(lambda a, i=i: a[i], part) for name, part in tree.items() for i in range(depth)}


class NnxHalf(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = (nnx.Linear(*shape, param_dtype=jnp.float64, rngs=rngs) for shape in ((3, 5), (5, 3)))

    def __call__(self, x, scale):
        return self.down(jnp.tanh(self.up(x)) * scale)


class NnxCell(nnx.Module):
    def __init__(self, rngs):
        small = nnx.initializers.normal(0.1)
        self.inner = nnx.Linear(6, 6, kernel_init=small, param_dtype=jnp.float64, rngs=rngs)
        self.outer = nnx.Linear(6, 6, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.inner(z) + self.outer(x))


class Cell(nn.Module):
    rate: float = 0.0
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, z, x):
        small = nn.initializers.normal(0.1)
        z = nn.Dense(6, kernel_init=small, name="inner", param_dtype=self.dtype)(nn.Dropout(self.rate, deterministic=False)(z))
        return jnp.tanh(z + layers.linen.Linear(6, 6, name="outer", param_dtype=self.dtype)(x))


def init(module, *args):
    return jax.jit(module.init)(KEYS, *args)


def value_and_grads(fn, *args):
    return jax.jit(jax.value_and_grad(fn, tuple(range(len(args)))))(*args)


def same_as_nnx(module, twin, tree, *args):
    """Compares value and gradients, of parameters and arguments, of a Linen module and an nnx module, whose state is `tree(variables)`."""
    variables = init(module, *args)
    graph, state = nnx.split(twin)
    ours = value_and_grads(lambda p, *args: jnp.sin(module.apply({"params": p}, *args)).sum(), variables["params"], *args)
    nnx.replace_by_pure_dict(state, tree(variables["params"]))
    theirs = value_and_grads(lambda s, *args: jnp.sin(nnx.merge(graph, s, copy=True)(*args)).sum(), state, *args)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
    assert_trees_close(tree(ours[1][0]), nnx.to_pure_dict(theirs[1][0]), rtol=1e-10, atol=1e-12)
    assert_trees_close(ours[1][1:], theirs[1][1:], rtol=1e-10, atol=1e-12)


@WAYS
def test_reversible_stack_has_the_gradients_of_the_nnx_module(scan):
    def tree(params):
        return params if scan else {name: {i: params[f"{name}_{i}"] for i in range(2)} for name in "fg"}

    with jax.enable_x64(True):
        module = layers.linen.ReversibleStack(pairs(dtype=jnp.float64), depth=2, scan=scan)
        twin = layers.ReversibleStack(lambda rngs: (NnxHalf(rngs), NnxHalf(rngs)), depth=2, scan=scan, rngs=nnx.Rngs(0))
        same_as_nnx(module, twin, tree, BATCH.astype(jnp.float64), jnp.linspace(0.5, 1, 5))


def test_deq_has_the_gradients_of_the_nnx_module():
    with jax.enable_x64(True):
        module = layers.linen.DEQ(Cell(dtype=jnp.float64), tol=1e-13, backward_tol=1e-12, **SOLVERS)
        twin = layers.DEQ(NnxCell(nnx.Rngs(0)), tol=1e-13, backward_tol=1e-12, **SOLVERS)
        same_as_nnx(module, twin, lambda p: p, BATCH.astype(jnp.float64))


@WAYS
def test_stack_draws_writes_and_sows_as_linen_does_and_its_gradient_is_right(scan):
    with jax.enable_x64(True):
        options = {"rate": 0.5, "norm": True, "penalty": True, "dtype": jnp.float64}
        module, x = layers.linen.ReversibleStack(pairs(**options), depth=1 + scan, scan=scan), BATCH.astype(jnp.float64)
        variables = init(module, x)

        @jax.jit
        def value(params, x, key):
            given = {"params": params, "batch_stats": variables["batch_stats"]}
            y, state = module.apply(given, x, mutable=["batch_stats", "losses"], rngs={"dropout": key})
            return jnp.sin(y).sum() + sum(jnp.sin(p).sum() for p in jax.tree.leaves(state["losses"])), state

        at, key = (variables["params"], x), KEYS["dropout"]
        towards = jax.tree.map(jnp.cos, at)
        near = lambda e: value(*jax.tree.map(lambda a, t: a + e * t, at, towards), key)[0]
        expected = (8 * (near(1e-4) - near(-1e-4)) - (near(2e-4) - near(-2e-4))) / 12e-4
        grads, state = jax.jit(jax.grad(value, (0, 1), has_aux=True))(*at, key)
        slope = sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(towards), strict=True))
        np.testing.assert_allclose(slope, expected, rtol=1e-7)
        assert jax.tree.structure(state["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
        assert value(*at, jax.random.key(3))[0] != value(*at, key)[0]


@WAYS
def test_statistics_and_what_is_sown_are_those_of_the_plain_couplings(scan):
    options = {"norm": True, "penalty": True}
    module, plain = layers.linen.ReversibleStack(pairs(**options), depth=2, scan=scan), Coupling(options, 2)
    variables = init(module, BATCH)
    variables.pop("losses")
    named = (lambda tree: {k: unrolled(v) for k, v in tree.items()}) if scan else (lambda tree: tree)
    run = lambda module, variables: jax.jit(lambda v: module.apply(v, BATCH, mutable=["batch_stats", "losses"]))(variables)
    (y, state), (expected, expected_state) = run(module, variables), run(plain, named(variables))
    assert_trees_close((y, named(state)), (expected, expected_state), rtol=1e-5, atol=1e-6)
    assert abs(state["batch_stats"]["f" if scan else "f_1"]["norm"]["mean"]).max() > 0


def test_unrolled_stack_starts_from_the_parameters_of_the_plain_couplings():
    initial = layers.linen.ReversibleStack(pairs(), depth=2).init(KEYS, BATCH)
    assert_trees_close(initial, Coupling({}, 2).init(KEYS, BATCH), rtol=0)


@pytest.mark.parametrize(("scan", "options"), [(False, {}), (True, {"rate": 0.5, "norm": True})], ids=["unrolled", "scan that draws and writes"])
def test_stack_is_five_times_deeper_in_the_same_memory(scan, options):
    def temp(depth):
        module = layers.linen.ReversibleStack(pairs(features=32, **options), depth=depth, scan=scan)
        x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
        variables = jax.eval_shape(module.init, KEYS, x)

        def loss(params, stats, x, key):
            y, state = module.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"], rngs={"dropout": key})
            return jnp.sin(y).sum(), state

        return temp_bytes(jax.grad(loss, (0, 2), has_aux=True), variables["params"], variables.get("batch_stats", {}), x, KEYS["dropout"])

    assert temp(10) < 1.05 * temp(2)


class Step(nn.Module):
    """A step of a loop: a stack, then a deep equilibrium."""

    @nn.compact
    def __call__(self, x, _):
        x = layers.linen.ReversibleStack(pairs(rate=0.1, norm=True), depth=2, scan=True, name="stack")(x)
        return layers.linen.DEQ(Cell(0.1), name="deq", **SOLVERS)(x), None


class Loop(nn.Module):
    """Steps under transformations of Linen."""

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "batch_stats": 0, "intermediates": 0}
        steps = nn.scan(nn.remat(Step), axes, split_rngs={"params": True, "dropout": True}, length=3)
        return nn.Dense(1)(steps(name="steps")(x, None)[0])[:, 0]


def test_model_of_them_learns_under_linen_scan_and_remat():
    net, target = Loop(), jnp.sum(BATCH[:, :3], 1)
    variables = init(net, BATCH)

    @jax.jit
    def step(variables, key):
        def loss(params):
            y, state = net.apply({**variables, "params": params}, BATCH, mutable=["batch_stats", "intermediates"], rngs={"dropout": key})
            return jnp.mean((y - target) ** 2), state

        (value, state), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return value, state, {"params": jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads), "batch_stats": state["batch_stats"]}

    losses = []
    for i in range(40):
        value, state, variables = step({k: variables[k] for k in ("params", "batch_stats")}, jax.random.key(i))
        losses.append(value)
    assert losses[-1] < losses[0] / 5
    assert state["intermediates"]["steps"]["deq"]["convergence"][0].converged.all()
    assert (abs(state["batch_stats"]["steps"]["stack"]["f"]["norm"]["mean"]).max(-1) > 0).all()


def made(name, lift=lambda c: c):
    if name == "DEQ":
        return lift(layers.linen.DEQ)(Cell(), **SOLVERS)
    return lift(layers.linen.ReversibleStack)(pairs(), depth=2, scan=True)


@pytest.mark.parametrize(("name", "lift"), [("DEQ", nn.jit), ("ReversibleStack", nn.remat)])
def test_lifted_module_of_modules_has_the_gradients_of_the_module(name, lift):
    variables = init(made(name, lift), BATCH)
    ours, theirs = (value_and_grads(lambda v, m=m: jnp.sin(m.apply(v, BATCH)).sum(), variables) for m in (made(name, lift), made(name)))
    assert_trees_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_module_that_couplings_share_gets_the_sum_of_the_gradients():
    f, g = Half(), Half()
    module = layers.linen.ReversibleStack([(f, g)] * 2)
    params = init(module, BATCH)["params"]
    assert set(params) == {"blocks_0_0", "blocks_0_1"}

    def by_autodiff(p):
        together = {"f_0": p["blocks_0_0"], "f_1": p["blocks_0_0"], "g_0": p["blocks_0_1"], "g_1": p["blocks_0_1"]}
        return jnp.sin(Coupling({}, 2).apply({"params": together}, BATCH)).sum()

    ours = value_and_grads(lambda p: jnp.sin(module.apply({"params": p}, BATCH)).sum(), params)
    assert_trees_close(ours, value_and_grads(by_autodiff, params), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("options", "message"), [({"norm": True}, "an earlier block has changed"), ({"penalty": True}, "several couplings share")])
def test_shared_module_that_writes_is_refused(options, message):
    f, g = Half(**options), Half(**options)
    module = layers.linen.ReversibleStack([(f, g)] * 2)
    variables = Coupling(options, 1).init(KEYS, BATCH)
    variables = {k: {"blocks_0_0": v["f_0"], "blocks_0_1": v["g_0"]} for k, v in variables.items() if k != "losses"}
    with pytest.raises(TypeError, match=message):
        module.apply(variables, BATCH, mutable=["batch_stats", "losses"])


class Holder(nn.Module):
    """Applies a module that it is given."""

    inner: nn.Module

    def __call__(self, z, x=0.0):
        return 0.1 * self.inner(z) + x


class Outer(nn.Module):
    """Gives a module of its own to what it makes."""

    make: object
    width: int

    @nn.compact
    def __call__(self, x):
        return self.make(nn.Dense(self.width))(x)


@pytest.mark.parametrize(
    ("make", "width"),
    [(lambda d: layers.linen.DEQ(Holder(d)), 6), (lambda d: layers.linen.ReversibleStack([(Holder(d), Holder(d))]), 3)],
    ids=["DEQ", "ReversibleStack"],
)
def test_part_that_belongs_to_another_module_is_refused(make, width):
    with pytest.raises(ValueError, match=r"the module Holder_0 holds Dense_0, which belongs to the module that made it"):
        Outer(make, width).init(KEYS, BATCH)


def test_function_of_a_deq_may_use_modules():
    make = lambda d: layers.linen.DEQ(lambda z, x: 0.1 * d(z) + x, **SOLVERS)
    variables = init(Outer(make, 6), BATCH)
    expected = {"params": {"layer": {"inner": variables["params"]["Dense_0"]}}}
    ours = value_and_grads(lambda v: jnp.sin(Outer(make, 6).apply(v, BATCH)).sum(), variables)
    theirs = value_and_grads(lambda v: jnp.sin(layers.linen.DEQ(Holder(nn.Dense(6)), **SOLVERS).apply(v, BATCH)).sum(), expected)
    assert_trees_close(jax.tree.leaves(ours), jax.tree.leaves(theirs), rtol=1e-5, atol=1e-6)


def test_function_of_a_deq_that_writes_is_refused():
    class Averaging(nn.Module):
        @nn.compact
        def __call__(self, x):
            norm = nn.BatchNorm(use_running_average=False)
            return layers.linen.DEQ(lambda z, x: 0.1 * norm(z) + x, **SOLVERS)(x)

    variables = Averaging().init(KEYS, BATCH)
    with pytest.raises(TypeError, match="calls a Linen module which writes variables"):
        Averaging().apply(variables, BATCH, mutable=["batch_stats"])


def test_deq_draws_once_a_call_and_leaves_statistics_alone():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, z, x):
            return 0.1 * nn.BatchNorm(use_running_average=False)(Cell(0.5)(z, x)) + x

    module = layers.linen.DEQ(Noisy(), **SOLVERS)
    variables = init(module, BATCH)
    run = jax.jit(lambda key: module.apply(variables, BATCH, return_convergence=True, mutable=["batch_stats"], rngs={"dropout": key}))
    ((first, convergence), state), ((second, _), _) = run(jax.random.key(0)), run(jax.random.key(1))
    assert convergence.converged and abs(first - second).max() > 1e-4
    assert_trees_close(state["batch_stats"], variables["batch_stats"], rtol=0)


def test_axis_of_couplings_is_in_the_metadata_of_partitioned_parameters():
    make = lambda: nn.Dense(3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out")))
    module = layers.linen.ReversibleStack(lambda: (make(), make()), depth=2, scan=True)
    variables = init(module, BATCH)
    assert nn.get_partition_spec(variables)["params"]["f"]["kernel"] == jax.sharding.PartitionSpec(None, "in", "out")
    _, state = module.apply(variables, BATCH, mutable=True)
    assert jax.tree.structure(state) == jax.tree.structure(variables)


def test_reconstruction_error_is_that_of_the_nnx_module():
    module = layers.linen.ReversibleStack(pairs(), depth=1)
    assert 0 < module.apply(init(module, BATCH), BATCH, method="reconstruction_error").relative < 1e-6


def test_no_couplings_are_the_identity():
    y, variables = layers.linen.ReversibleStack(pairs(), depth=0, scan=True).init_with_output(KEYS, BATCH)
    np.testing.assert_array_equal(y, BATCH)
    assert not variables


WRONG_STACKS = {
    "no pair": (lambda: layers.linen.ReversibleStack([Half()]), TypeError, "block 0 is Half, but must be a pair"),
    "no depth": (lambda: layers.linen.ReversibleStack(pairs()), ValueError, "give depth"),
    "another depth": (lambda: layers.linen.ReversibleStack([pairs()()], depth=2), ValueError, "depth is 2, but there are 1 blocks"),
    "pairs in a loop": (lambda: layers.linen.ReversibleStack([pairs()()], scan=True), ValueError, "give blocks as a function"),
    "another shape": (lambda: layers.linen.ReversibleStack(pairs(features=4), depth=1), ValueError, "must return floats of shape"),
    "no halves": (lambda: layers.linen.ReversibleStack(pairs(), depth=1, axis=2), ValueError, "no two halves along axis 2"),
}


@pytest.mark.parametrize("case", WRONG_STACKS)
def test_wrong_stack_is_refused(case):
    make, error, message = WRONG_STACKS[case]
    with pytest.raises(error, match=message):
        make().init(KEYS, BATCH)


# Recurrent cells of Linen


def test_rnn_has_the_parameters_and_gradients_of_linens_rnn(monkeypatch):
    ours, theirs = (kind(nn.GRUCell(3, bias_init=nn.initializers.normal())) for kind in (layers.linen.RNN, nn.RNN))
    variables = init(theirs, SEQUENCE)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, jax.eval_shape(ours.init, KEYS, SEQUENCE))
    gradient = lambda module: jax.jit(jax.grad(lambda v: jnp.sin(2 * module.apply(v, SEQUENCE)).sum()))(variables)
    expected = gradient(theirs)
    monkeypatch.setattr(nn.RNN, "__call__", None)  # not by Flax's code
    assert_trees_close(gradient(ours), expected, rtol=1e-5, atol=1e-6)


def test_rnn_runs_both_ways_over_sequences_of_their_lengths():
    ours, theirs = (nn.Bidirectional(kind(nn.OptimizedLSTMCell(3)), kind(nn.LSTMCell(3))) for kind in (layers.linen.RNN, nn.RNN))
    variables, lengths = init(theirs, SEQUENCE), jnp.array([3, 5])
    run = lambda module: jax.jit(lambda v: module.apply(v, SEQUENCE, seq_lengths=lengths, return_carry=True))(variables)
    (carry, y), (expected_carry, expected) = run(ours), run(theirs)
    seen = (jnp.arange(5) < lengths[:, None])[..., None]  # Flax runs its cells over padding, too
    assert_trees_close((carry, y * seen), (expected_carry, expected * seen), rtol=1e-5, atol=1e-6)


def test_rnn_runs_other_cells_by_the_code_of_linen():
    ours, theirs = (kind(nn.SimpleCell(3), reverse=True, return_carry=True) for kind in (layers.linen.RNN, nn.RNN))
    assert_trees_close(*(m.init_with_output(jax.random.key(0), SEQUENCE) for m in (ours, theirs)), rtol=0)


def test_missing_parameters_of_a_cell_are_reported_as_linen_does():
    with pytest.raises(nn_errors.ScopeCollectionNotFound):
        layers.linen.RNN(nn.GRUCell(3)).apply({}, SEQUENCE)
