"""Blocks for reversible stacks, and the same stacks without a rule of their own."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.reversible.reversible_stack import ReversibleStack


class Block(nnx.Module):
    """A small MLP with what is asked for in its middle."""

    def __init__(
        self, features: int, hidden: int, rngs: nnx.Rngs, *, dropout: Any = None, norm: Any = None, dtype: Any = None, param_dtype: Any = None
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype or jnp.float32}
        self.up = nnx.Linear(features, hidden, rngs=rngs, **dtypes)
        self.norm = norm(hidden, rngs=rngs, param_dtype=dtypes["param_dtype"]) if norm else None
        self.dropout = dropout(0.5, rngs=rngs) if dropout else None
        self.down = nnx.Linear(hidden, features, rngs=rngs, **dtypes)

    def __call__(self, x: Any, scale: Any = 1.0) -> Any:
        x = jnp.tanh(self.up(x)) * scale
        x = x if self.norm is None else self.norm(x)
        x = x if self.dropout is None else self.dropout(x)
        return self.down(x)


def maker(features: int = 3, hidden: int = 5, **kwargs: Any) -> Any:
    return lambda rngs: (Block(features, hidden, rngs, **kwargs), Block(features, hidden, rngs, **kwargs))


def stack_of(make: Any, depth: int, **kwargs: Any) -> ReversibleStack:
    return ReversibleStack(make, depth=depth, rngs=nnx.Rngs(0, dropout=1), **kwargs)


class Plain(nnx.Module):
    """The stack by autodiff, from the same seed; `remat` puts each half under `jax.checkpoint`."""

    def __init__(self, make: Any, depth: int, remat: bool = False):
        rngs = nnx.Rngs(0, dropout=1)
        pairs = [make(rngs) for _ in range(depth)]
        self.f, self.g = nnx.List([p[0] for p in pairs]), nnx.List([p[1] for p in pairs])
        self.remat = remat

    def __call__(self, x: Any, *args: Any) -> Any:
        run = (lambda m, x, *args: nnx.remat(lambda m, x, *args: m(x, *args))(m, x, *args)) if self.remat else lambda m, x, *args: m(x, *args)
        x1, x2 = jnp.split(x, 2, -1)
        for f, g in zip(self.f, self.g, strict=True):
            x1 = x1 + run(f, x2, *args)
            x2 = x2 + run(g, x1, *args)
        return jnp.concatenate([x1, x2], -1)


def loss(y: Any) -> Any:
    return jnp.sum(jnp.sin(y) * jnp.arange(1, y.size + 1).reshape(y.shape)) / max(y.size, 1)


@nnx.jit
def value_and_grads(model: Any, x: Any, *args: Any) -> Any:
    """The loss, and the gradients of the parameters (for each f, for each g), of x and of the other arguments."""
    run = nnx.value_and_grad(lambda model, x, *args: loss(model(x, *args)), argnums=tuple(range(2 + len(args))))
    value, (dmodel, *others) = run(model, x, *args)
    return value, (dmodel["f"], dmodel["g"]), others


def by_coupling(grads: Any, scan: bool) -> list[Any]:
    """Arrays with an axis of couplings, whichever way the stack is run."""
    if scan:
        return jax.tree.leaves(nnx.to_pure_dict(grads[0])) + jax.tree.leaves(nnx.to_pure_dict(grads[1]))
    return [leaf for column in grads for leaf in jax.tree.leaves(jax.tree.map(lambda *xs: jnp.stack(xs), *nnx.to_pure_dict(column).values()))]


def program(model: Any) -> tuple[Any, Any]:
    """A pure function `(state, x) -> gradients`, and the state."""
    graph, state = nnx.split(model)
    return (lambda state, x: jax.grad(lambda s, x: loss(nnx.merge(graph, s, copy=True)(x)), argnums=(0, 1), allow_int=True)(state, x)), state
