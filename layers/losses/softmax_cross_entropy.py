"""Cross entropy of logits, which keeps the logits and two numbers a row.

    loss = the cross entropy of the rows of the logits, with its gradient, as in `rows.py`; their mean, sum, or each

Both ways it goes in blocks of rows, so that nothing of the size of the logits is there but themselves and their gradient. The gradient is
computed from the logits again, as p = exp(z - max) / total.

Saved: the logits and labels (arguments), and for each row the largest logit and the sum of exp(z - max), in float32 (and its entropy, where that
is returned): in one number, the
logsumexp, the digits that large logits need would be lost.

Reference: `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim
from jaxtyping import Array, Bool, Float, Int

from layers.core import checks, machine
from layers.core.blocks import block_size as divide
from layers.core.blocks import by_device, fold_blocks
from layers.core.constants import refuse_gradient
from layers.core.numerics import wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.core.slices import slice_here
from layers.function.function import Function
from layers.kernels.cross_entropy import KERNELS
from layers.kernels.dispatch import NAMES, XLA, choose
from layers.losses import by_kernel
from layers.losses.arguments import OPTION, as_batch, check_labels, read_options
from layers.losses.rows import Flow, Rows, label_gradients, row_gradients, row_tangents
from layers.losses.targets import Labels, Options, reduced, scale_of

BLOCK_BYTES, NARROW_BLOCK_BYTES = 1 << 20, 1 << 24
"""On a CPU, of a float32 block of logits, and of one of 16-bit logits: to write it, its compiler before JAX 0.12 goes through all of a 16-bit array.

On an accelerator one block takes all."""


class SoftmaxCrossEntropyFunction(Function):
    @staticmethod
    def forward(ctx, logits, labels, options):
        targets = labels.read(logits.shape[1], options, wide(logits.dtype))
        if options.implementation == XLA:
            found = _by_blocks(lambda a, targets: Rows.of(a, targets, labels.class_weights, options), logits, (targets,), options)
        else:
            softmax = by_kernel.softmax(logits, options.implementation)
            found = Rows.of(logits.astype(wide(logits.dtype)), targets, labels.class_weights, options, softmax)
        ctx.save_for_backward(logits, labels, found.softmax, found.entropy)
        ctx.options = options
        return found.outputs(ctx, targets, options)

    @staticmethod
    def backward(ctx, dloss, dlse, _, dentropy, __):
        refuse_gradient("softmax_cross_entropy", OPTION, ctx.needs_input_grad[2])
        (logits, labels, softmax, entropy), (dloss, dlse, dentropy) = barrier(ctx.saved_tensors, (dloss, dlse, dentropy))
        options, wants_labels, class_weights = ctx.options, ctx.needs_input_grad[1], labels.class_weights
        targets = labels.read(logits.shape[1], options, wide(logits.dtype))
        scale = scale_of(targets, options)
        factor = jnp.broadcast_to(dloss if scale is None else dloss * scale, logits.shape[:1])
        flow = Flow(dlse if options.return_logsumexp else None, dentropy if options.return_entropy else None, entropy)

        if options.implementation != XLA:
            return by_kernel.gradients(logits, softmax, targets.times(factor), options, flow), None, None

        def of_rows(a, softmax, targets, flow):
            dlogits = row_gradients(a, softmax, targets, class_weights, options, flow).astype(logits.dtype)
            return dlogits, label_gradients(a, softmax, targets, class_weights, options) if wants_labels else None

        dlogits, dlabels = _by_blocks(of_rows, logits, (softmax, targets.times(factor), flow), options)
        return dlogits, Labels(dlabels), None

    @staticmethod
    def jvp(ctx, dlogits, dlabels, _):
        refuse_gradient("softmax_cross_entropy", OPTION, ctx.needs_input_grad[2])
        logits, labels, *found = ctx.saved_tensors
        options = ctx.options
        targets = labels.read(logits.shape[1], options, wide(logits.dtype))

        def of_rows(a, dlogits, dlabels, found, targets):
            return row_tangents(a, dlogits, dlabels, found, targets, labels.class_weights, options)

        arrays = dlogits, dlabels.given if ctx.needs_input_grad[1] else None, tuple(found), targets
        dloss, dlse, dentropy = _by_blocks(of_rows, logits, arrays, options)
        return reduced(dloss, targets, options), dlse, None, dentropy, None

    @staticmethod
    def example(key, dtype):
        options = Options(label_smoothing=0.1, z_loss=0.1, logit_soft_cap=3.0, return_logsumexp=True, return_entropy=True)
        return jax.random.normal(key, (5, 7), dtype), Labels(jnp.array([2, 6, -100, 2, 0])), options

    @staticmethod
    def examples(key, dtype):
        logits, labels = jax.random.normal(key, (3, 7), dtype), Labels(jnp.array([2, -100, 0]))
        every = Options(ignore_index=2, return_accuracy=True, return_rank=True, block_size=2)
        return {
            "plain, a loss a row": (logits, labels, Options(reduction="none")),
            "probabilities at a temperature": (logits, Labels(jax.nn.softmax(logits[::-1])), Options(temperature=2.0, reduction="sum")),
            "nothing but ignored rows": (logits, Labels(jnp.full(3, -100)), Options()),
            "logits far out": (1e4 * logits, labels, Options()),
            "all that it returns, by class weights": (logits, Labels(jnp.array([2, 6, 1]), jnp.arange(7), jnp.array([1, 2, 0])), every),
            "forbidden classes": (logits.at[:, 1].set(-jnp.inf), labels, Options()),
            "no rows": (logits[:0], Labels(jnp.zeros(0, int)), Options()),
        }


def _by_blocks(fn: Callable[..., Any], logits: jax.Array, arrays: tuple[Any, ...], options: Options) -> Any:
    """`fn(logits, *arrays)` of float32 or wider logits, in blocks of rows."""

    def of_rows(_: None, arrays: Any) -> tuple[None, Any]:
        logits, arrays = arrays
        narrow = wide(logits.dtype) != logits.dtype
        target = max(1, machine.choose(NARROW_BLOCK_BYTES if narrow else BLOCK_BYTES, machine.UNLIMITED) // (4 * max(logits.shape[1], 1)))

        def body(_: None, block: Any) -> tuple[None, Any]:
            places, arrays = block
            everything = is_symbolic_dim(places.shape[0]) or places.shape[0] == 0
            a = logits if everything else slice_here(logits, places[0], places.shape[0], 0)
            return None, fn(a.astype(wide(a.dtype)), *arrays)

        places, size = jnp.arange(logits.shape[0]), options.block_size or divide(logits.shape[0], target)
        return fold_blocks(jax.checkpoint(body, prevent_cse=False), None, (places, arrays), block=size)

    return by_device(of_rows, None, (logits, arrays))[1]


def softmax_cross_entropy(
    logits: Float[Array, "*batch vocab"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch vocab"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_soft_cap: float | None = None,
    class_weights: Float[Array, " vocab"] | None = None,
    where: Bool[Array, "*#batch"] | Float[Array, "*#batch"] | None = None,
    reduction: str = "mean",
    return_logsumexp: bool = False,
    return_accuracy: bool = False,
    return_entropy: bool = False,
    block_size: int | None = None,
    implementation: str | None = None,
) -> Any:
    """Computes the cross entropy of logits, with the weights, smoothing and mean of `torch.nn.functional.cross_entropy`.

    Logits may be infinite: the gradient is finite, and classes with a logit of -inf get none. In a row whose largest logit is infinite, the
    classes that reach it share all the probability.

    Args:
        logits: a row for each label.
        labels, ignore_index, label_smoothing, z_loss, logit_soft_cap, class_weights, where, reduction, return_logsumexp, return_accuracy,
            return_entropy: as in `linear_cross_entropy`.
        block_size: rows in a block; None to choose: on a CPU so that one takes 1 MiB in float32, in 16 bits 16 MiB; else all.
        implementation: None takes the fastest that can do the call and was verified for it on what is compiled for; "xla" or "mosaic" (a kernel for
            NVIDIA's Hopper) that one, with the derivatives of this layer at every order. `layers.implementations` says which and why.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_logsumexp`, `return_accuracy` and `return_entropy` a tuple of it and
        these, in this order.

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, a value out of its range, an implementation that cannot do the call.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "softmax_cross_entropy"
    options = read_options(
        who,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_soft_cap=logit_soft_cap,
        reduction=reduction,
        return_logsumexp=return_logsumexp,
        return_accuracy=return_accuracy,
        return_entropy=return_entropy,
        block_size=block_size,
    )
    checks.choice(who, "implementation", implementation, (None, *NAMES))
    logits = checks.array(who, "logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{who}: logits have shape {logits.shape}, but must be (*batch, vocab), with at least one class")
    batch = logits.shape[:-1]
    rows = check_labels(who, labels, class_weights, where, batch, logits.shape[-1])
    made = Options(**options)
    made = replace(made, implementation=choose(who, by_kernel.describe(as_rows(logits, batch), rows, made), KERNELS, implementation))
    return as_batch(SoftmaxCrossEntropyFunction.apply(as_rows(logits, batch), rows, made), batch)
