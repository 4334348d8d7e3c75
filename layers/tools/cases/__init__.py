"""What the benchmark runs: for each layer the work, the idiomatic code for it, and ours."""

from layers.tools.cases import (
    activations,
    attention,
    elementary,
    implicit,
    losses,
    mlp,
    moe,
    norms,
    quantization,
    recurrent_cells,
    reversible,
    scans,
)
from layers.tools.cases.case import Case

_FAMILIES = (losses, attention, mlp, moe, activations, norms, elementary, recurrent_cells, scans, reversible, implicit, quantization)

CASES: tuple[Case, ...] = tuple(case for family in _FAMILIES for case in family.CASES)
