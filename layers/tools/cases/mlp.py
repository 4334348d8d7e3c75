"""Rows of the benchmark: perceptrons, alone and in stacks with norms.

In the rows of stacks each block is under `jax.checkpoint` or its policy by itself, as people write it; the ways named so are these.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from layers.perceptrons.gated_mlp import gated_mlp
from layers.perceptrons.mlp import mlp
from layers.tools.cases.case import Case, normal

ROWS, FEATURES, HIDDEN = 8192, 512, 2048
DEPTH, TOKENS = 16, 2048


def _args(ways: int) -> tuple[Any, ...]:
    return normal((ROWS, FEATURES), *[(FEATURES, HIDDEN)] * ways, (HIDDEN, FEATURES))


def _plain(x: Any, up: Any, down: Any) -> Any:
    return jax.nn.gelu(x @ up) @ down


def plain_gated(x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _torch(torch: Any, x: Any, up: Any, down: Any) -> Any:
    return torch.nn.functional.gelu(x @ up, approximate="tanh") @ down


def _torch_gated(torch: Any, x: Any, gate: Any, up: Any, down: Any) -> Any:
    return (torch.nn.functional.silu(x @ gate) * (x @ up)) @ down


Block = Callable[..., Any]


def _block(x: Any, scale: Any, *kernels: Any) -> Any:
    return x + plain_gated(x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale, *kernels)


def _our_block(x: Any, scale: Any, *kernels: Any, save: str) -> Any:
    return x + gated_mlp(x, *kernels, save=save, norm_scale=scale, epsilon=1e-6)


def _stack_args() -> tuple[Any, ...]:
    x, *kernels = normal((TOKENS, FEATURES), *[(DEPTH, *s) for s in ((FEATURES, HIDDEN), (FEATURES, HIDDEN), (HIDDEN, FEATURES))])
    return x, jnp.ones((DEPTH, FEATURES)), *kernels


def _unrolled_args() -> tuple[Any, ...]:
    x, *stacked = _stack_args()
    return x, *(p[i] for i in range(DEPTH) for p in stacked)


def _scanned(block: Block) -> Block:
    return lambda x, *params: jax.lax.scan(lambda x, p: (block(x, *p), None), x, params)[0]


def _unrolled(block: Block) -> Block:
    def run(x: Any, *params: Any) -> Any:
        for i in range(0, len(params), 4):
            x = block(x, *params[i : i + 4])
        return x

    return run


def _stack(name: str, args: Callable[[], tuple[Any, ...]], of: Callable[[Block], Block]) -> Case:
    dots = jax.checkpoint(_block, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    inputs, ours = (partial(_our_block, save=save) for save in ("inputs", "preactivations"))
    others = ("checkpoint per block", of(jax.checkpoint(_block))), ("dots policy per block", of(dots)), ('ours, save="inputs"', of(inputs))
    work = f"{DEPTH} layers of norm + SwiGLU MLP, {name.rpartition('_')[2]}, {TOKENS} x {FEATURES}"
    return Case(name, work, args, of(_block), of(ours), flops=18.0 * DEPTH * TOKENS * FEATURES * HIDDEN, others=others, rounds=3)


CASES = (
    Case(
        "mlp",
        "GELU MLP, 8192 x 512 -> 2048",
        partial(_args, 1),
        _plain,
        partial(mlp, save="inputs"),
        flops=12.0 * ROWS * FEATURES * HIDDEN,
        others=(('ours, save="preactivations"', partial(mlp, save="preactivations")),),
        peers=(("torch", _torch),),
    ),
    Case(
        "gated_mlp",
        "SwiGLU MLP, 8192 x 512 -> 2048",
        partial(_args, 2),
        plain_gated,
        partial(gated_mlp, save="inputs"),
        flops=18.0 * ROWS * FEATURES * HIDDEN,
        others=(('ours, save="preactivations"', partial(gated_mlp, save="preactivations")),),
        peers=(("torch", _torch_gated),),
    ),
    _stack("stack_mlp_unrolled", _unrolled_args, _unrolled),
    _stack("stack_mlp_scanned", _stack_args, _scanned),
)
