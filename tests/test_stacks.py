"""What a loop over layers keeps for backward: of every layer of the catalogue, nothing that is a copy or a cast of what is alive anyway."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers
from layers import Function
from layers.checking.contract import catalogue
from layers.checking.gradcheck import has_gradient
from layers.core.trees import replaced
from layers.losses.linear_cross_entropy import LinearCrossEntropyFunction
from tests.support import temp_bytes

SHALLOW, DEEP = 11, 256
"""Layers in a stack whose numbers are looked at, and in one whose memory is: what a layer keeps is there so many times, what it works with once."""


class Plain:
    """A context of which nothing is kept: JAX differentiates the forward itself."""

    def __init__(self, count):
        self.needs_input_grad = (True,) * count

    def save_for_backward(self, *_):
        pass

    def mark_non_differentiable(self, *_):
        pass

    def set_materialize_grads(self, _):
        pass

    def requires_grad(self):
        return True


class Stack(NamedTuple):
    """The scanned layer, and its reference.

    Attributes:
        ours: of the shared array or the carry, and the stacked parameters.
        plain: the same, of the forward or the surrogate differentiated by JAX.
        args: of both.
        depth: how many layers.
        step_bytes: of the arguments and the outputs of one layer.
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    args: list[Any]
    depth: int
    step_bytes: int


def stack(depth, cls, args, plain=None) -> Stack:
    leaves, tree = jax.tree.flatten(args)
    indices = [i for i, x in enumerate(leaves) if has_gradient(x)]
    first, *rest = (jnp.asarray(leaves[i]) for i in indices)

    def outputs(fn, moved):
        return [y for y in jax.tree.leaves(fn(*tree.unflatten(replaced(leaves, indices, moved)))) if has_gradient(y)]

    outs = jax.eval_shape(lambda *moved: outputs(cls.apply, moved), first, *rest)
    carried = (outs[0].shape, outs[0].dtype) == (first.shape, first.dtype)
    total = lambda arrays: sum((jnp.real(y * np.cos(np.arange(y.size)).reshape(y.shape).astype(y.dtype)).sum() for y in arrays), jnp.zeros(()))

    def scanned(fn):
        def run(x, *params):
            def step(carry, params):
                x, loss = carry
                y, *others = outputs(fn, (x, *params))
                return (y, loss + total(others)) if carried else (x, loss + total([y, *others])), None

            y, loss = jax.lax.scan(step, (x, jnp.zeros(())), params, length=depth)[0]
            return loss + total([y]) if carried else loss

        return run

    factors = np.random.default_rng(0).uniform(0.9, 1.1, depth * sum(p.size for p in rest))
    params = []
    for p in rest:
        mine, factors = np.split(factors, [depth * p.size])
        params.append(jnp.asarray((mine.reshape(depth, *p.shape) * np.asarray(p)).astype(p.dtype)))
    reference = plain or getattr(cls, "surrogate", None) or (cls.forward if cls._is_split() else lambda *a: cls.forward(Plain(len(args)), *a))
    return Stack(scanned(cls.apply), scanned(reference), [first, *params], depth, sum(y.size * y.dtype.itemsize for y in (first, *rest, *outs)))


def kept(stack) -> list[Any]:
    """Arrays of real numbers that are alive between forward and backward, beside the arguments, which differ among themselves."""
    arguments = {id(x) for x in stack.args}
    found = jax.tree.leaves(jax.vjp(stack.ours, *stack.args)[1])
    real = [np.asarray(x) for x in found if hasattr(x, "dtype") and id(x) not in arguments and jnp.issubdtype(x.dtype, jnp.floating)]
    return [x for x in real if len(np.unique(x.astype(np.float32))) > 1]


def same_numbers(a, b) -> bool:
    """Whether one is the other in another order, rounded to the narrower dtype."""
    if a.size != b.size or jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return False
    narrow = min((a.dtype, b.dtype), key=lambda d: d.itemsize)
    values = (np.sort(np.asarray(x).astype(narrow).astype(np.float32).ravel()) for x in (a, b))
    return np.array_equal(*values)


def copies(stack) -> list[str]:
    """Of the arguments, and among what each layer keeps; the loss has arrays of its own that all share."""
    arrays = kept(stack)
    of_each = [x for x in arrays if x.shape[:1] == (stack.depth,)]
    pairs = [*itertools.product(arrays, stack.args), *itertools.combinations(of_each, 2)]
    return [f"{x.dtype}{x.shape} has the numbers of {y.dtype}{y.shape}" for x, y in pairs if same_numbers(x, y)]


def excess(stack) -> int:
    """Bytes of temporaries beyond those of autodiff and of what a layer and its gradient work with, 8 times their arguments and outputs."""
    of = lambda run: temp_bytes(jax.grad(run, tuple(range(len(stack.args)))), *stack.args)
    return of(stack.ours) - of(stack.plain) - 8 * stack.step_bytes - 512


def example(depth, cls) -> Stack:
    return stack(depth, cls, cls.example(jax.random.key(0), jnp.float32))


@pytest.mark.parametrize("cls", catalogue(), ids=lambda c: c.__name__)
def test_loop_over_a_layer_keeps_no_copy_of_what_is_alive(cls):
    assert copies(example(SHALLOW, cls)) == []


@pytest.mark.parametrize("cls", [c for c in catalogue() if c is not LinearCrossEntropyFunction], ids=lambda c: c.__name__)
def test_loop_over_a_layer_takes_no_more_memory_than_autodiff(cls):
    assert excess(example(DEEP, cls)) <= 0


def planted(keep):
    """A product of matrices that keeps its kernel, (3, 3), made into something."""

    def forward(ctx, x, kernel):
        ctx.save_for_backward(x, keep(kernel))
        return x @ kernel

    def backward(ctx, dy):
        x, kernel = ctx.saved_tensors
        return dy @ kernel.astype(x.dtype), x.T @ dy

    return type("Planted", (Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)})


ARGS = jnp.linspace(-1, 1, 12).reshape(4, 3), jnp.linspace(-0.5, 0.3, 9).reshape(3, 3)
COPIES = {
    "transpose": lambda w: w.T,
    "cast": lambda w: w.T.astype(jnp.bfloat16),
    "another order": jnp.flip,
}


@pytest.mark.parametrize("name", COPIES)
def test_copy_that_is_kept_is_found(name):
    assert len(copies(stack(SHALLOW, planted(COPIES[name]), ARGS))) == 1


def test_memory_of_a_copy_that_is_kept_is_found():
    product = lambda x, kernel, *_: x @ kernel
    assert excess(stack(DEEP, planted(lambda w: w.T), ARGS, product)) > 0
    assert excess(stack(DEEP, layers.LinearFunction, (*ARGS, None), product)) <= 0


def test_linear_cross_entropy_keeps_gradients_that_take_less_than_the_logits():
    def plain(x, kernel, bias, labels, options):
        cap = options.logit_soft_cap
        log_probs = jax.nn.log_softmax(cap * jnp.tanh((x @ kernel + bias) / cap))
        return jnp.take_along_axis(log_probs, labels.given[:, None], 1).sum()

    more = lambda x: jnp.repeat(x, 16, 0) if getattr(x, "shape", ())[:1] == (5,) else x
    args = jax.tree.map(more, LinearCrossEntropyFunction.example(jax.random.key(0), jnp.float32))
    assert excess(stack(DEEP, LinearCrossEntropyFunction, args, plain)) <= 0


# Modules with float32 parameters that compute in bfloat16

TOKENS, FEATURES, LAYERS = 64, 32, 32
OPTIONS = {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}


class FlaxMLP(nnx.Module):
    def __init__(self, rngs, gated):
        self.ups = nnx.List([nnx.Linear(FEATURES, 64, **OPTIONS, rngs=rngs) for _ in range(2 if gated else 1)])
        self.down = nnx.Linear(64, FEATURES, **OPTIONS, rngs=rngs)

    def __call__(self, x):
        first, *others = (up(x) for up in self.ups)
        return self.down(jax.nn.silu(first) * others[0] if others else jax.nn.gelu(first))


MODULES = {
    "Linear": (partial(layers.Linear, FEATURES, FEATURES, **OPTIONS), partial(nnx.Linear, FEATURES, FEATURES, **OPTIONS)),
    "MLP": (partial(layers.MLP, FEATURES, 64, **OPTIONS), partial(FlaxMLP, gated=False)),
    "GatedMLP": (partial(layers.GatedMLP, FEATURES, 64, use_bias=True, **OPTIONS), partial(FlaxMLP, gated=True)),
    "RMSNorm": (partial(layers.RMSNorm, FEATURES, **OPTIONS), partial(nnx.RMSNorm, FEATURES, **OPTIONS)),
    "LayerNorm": (partial(layers.LayerNorm, FEATURES, **OPTIONS), partial(nnx.LayerNorm, FEATURES, **OPTIONS)),
    "MultiHeadAttention": tuple(partial(f, 4, FEATURES, decode=False, **OPTIONS) for f in (layers.MultiHeadAttention, nnx.MultiHeadAttention)),
}


@pytest.mark.parametrize("name", MODULES)
def test_loop_over_a_module_in_mixed_precision_takes_no_more_memory_than_that_of_flax(name):
    def memory(make):
        stacked = nnx.split_rngs(splits=LAYERS)(nnx.vmap(lambda rngs: make(rngs=rngs)))(nnx.Rngs(0))
        graph, state = nnx.split(stacked)

        def run(state, x):
            step = nnx.scan(lambda x, layer: x + jnp.sin(layer(x)).astype(x.dtype), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            return step(x, nnx.merge(graph, state)).astype(jnp.float32).sum()

        return temp_bytes(jax.grad(run, (0, 1), allow_int=True), state, jnp.ones((1, TOKENS, FEATURES), jnp.bfloat16))

    ours, theirs = map(memory, MODULES[name])
    assert ours <= theirs + 1024
