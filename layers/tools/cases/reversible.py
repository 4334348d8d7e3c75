"""Rows of the benchmark: reversible stacks, unrolled and as a loop."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from layers.reversible.reversible_stack import ReversibleStack
from layers.tools.cases.case import Case, normal

ROWS, FEATURES, HIDDEN = 4096, 512, 2048


class _Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(FEATURES, HIDDEN, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, FEATURES, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return _block(x, self.up.kernel[...], self.down.kernel[...])


def _block(x: Any, up: Any, down: Any) -> Any:
    return jax.nn.gelu(x @ up) @ down


def _split(depth: int, scan: bool) -> tuple[Any, Any]:
    """The structure of a stack of `depth` blocks, and its arrays."""
    made = nnx.eval_shape(lambda: ReversibleStack(lambda r: (_Block(r), _Block(r)), depth=depth // 2, scan=scan, rngs=nnx.Rngs(0)))
    return nnx.split(made)


def _args(depth: int, scan: bool) -> tuple[Any, ...]:
    shapes = [a.shape for a in jax.tree.leaves(_split(depth, scan)[1])]
    return normal((ROWS, FEATURES), (ROWS, FEATURES), *shapes)


def _ours(depth: int, scan: bool) -> Any:
    graph, state = _split(depth, scan)
    tree = jax.tree.structure(state)
    return lambda x1, x2, *leaves: nnx.merge(graph, tree.unflatten(leaves))((x1, x2))


def _unrolled(block: Any) -> Any:
    """The same by autodiff; the arrays come as those of all f, then of all g: down, up, down, up, ..."""

    def run(x1: Any, x2: Any, *leaves: Any) -> Any:
        middle = len(leaves) // 2
        for i in range(0, middle, 2):
            x1 = x1 + block(x2, leaves[i + 1], leaves[i])
            x2 = x2 + block(x1, leaves[middle + i + 1], leaves[middle + i])
        return x1, x2

    return run


def _scanned(block: Any) -> Any:
    def run(x1: Any, x2: Any, *leaves: Any) -> Any:
        def body(carry: Any, each: Any) -> Any:
            (x1, x2), (f_down, f_up, g_down, g_up) = carry, each
            x1 = x1 + block(x2, f_up, f_down)
            return (x1, x2 + block(x1, g_up, g_down)), None

        return jax.lax.scan(body, (x1, x2), leaves)[0]

    return run


def _case(depth: int, scan: bool) -> Case:
    plain = _scanned if scan else _unrolled
    return Case(
        f"reversible_{'scan' if scan else 'unrolled'}_{depth}",
        f"{depth} residual MLP blocks, {ROWS} x {FEATURES} -> {HIDDEN}, {'a loop' if scan else 'unrolled'}",
        lambda: _args(depth, scan),
        plain(_block),
        _ours(depth, scan),
        flops=12.0 * depth * ROWS * FEATURES * HIDDEN,
        others=(("checkpoint per block", plain(jax.checkpoint(_block))),),
    )


CASES = (_case(12, scan=False), _case(12, scan=True))
