"""What the modules of one cell, `LSTM` and `GRU`, share: they make the cell that they run."""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from layers.core import checks
from layers.recurrent.gates import SAVES
from layers.recurrent.whole_sequences import WholeSequences


class OneCell(WholeSequences):
    """A `flax.nnx.RNN` of a new cell.

    Attributes:
        cell_class: of Flax.
    """

    cell_class: ClassVar[type]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        save: str = "states",
        rngs: nnx.Rngs,
        **cell_options: Any,
    ):
        who = type(self).__name__
        in_features, hidden_features = (
            checks.integer(who, what, size, "[1, 2147483647]") for what, size in (("in_features", in_features), ("hidden_features", hidden_features))
        )
        checks.dtype(who, "dtype", cell_options.get("dtype"), "inexact")
        checks.dtype(who, "param_dtype", cell_options.get("param_dtype", jnp.float32), "inexact", optional=False)
        save = checks.choice(who, "save", save, SAVES)
        cell = self.cell_class(in_features, hidden_features, rngs=rngs, **cell_options)
        super().__init__(cell, time_major=time_major, return_carry=return_carry, reverse=reverse, keep_order=keep_order)
        self.save = save
