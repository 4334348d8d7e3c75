"""Kullback-Leibler divergence of a student's linear head from a teacher's, without their logits: `linear_jsd` at its end, β = 0.

    loss = Σ p log(p / q),   da = (q - p) / τ

Reference: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float

from layers.losses.arguments import read_options
from layers.losses.divergence import Options
from layers.losses.linear_jsd import distill


def linear_kl_divergence(
    student_x: Float[Array, "*batch features"],
    student_kernel: Float[Array, "features vocab"],
    teacher_x: Float[Array, "*batch teacher_features"],
    teacher_kernel: Float[Array, "teacher_features vocab"],
    student_bias: Float[Array, " vocab"] | None = None,
    teacher_bias: Float[Array, " vocab"] | None = None,
    mask: Bool[Array, "*batch"] | None = None,
    *,
    where: Bool[Array, "*#batch"] | Float[Array, "*#batch"] | None = None,
    temperature: float = 1.0,
    reduction: str = "mean",
    block_size: int | None = None,
) -> Array:
    """Computes KL(teacher || student) between the predictions of two linear heads, for distillation.

    The logits of neither are ever whole in memory. With "mean" and "sum" the student's gradients are computed in forward, where one is
    wanted. The teacher gets none. The loss is not multiplied by temperature². KL(student || teacher) is `linear_jsd` with `beta=1`.

    Args:
        student_x, student_kernel, teacher_x, teacher_kernel, student_bias, teacher_bias, mask, where, temperature, reduction, block_size: as in
            `linear_jsd`.

    Returns:
        The divergence, a float32 scalar (or wider) or (*batch).

    Raises:
        ValueError: for shapes that do not fit, an unknown reduction, a value out of its range.
        TypeError: where arrays are of the wrong dtype.
    """
    options = read_options("linear_kl_divergence", temperature=temperature, reduction=reduction, block_size=block_size)
    student, teacher = (student_x, student_kernel, student_bias), (teacher_x, teacher_kernel, teacher_bias)
    return distill("linear_kl_divergence", student, teacher, mask, where, Options(beta=0.0, **options))
