"""The clauses of the contract on transformations, dtypes, sharding and memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from layers.checking.derivatives import needs_forward_mode
from layers.checking.report import Skip
from layers.checking.subject import Subject, as_array, half, same, weights_of, widen

HALF_PRECISION_EPS = 16
"""How many roundings of half precision the gradient may be away from that in float64: the sum over a small example's operations."""


def linear(s: Subject) -> None:
    """Gradients of both signs and of several sizes; the clause "gradient" compares them with the Jacobian."""
    pull = jax.jit(lambda *cotangents: jax.vjp(s.outputs, *s.differentiated)[1](list(cotangents)))
    weights = [weights_of(y) for y in jax.eval_shape(s.outputs, *s.differentiated)]
    others = [np.roll(np.ravel(w), 1).reshape(w.shape)[::-1] if w.ndim else w for w in weights]
    once, other = pull(*weights), pull(*others)
    for factor in (-1, 1024, -1 / 1024):
        same([np.asarray(g) / factor for g in pull(*[(factor * w).astype(w.dtype) for w in weights])], once)
    same(pull(*[a + b for a, b in zip(weights, others, strict=True)]), [np.asarray(a) + np.asarray(b) for a, b in zip(once, other, strict=True)])


def jit(s: Subject) -> None:
    same(s.compiled(*s.differentiated), s.expected)
    same(jax.grad(jax.jit(s.loss), tuple(range(len(s.differentiated))))(*s.differentiated), s.expected)


def remat(s: Subject) -> None:
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        again = jax.grad(jax.checkpoint(s.loss, policy=policy), tuple(range(len(s.differentiated))))
        same(jax.jit(again)(*s.differentiated), s.expected)


def scan(s: Subject) -> None:
    def twice(*moved: Any) -> Any:
        return jax.lax.scan(lambda total, _: (total + s.loss(*moved), None), jnp.zeros(()), None, length=2)[0]

    same(jax.jit(jax.grad(twice, tuple(range(len(s.differentiated)))))(*s.differentiated), [2 * np.asarray(g) for g in s.expected])


def vmap(s: Subject) -> None:
    batch, expected = s.pairs
    same(s.batched(*batch), expected)
    first = [batch[0], *s.differentiated[1:]]
    axes = (0, *[None] * (len(first) - 1))
    whole = jax.grad(lambda *x: jax.vmap(s.loss, axes)(*x).sum(), tuple(range(len(first))))
    one, two = (jax.tree.map(np.asarray, s.compiled(x, *s.differentiated[1:])) for x in (s.differentiated[0], half(s.differentiated[0])))
    same(jax.jit(whole)(*first), [np.stack([one[0], two[0]]), *[a + b for a, b in zip(one[1:], two[1:], strict=True)]])


def forward_mode(s: Subject) -> None:
    if s.cls is not None:
        needs_forward_mode()
    if s.cls is not None and s.cls._has_jvp() and hasattr(s.cls, "surrogate"):
        raise Skip("its tangent is by design not its gradient")
    tangents = [as_array(np.cos(3 * np.asarray(x)), x.dtype) for x in s.differentiated]
    slope = jax.jit(lambda x, t: jax.jvp(s.loss, x, t)[1])(s.differentiated, tangents)
    inner = sum(np.sum(np.real(np.asarray(g) * np.asarray(t))) for g, t in zip(s.expected, tangents, strict=True))
    same([slope], [inner], tolerance=2e-3)


def partial(s: Subject) -> None:
    each = jax.jit(lambda *moved: [jax.grad(s.loss, i)(*moved) for i in range(len(moved))])
    same(each(*s.differentiated), s.expected)


def dtypes(s: Subject) -> str:
    worst = {}
    for dtype in (jnp.bfloat16, jnp.float16):
        moved = [x if jnp.iscomplexobj(x) else as_array(x, dtype) for x in s.differentiated]
        given = s.compiled(*moved)
        for x, g in zip(moved, given, strict=True):
            assert g.dtype == x.dtype, f"an argument of {x.dtype} gets a gradient of {g.dtype}"
            assert np.isfinite(np.asarray(g, np.complex64)).all(), f"the gradient in {dtype.__name__} is not finite"
        if not hasattr(s.cls, "surrogate"):
            worst[dtype.__name__] = _error_in(s, moved, given)
            assert worst[dtype.__name__] <= HALF_PRECISION_EPS * float(jnp.finfo(dtype).eps), (
                f"the gradient in {dtype.__name__} has a relative error of {worst[dtype.__name__]:.3g} against float64"
            )
    return ", ".join(f"{name}: error {error:.2g}" for name, error in worst.items()) or "bfloat16, float16"


def _error_in(s: Subject, moved: Sequence[Any], given: Sequence[Any]) -> float:
    """The largest relative error (Euclidean norm) of gradients of rounded arguments, beside float64 at the same arguments."""
    with jax.enable_x64(True):
        exact = [np.asarray(e) for e in s.compiled(*map(widen, moved))]
    errors = [np.linalg.norm(np.ravel(np.asarray(g, e.dtype) - e)) / max(np.linalg.norm(np.ravel(e)), 1.0) for g, e in zip(given, exact, strict=True)]
    return float(max(errors, default=0.0))


def sharding(s: Subject) -> str:
    devices = jax.devices()
    if len(devices) < 2:
        raise Skip("one device")
    mesh = jax.sharding.Mesh(np.array(devices[:2]), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    batch, expected = s.pairs
    placed = [jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)) for x in batch]
    same(s.batched(*placed), expected)

    def on_each(*moved: Any) -> Any:
        return [g[None] for g in jax.grad(s.loss, tuple(range(len(moved))))(*[x[0] for x in moved])]

    mapped = jax.shard_map(on_each, mesh=mesh, in_specs=spec, out_specs=spec)
    same(jax.jit(mapped)(*placed), expected)

    replicated = jax.sharding.PartitionSpec()
    shared = jax.shard_map(
        lambda scale, *moved: scale * s.loss(*moved)[None], mesh=mesh, in_specs=(spec, *[replicated] * len(s.differentiated)), out_specs=spec
    )
    total = jax.grad(lambda *x: shared(jnp.array([1.0, 2.0]), *x).sum(), tuple(range(len(s.differentiated))))
    same(jax.jit(total)(*s.differentiated), [3 * np.asarray(g) for g in s.expected])
    return "jit, shard_map"


def no_leak(s: Subject) -> None:
    with jax.checking_leaks():
        jax.eval_shape(lambda *moved: s.gradient(*moved), *s.differentiated)  # a function of its own, so that it is traced here


def memory(s: Subject) -> str:
    kept = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(s.outputs, *x)[1], *s.differentiated))
    total = sum(x.size * x.dtype.itemsize for x in kept)
    return f"{total} bytes for arguments of {sum(x.nbytes for x in s.differentiated)}"
