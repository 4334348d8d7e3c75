"""Jensen-Shannon divergence between the distributions of two linear heads, a student's and a teacher's, without their logits.

With q and p the softmax of the student's and the teacher's logits over the temperature τ, β in (0, 1):

    m = β p + (1 - β) q,   loss = β KL(p || m) + (1 - β) KL(q || m)
    da = (1 - β) q (log(q / m) - Σ q log(q / m)) / τ                                (a: the student's logits)

The terms in which m moves add up to zero. At the ends, where that is zero, stand the limits of loss / β and loss / (1 - β):

    β = 0:  loss = KL(p || q),  da = (q - p) / τ          β = 1:  loss = KL(q || p),  da = q (log(q / p) - loss) / τ

The teacher gets no gradient. As in `linear_cross_entropy`, a block of logits is all that is ever there, and where the loss is one number the
gradients are computed in forward, in the same loop; for the loss of each row backward computes the logits again.

Saved: dx, dkernel and dbias of the student, those that are wanted, in float32; or else the arguments, and five float32 numbers a row.

Reference: Agarwal et al., "On-Policy Distillation of Language Models" (generalised Jensen-Shannon divergence), 2024.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from layers.core import checks
from layers.core.constants import refuse_gradient
from layers.core.numerics import product, safe_reciprocal, slope_along, wide
from layers.core.recompute import barrier
from layers.core.rows import as_rows
from layers.function.function import Function
from layers.losses.arguments import OPTION, as_batch, check_head, check_where, read_options
from layers.losses.divergence import Options, Stats, divergence_gradients, divergences
from layers.losses.head import Gradients, Head, by_groups, fold, replace_by_groups, rows_in_block


class LinearJSDFunction(Function):
    @staticmethod
    def forward(ctx, x, kernel, bias, teacher_x, teacher_kernel, teacher_bias, where, options):
        head, teacher = Head(kernel, bias), Head(teacher_kernel, teacher_bias)
        ctx.in_forward = options.reduction != "none"
        wanted = Gradients(*ctx.needs_input_grad[:3])
        now = ctx.in_forward and any(ctx.needs_input_grad[:3])
        weight = _weight(x, kernel, where)

        def body(sums, block):
            x, teacher_x, weight = block
            a, b = head.logits(x), teacher.logits(teacher_x)
            loss, stats = by_groups(lambda ab: divergences(ab[0], ab[1], options), (a, b))
            sums, dx = wanted.add(sums, _gradients(a, b, stats, weight, options), x, head, weight != 0) if now else (None, None)
            return sums, (product(weight, loss), stats, dx)

        start = wanted.start(head, weight.dtype) if now else None
        sums, (loss, stats, dx) = fold(body, start, (x, teacher_x, weight), block=_block(x, head, options))
        ctx.options = options
        if ctx.in_forward:
            ctx.save_for_backward((dx, *sums) if now else (None, None, None), _scale(weight, options))
        else:
            ctx.save_for_backward(x, kernel, bias, teacher_x, teacher_kernel, teacher_bias, where, stats)
        return loss if options.reduction == "none" else loss.sum() * _scale(weight, options)

    @staticmethod
    def backward(ctx, dloss):
        refuse_gradient("linear_jsd", OPTION, ctx.needs_input_grad[7])
        if ctx.in_forward:
            gradients, scale = ctx.saved_tensors
            return *(None if g is None else dloss * scale * g for g in gradients), None, None, None, None, None
        (x, kernel, bias, teacher_x, teacher_kernel, teacher_bias, where, stats), dloss = barrier(ctx.saved_tensors, dloss)
        head, teacher, options = Head(kernel, bias), Head(teacher_kernel, teacher_bias), ctx.options
        wanted = Gradients(*ctx.needs_input_grad[:3])
        weight = product(_weight(x, kernel, where), dloss)

        def body(sums, block):
            x, teacher_x, stats, weight = block
            da = _gradients(head.logits(x), teacher.logits(teacher_x), stats, weight, options)
            return wanted.add(sums, da, x, head, weight != 0)

        start = wanted.start(head, weight.dtype)
        (dkernel, dbias), dx = fold(body, start, (x, teacher_x, stats, weight), block=_block(x, head, options))
        return dx, dkernel, dbias, None, None, None, None, None

    @staticmethod
    def jvp(ctx, dx, dkernel, dbias, *_):
        refuse_gradient("linear_jsd", OPTION, ctx.needs_input_grad[7])
        if ctx.in_forward:
            gradients, scale = ctx.saved_tensors
            terms = (slope_along(g, t) for g, t in zip(gradients, (dx, dkernel, dbias), strict=True) if g is not None)
            return scale * sum(terms, jnp.zeros_like(scale))
        x, kernel, bias, teacher_x, teacher_kernel, teacher_bias, where, stats = ctx.saved_tensors
        head, teacher, options = Head(kernel, bias), Head(teacher_kernel, teacher_bias), ctx.options
        wanted = Gradients(*ctx.needs_input_grad[:3])

        def body(_, block):
            x, dx, teacher_x, stats, weight = block
            da = divergence_gradients(head.logits(x), teacher.logits(teacher_x), stats, weight, options)
            return None, product(da, wanted.tangent(x, dx, head, Head(dkernel, dbias))).sum(-1)

        return fold(body, None, (x, dx, teacher_x, stats, _weight(x, kernel, where)), block=_block(x, head, options))[1]

    @staticmethod
    def surrogate(x, kernel, bias, teacher_x, teacher_kernel, teacher_bias, where, options):
        """The same on whole logits, with the teacher as a constant."""
        teacher = lax.stop_gradient((teacher_x, Head(teacher_kernel, teacher_bias)))
        loss = product(_weight(x, kernel, where), divergences(Head(kernel, bias).logits(x), teacher[1].logits(teacher[0]), options)[0])
        return loss if options.reduction == "none" else loss.sum() * _scale(_weight(x, kernel, where), options)

    @staticmethod
    def example(key, dtype):
        shapes = (5, 3), (3, 7), (7,), (5, 2), (2, 7)
        x, kernel, bias, *teacher = (jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 5), shapes, strict=True))
        return x, kernel, bias, *teacher, None, jnp.array([1, 2, 0, 1, 3]), Options(0.3, 1.5)

    @staticmethod
    def examples(key, dtype):
        x, kernel, bias, teacher_x, teacher_kernel, _, where, _ = LinearJSDFunction.example(key, dtype)
        teacher = teacher_x, teacher_kernel, kernel[0]
        return {
            "plain": (x, kernel, None, *teacher, None, Options()),
            "far out": (1e4 * x, kernel, None, *teacher, None, Options()),
            "forward, a loss a row": (x, kernel, bias, *teacher, where, Options(0.0, reduction="none", block_size=2)),
            "backward, the sum": (x, kernel, bias, *teacher, where, Options(1.0, reduction="sum")),
            "nothing counts": (x, kernel, bias, *teacher, jnp.zeros(5), Options()),
            "no rows": (x[:0], kernel, bias, teacher_x[:0], teacher_kernel, None, where[:0], Options()),
        }


def _gradients(a: jax.Array, b: jax.Array, stats: Stats, weight: jax.Array, options: Options) -> jax.Array:
    def of_rows(a: jax.Array, arrays: Any) -> jax.Array:
        b, stats, weight = arrays
        return divergence_gradients(a, b, stats, weight, options)

    return replace_by_groups(of_rows, a, (b, stats, weight))


def _block(x: jax.Array, head: Head, options: Options) -> int:
    return rows_in_block(x.shape[0], 2 * head.vocab, options.block_size)


def _weight(x: jax.Array, kernel: jax.Array, where: jax.Array | None) -> jax.Array:
    """How much each row counts."""
    dtype = wide(jnp.promote_types(x.dtype, kernel.dtype))
    return jnp.ones(x.shape[:1], dtype) if where is None else where.astype(dtype)


def _scale(weight: jax.Array, options: Options) -> jax.Array:
    """What the sum over rows is multiplied by. The mean of nothing is 0."""
    return safe_reciprocal(weight.sum()) if options.reduction == "mean" else jnp.ones((), weight.dtype)


def linear_jsd(
    student_x: Float[Array, "*batch features"],
    student_kernel: Float[Array, "features vocab"],
    teacher_x: Float[Array, "*batch teacher_features"],
    teacher_kernel: Float[Array, "teacher_features vocab"],
    student_bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    where: Bool[Array, "*#batch"] | Float[Array, "*#batch"] | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "mean",
    block_size: int | None = None,
) -> Array:
    """Computes the generalised Jensen-Shannon divergence between a student's and a teacher's predictions, for distillation.

    The logits of neither are ever whole in memory. With "mean" and "sum" the student's gradients are computed in forward, where one is
    wanted. The teacher gets none. The loss is not multiplied by temperature².

    Args:
        student_x, student_kernel, student_bias: the logits of the student are `student_x @ student_kernel + student_bias`.
        teacher_x, teacher_kernel, teacher_bias: the same of the teacher, of any number of features.
        mask: True where a row counts; None for everywhere.
        where: how much each row counts, a mask or weights, which multiply its loss. Constants, without a gradient. What is in a row that does
            not count, by either of the two, is not touched: it may be NaN.
        beta: the teacher's share of the mixture, in [0, 1]; 0 is KL(teacher || student), 1 is KL(student || teacher), which is huge
            and not infinite for what the teacher excludes.
        temperature: divides all logits.
        reduction: "mean" over the rows that count, divided by the sum of their weights, and 0 where that is 0; "sum"; "none" for each row.
        block_size: rows in a block; None to choose.

    Returns:
        The divergence, a float32 scalar (or wider) or (*batch).

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, a value out of its range.
        TypeError: where arrays are of the wrong dtype.
    """
    options = read_options("linear_jsd", beta=beta, temperature=temperature, reduction=reduction, block_size=block_size)
    student, teacher = (student_x, student_kernel, student_bias), (teacher_x, teacher_kernel, teacher_bias)
    return distill("linear_jsd", student, teacher, mask, where, Options(**options))


def distill(who: str, student: tuple[Any, Any, Any], teacher: tuple[Any, Any, Any], mask: Any, where: Any, options: Options) -> Array:
    """Checks the arrays, and applies the layer."""
    x, kernel, bias = check_head(who, *student, names=("student_x", "student_kernel", "student_bias"))
    teacher = lax.stop_gradient(check_head(who, *teacher, names=("teacher_x", "teacher_kernel", "teacher_bias")))
    teacher_x, teacher_kernel, teacher_bias = teacher
    batch = x.shape[:-1]
    if teacher_x.shape[:-1] != batch or teacher_kernel.shape[1] != kernel.shape[1]:
        raise ValueError(
            f"{who}: the teacher's batch {teacher_x.shape[:-1]} and vocab {teacher_kernel.shape[1]} must be those of the student, "
            f"{batch} and {kernel.shape[1]} (student_x: {x.shape}, teacher_x: {teacher_x.shape}, student_kernel: {kernel.shape}, "
            f"teacher_kernel: {teacher_kernel.shape})"
        )
    counts, mask = check_where(who, where, batch), checks.array(who, "mask", mask, "boolean", optional=True)
    checks.shape(who, "mask", mask, batch, "(*batch)", student_x=x)
    if mask is not None:
        counts = as_rows(mask, batch) if counts is None else jnp.where(as_rows(mask, batch), counts, 0)
    loss = LinearJSDFunction.apply(as_rows(x, batch), kernel, bias, as_rows(teacher_x, batch), teacher_kernel, teacher_bias, counts, options)
    return as_batch((loss,), batch)
