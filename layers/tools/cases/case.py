"""One row of the benchmark."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.core.trees import replaced

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    Attributes:
        name: as `python -m layers bench NAME`.
        work: what is computed, with sizes.
        args: makes the arguments; all floating-point ones are differentiated.
        idiomatic: what people write with jax.nn, Flax or optax.
        ours: the same with this library.
        flops: floating-point operations in matrix products, forward and backward, without recomputation.
        others: further ways to the same, by name.
        peers: the same with other libraries, used where they are installed: by package, `(package, *args) -> output`. For "torch" the
            arguments are tensors.
        rounds: how often it is run where that is not the benchmark's number; for work that takes many seconds.
    """

    name: str
    work: str
    args: Callable[[], tuple[Any, ...]]
    idiomatic: Fn
    ours: Fn
    flops: float = 0.0
    others: tuple[tuple[str, Fn], ...] = ()
    peers: tuple[tuple[str, Fn], ...] = ()
    rounds: int = 0

    def arguments(self, dtype: str = "float32") -> tuple[Any, ...]:
        """What each of the programs takes: the gradient of the output, then `args`, those of float32 in `dtype`."""
        args = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, self.args())
        return _draw_like(jax.eval_shape(self.idiomatic, *args)), *args

    def ways(self) -> dict[str, Fn]:
        """The functions of `args` that are compared."""
        dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return {
            "idiomatic": self.idiomatic,
            "checkpoint": jax.checkpoint(self.idiomatic),
            "dots policy": jax.checkpoint(self.idiomatic, policy=dots),
            **dict(self.others),
            **{name: partial(peer, importlib.import_module(name)) for name, peer in self.peers if name != "torch" and _installed(name)},
            "ours": self.ours,
        }

    def runners(self, arguments: tuple[Any, ...]) -> dict[str, Callable[[], Any]]:
        """Forward and backward with what JAX does not compile."""
        return {name: _torch_run(peer, *arguments) for name, peer in self.peers if name == "torch" and _installed(name)}


def forward_and_backward(fn: Fn) -> Fn:
    """`(cotangent, *args)` to the output and the gradients of all floating-point arguments."""

    def program(cotangent: Any, *args: Any) -> Any:
        out, pull = forward(fn)(*args)
        return out, pull(cotangent)

    return program


def forward(fn: Fn) -> Fn:
    """`args` to the output and, as a pytree of what backward keeps, the function of its cotangent to those gradients."""

    def program(*args: Any) -> Any:
        differentiated = [i for i, a in enumerate(args) if jnp.issubdtype(a.dtype, jnp.floating)]

        def of_moving(*moved: Any) -> Any:
            return fn(*replaced(args, differentiated, moved))

        return jax.vjp(of_moving, *[args[i] for i in differentiated])

    return program


def _draw_like(out: Any) -> Any:
    """A gradient for an output: 1 for a scalar, else normal numbers."""
    return jax.tree.map(lambda y: jnp.ones(y.shape, y.dtype) if y.ndim == 0 else jax.random.normal(jax.random.key(9), y.shape, y.dtype), out)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torch_run(fn: Fn, cotangent: Any, *args: Any) -> Callable[[], Any]:
    torch: Any = importlib.import_module("torch")
    tensors = [_as_tensor(torch, x) for x in args]
    gradient = torch.from_numpy(np.array(cotangent))
    differentiated = [t.requires_grad_() for t in tensors if t.is_floating_point()]

    def run() -> Any:
        return torch.autograd.grad(fn(torch, *tensors), differentiated, gradient)

    return run


def _as_tensor(torch: Any, x: jax.Array) -> Any:
    if x.dtype == jnp.bfloat16:  # NumPy's is not torch's
        return torch.from_numpy(np.array(x.astype(jnp.float32))).to(torch.bfloat16)
    return torch.from_numpy(np.array(x))


def normal(*shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Normal arrays of these shapes; those after the first scaled as weights are."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return tuple(jax.random.normal(k, s) / (s[-2] ** 0.5 if i and len(s) > 1 else 1) for i, (k, s) in enumerate(zip(keys, shapes, strict=True)))
