"""Flax's `RNN` with the backward pass of `lstm` and `gru`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.core import meta

from layers.core import checks
from layers.recurrent.gru import run_gru
from layers.recurrent.lstm import run_lstm
from layers.recurrent.whole_sequences import checked_inputs, refuse_segment_ids, run_cell, without_time


class RNN(linen.RNN):
    """`flax.linen.RNN`: the same arguments and parameters, with the backward pass of `lstm` and `gru`.

    Runs a cell of type LSTMCell, OptimizedLSTMCell or GRUCell with the default activations; any other is run by Flax's code. Values are Flax's, but
    with `seq_lengths` the outputs at padding: they are the state that is held there. Sequences of few steps (some 24) take up to a tenth more
    memory than Flax's, since the kernels of the gates are joined.

    Attributes:
        save: as in `lstm` and `gru`.

    A call takes `segment_ids` too, as `lstm` and `gru` do, where the cell is one of those.
    """

    save: str = "states"

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        init_key: Any = None,
        seq_lengths: Any = None,
        segment_ids: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        given = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        options = {key: checks.flag("RNN", key, value, optional=True) for key, value in given.items()}
        known = self._known()
        if known is None:
            refuse_segment_ids("RNN", segment_ids, "it is of another type, or has activations or lifted axes of its own")
        if known is None or "params" not in self.cell.variables:
            out = super().__call__(inputs, initial_carry=initial_carry, init_key=init_key, seq_lengths=seq_lengths, **options)
            if known is None:
                return out
        return_carry, time_major, reverse, keep_order = (bool(getattr(self, k) if v is None else v) for k, v in options.items())
        run, gates = known
        x, cell = checked_inputs("RNN", inputs, time_major), self.cell
        parameters = _parameters(meta.unbox(cell.variables["params"]), gates)
        if initial_carry is None:
            key = jax.random.key(0) if init_key is None else init_key
            initial_carry = cell.initialize_carry(key, without_time(x.shape, time_major))
        order = {"time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        outputs, carry = run_cell("RNN", run, x, parameters, initial_carry, seq_lengths, segment_ids, dtype=cell.dtype, save=self.save, **order)
        return (carry, outputs) if return_carry else outputs

    @linen.nowrap
    def _known(self) -> tuple[Any, str] | None:
        """The function that runs the cell, and its gates; None where there is none."""
        cell: Any = self.cell
        lifted = ("variable_axes", "variable_broadcast", "variable_carry", "split_rngs")
        if type(cell) not in _CELLS or any(getattr(self, n) != linen.RNN.__dataclass_fields__[n].default for n in lifted):
            return None
        return _CELLS[type(cell)] if cell.gate_fn is linen.sigmoid and cell.activation_fn is linen.tanh else None


_CELLS: dict[type, tuple[Any, str]] = {
    linen.LSTMCell: (run_lstm, "ifgo"),
    linen.OptimizedLSTMCell: (run_lstm, "ifgo"),
    linen.GRUCell: (run_gru, "rzn"),
}
"""How a cell of Flax is run: the function, and the names of the gates in its order."""


def _parameters(params: Any, gates: str) -> list[jax.Array]:
    """The kernels of the input and of the state, joined, and the biases of each where there are any."""
    sides = [[params[side + gate] for gate in gates] for side in "ih"]
    kernels = [jnp.concatenate([layer["kernel"] for layer in side], -1) for side in sides]
    return kernels + [
        jnp.concatenate([layer.get("bias", jnp.zeros_like(layer["kernel"], shape=layer["kernel"].shape[-1:])) for layer in side])
        for side in sides
        if any("bias" in layer for layer in side)
    ]
