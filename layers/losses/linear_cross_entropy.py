"""Cross entropy of a linear map, without its logits.

    a = x kernel + bias,   loss = the cross entropy of the rows of a (`rows.py`), their mean, sum, or each

In blocks of rows: the logits a of one block are all that is there. Where the loss is one number, what arrives in backward is one number dloss
that multiplies every gradient, so forward computes the gradients of the sum in the same loop, while a block's logits are there (three
products of matrices, 6 N V D operations), and backward multiplies:

    da = p Σt - t + ...  (`rows.py`),   dx = da kernelᵀ,   dkernel = Σ xᵀ da,   dbias = Σ da,   all times dloss / Σ m for the mean

Where rows, their logsumexp or entropy have gradients of their own, these are not known in forward: backward computes the logits again (8 N V D).
Gradients of labels that are distributions are as large as the logits, and computed in backward too.

Saved: in the first case dx, dkernel and dbias, those that are wanted, in float32; in the second the arguments, and two float32 numbers a row, with
the entropy three.

Reference: Hsu et al., "Liger Kernel", 2024, for gradients in the forward loop; Wijmans et al., "Cut Your Losses in Large-Vocabulary Language
Models", 2024, for the recomputation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from layers.core.constants import refuse_gradient
from layers.core.numerics import slope_along, wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.function.function import Function
from layers.losses.arguments import OPTION, as_batch, check_head, check_labels, read_options
from layers.losses.head import Gradients, Head, by_groups, fold, replace_by_groups, rows_in_block
from layers.losses.rows import Flow, Rows, label_gradients, row_gradients, row_tangents, touched
from layers.losses.targets import Labels, Options, reduced, scale_of


class LinearCrossEntropyFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, labels, options):
        head, dtype, class_weights = Head(kernel, bias), wide(jnp.promote_types(x.dtype, kernel.dtype)), labels.class_weights
        targets = labels.read(head.vocab, options, dtype)
        wanted = Gradients(*ctx.needs_input_grad[:3])
        ctx.in_forward = options.one_number and not ctx.needs_input_grad[3]
        now = ctx.in_forward and any(ctx.needs_input_grad[:3])

        def gradients(a, arrays):
            softmax, targets = arrays
            return row_gradients(a, softmax, targets, class_weights, options)

        def body(sums, block):
            x, targets = block
            a = head.logits(x)
            found = by_groups(lambda rows: Rows.of(rows[0], rows[1], class_weights, options), (a, targets))
            dx = None
            if now:
                da = replace_by_groups(gradients, a, (found.softmax, targets))
                sums, dx = wanted.add(sums, da, x, head, touched(targets))
            return sums, (found, dx)

        start = wanted.start(head, dtype) if now else None
        sums, (found, dx) = fold(body, start, (x, targets), block=rows_in_block(x.shape[0], head.vocab, options.block_size))
        ctx.options = options
        if ctx.in_forward:
            ctx.save_for_backward((dx, *sums) if now else (None, None, None), scale_of(targets, options))
        else:
            ctx.save_for_backward(x, kernel, bias, labels, found.softmax, found.entropy)
        return found.outputs(ctx, targets, options)

    @staticmethod
    def backward(ctx, dloss, dlse, _, dentropy, __):
        refuse_gradient("linear_cross_entropy", OPTION, ctx.needs_input_grad[4])
        if not ctx.in_forward:
            return _recomputed(ctx, dloss, dlse, dentropy)
        (dx, dkernel, dbias), scale = ctx.saved_tensors
        factor = dloss if scale is None else dloss * scale
        return *(None if g is None else factor * g for g in (dx, dkernel, dbias)), None, None

    @staticmethod
    def jvp(ctx, *tangents):
        refuse_gradient("linear_cross_entropy", OPTION, ctx.needs_input_grad[4])
        if not ctx.in_forward:
            return _recomputed_tangents(ctx, *tangents)
        gradients, scale = ctx.saved_tensors
        slope = sum(slope_along(g, t) for g, t in zip(gradients, tangents, strict=False) if g is not None)
        return slope if scale is None else slope * scale, None, None, None, None

    @staticmethod
    def example(key, dtype):
        x, kernel, bias = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 3), ((5, 3), (3, 7), (7,)), strict=True))
        labels = Labels(jnp.array([2, 6, -100, 2, 0]), where=jnp.array([1, 2, 1, 0, 3]))
        return x, kernel, bias, labels, Options(label_smoothing=0.1, z_loss=0.1, logit_soft_cap=3.0, block_size=2)

    @staticmethod
    def examples(key, dtype):
        x, kernel, bias, labels, _ = LinearCrossEntropyFunction.example(key, dtype)
        weighted = labels._replace(class_weights=jnp.arange(7))
        distribution = Labels(jax.nn.softmax(jax.random.normal(key, (5, 7), dtype)))
        ignoring = weighted._replace(given=jnp.array([2, 6, 1, 2, 0]))
        every = Options(
            ignore_index=2, reduction="sum", temperature=2.0, return_logsumexp=True, return_accuracy=True, return_entropy=True, return_rank=True
        )
        return {
            "plain": (x, kernel, None, Labels(labels.given), Options()),
            "nothing but ignored rows": (x, kernel, None, Labels(jnp.full(5, -100)), Options()),
            "far out": (1e4 * x, kernel, None, Labels(labels.given), Options()),
            "a loss a row, by class weights": (x, kernel, bias, weighted, Options(reduction="none")),
            "all that it returns": (x, kernel, bias, ignoring, every),
            "distributions": (x, kernel, bias, distribution, Options(reduction="sum")),
            "no rows": (x[:0], kernel, bias, Labels(labels.given[:0]), Options()),
        }


def _recomputed(ctx, dloss, dlse, dentropy):
    (x, kernel, bias, labels, softmax, entropy), (dloss, dlse, dentropy) = barrier(ctx.saved_tensors, (dloss, dlse, dentropy))
    head, options, class_weights = Head(kernel, bias), ctx.options, labels.class_weights
    targets = labels.read(head.vocab, options, softmax.total.dtype)
    wanted = Gradients(*ctx.needs_input_grad[:3])
    scale = scale_of(targets, options)
    factor = jnp.broadcast_to(dloss if scale is None else dloss * scale, x.shape[:1])
    flow = Flow(dlse if options.return_logsumexp else None, dentropy if options.return_entropy else None, entropy)

    def of_labels(block):
        a, softmax, targets = block
        return label_gradients(a, softmax, targets, class_weights, options)

    def gradients(a, arrays):
        softmax, targets, flow = arrays
        return row_gradients(a, softmax, targets, class_weights, options, flow)

    def body(sums, block):
        x, softmax, targets, flow = block
        a = head.logits(x)
        dlabels = by_groups(of_labels, (a, softmax, targets)) if ctx.needs_input_grad[3] else None
        da = replace_by_groups(gradients, a, (softmax, targets, flow))
        sums, dx = wanted.add(sums, da, x, head, touched(targets, flow))
        return sums, (dx, dlabels)

    block, start = rows_in_block(x.shape[0], head.vocab, options.block_size), wanted.start(head, softmax.total.dtype)
    (dkernel, dbias), (dx, dlabels) = fold(body, start, (x, softmax, targets.times(factor), flow), block=block)
    return dx, dkernel, dbias, Labels(dlabels), None


def _recomputed_tangents(ctx, dx, dkernel, dbias, dlabels, _):
    x, kernel, bias, labels, softmax, entropy = ctx.saved_tensors
    head, options = Head(kernel, bias), ctx.options
    targets = labels.read(head.vocab, options, softmax.total.dtype)
    wanted, wants_labels = Gradients(*ctx.needs_input_grad[:3]), ctx.needs_input_grad[3]

    def body(_, block):
        x, dx, targets, found, dlabels = block
        a, da = head.logits(x), wanted.tangent(x, dx, head, Head(dkernel, dbias))
        return None, row_tangents(a, da, dlabels, found, targets, labels.class_weights, options)

    block = rows_in_block(x.shape[0], head.vocab, options.block_size)
    dlabels = dlabels.given if wants_labels else None
    dloss, dlse, dentropy = fold(body, None, (x, dx, targets, (softmax, entropy), dlabels), block=block)[1]
    return reduced(dloss, targets, options), dlse, None, dentropy, None


def linear_cross_entropy(
    x: Float[Array, "*batch features"],
    kernel: Float[Array, "features vocab"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch vocab"],
    bias: Float[Array, " vocab"] | None = None,
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
) -> Any:
    """Computes the cross entropy of the logits `x @ kernel + bias` without ever holding them whole.

    Weights, smoothing and the mean are those of `torch.nn.functional.cross_entropy`. With "mean" and "sum" gradients are computed in
    forward, where one is wanted, at the cost of three products of matrices; for rows, logsumexp or entropy, backward computes the logits again.

    Args:
        x: rows of features.
        kernel: as that of `flax.nnx.Linear`.
        labels: the class of each row; or its distribution over the classes, which has a gradient.
        bias: is added to the logits.
        ignore_index: a row with this label does not count. A label that is neither this nor in [0, vocab) gives NaN.
        label_smoothing: the share, in [0, 1], of a uniform distribution in the target.
        z_loss: is multiplied by logsumexp² and added to the loss of each row, times the class weight of its label.
        logit_soft_cap: c in c tanh(logits / c), which takes the place of the logits; None for none.
        class_weights: multiply the terms of the classes. Constants, without a gradient.
        where: how much each row counts, a mask or weights, which multiply its loss. Constants, without a gradient. What is in a row that does
            not count, here or by its label, is not touched: it may be NaN.
        reduction: "mean" over the rows that count, divided by the sum of their weights, those of `where` times the class weights of their
            labels (1 for distributions), and 0 where that sum is 0; "sum"; "none" for the loss of each row.
        return_logsumexp: whether to return the logsumexp of each row, which is differentiable.
        return_accuracy: whether to return the share of the rows that count in which the largest logit is that of the label; with
            "none" what each of these rows counts, and 0 for the others.
        return_entropy: whether to return the entropy of each row's softmax, which is differentiable.
        block_size: rows in a block; None to choose: on a CPU 512 where their logits take at most 64 MiB, else as many as take 32 MiB, but 32
            to 1024; on an accelerator a quarter of all, or as many as take 512 MiB, but at least 1024.

    Returns:
        The loss, a float32 scalar (or wider) or (*batch); with `return_logsumexp`, `return_accuracy` and `return_entropy` a tuple of it and
        these, in this order.

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, a value out of its range.
        TypeError: where arrays are of the wrong dtype.
    """
    who = "linear_cross_entropy"
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
    x, kernel, bias = check_head(who, x, kernel, bias)
    batch = x.shape[:-1]
    rows = check_labels(who, labels, class_weights, where, batch, kernel.shape[1])
    return as_batch(LinearCrossEntropyFunction.apply(as_rows(x, batch), kernel, bias, rows, Options(**options)), batch)
