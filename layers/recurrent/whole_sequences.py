"""What makes a `flax.nnx.RNN` run its cell over the whole sequence by one function, where it knows the cell.

What is known of a cell stands in a table: its type, the names of its layers in the order of the gates, and the function to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.recurrent import flip_sequences
from jax import lax

from layers.core import checks
from layers.core.products import products_are_patched


@dataclass(frozen=True)
class KnownCell:
    """How a cell of Flax is run: by `run`, with the kernels and the biases of these layers of it, joined in this order."""

    run: Callable[..., tuple[jax.Array, Any]]
    input_layers: tuple[str, ...]
    recurrent_layers: tuple[str, ...]
    biased_layers: tuple[str, ...]

    def parameters(self, cell: Any) -> list[Any]:
        """The input kernel, the recurrent kernel and the bias."""
        named = ((self.input_layers, "kernel"), (self.recurrent_layers, "kernel"), (self.biased_layers, "bias"))
        return [_joined([getattr(getattr(cell, layer), name)[...] for layer in layers]) for layers, name in named]


class WholeSequences(nnx.RNN):
    """A `flax.nnx.RNN` that runs a cell it knows by one function, any other by Flax's code.

    Attributes:
        cells: what it knows.
        save: as in `lstm` and `gru`.
    """

    cells: ClassVar[dict[type, KnownCell]] = {}
    save = "states"

    def __init__(
        self, cell: Any, *, time_major: bool = False, return_carry: bool = False, reverse: bool = False, keep_order: bool = False, **options: Any
    ):
        who = type(self).__name__
        flags = {"time_major": time_major, "return_carry": return_carry, "reverse": reverse, "keep_order": keep_order}
        flags = {key: checks.flag(who, key, value) for key, value in flags.items()}
        super().__init__(checks.function(who, "cell", cell), **flags, **options)

    @classmethod
    def swap_obstacle(cls, rnn: Any) -> str:
        """Why an RNN is left to Flax's code; empty where it is not."""
        return _obstacle(rnn, cls.cells)

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        seq_lengths: Any = None,
        segment_ids: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        who = type(self).__name__
        given = {"return_carry": return_carry, "time_major": time_major, "reverse": reverse, "keep_order": keep_order}
        options = {key: checks.flag(who, key, value, optional=True) for key, value in given.items()}
        if obstacle := self.swap_obstacle(self):
            refuse_segment_ids(who, segment_ids, obstacle)
            return super().__call__(inputs, initial_carry=initial_carry, seq_lengths=seq_lengths, rngs=rngs, **options)
        order = {key: getattr(self, key) if value is None else value for key, value in options.items()}
        return_carry = order.pop("return_carry")
        x = checked_inputs(who, inputs, order["time_major"])
        cell: Any = self.cell
        if initial_carry is None:
            rngs = self.rngs if rngs is None else rngs
            rngs = rngs.carry.fork() if isinstance(rngs, nnx.Rngs) else rngs
            initial_carry = cell.initialize_carry(without_time(x.shape, order["time_major"]), rngs)
        known = self.cells[type(cell)]
        outputs, carry = run_cell(
            who, known.run, x, known.parameters(cell), initial_carry, seq_lengths, segment_ids, dtype=cell.dtype, save=self.save, **order
        )
        return (carry, outputs) if return_carry else outputs


def checked_inputs(who: str, inputs: Any, time_major: bool) -> jax.Array:
    """The inputs of a module as an array."""
    x = checks.array(who, "inputs", inputs, "real")
    if x.ndim < 2:
        raise ValueError(
            f"{who}: inputs have shape {x.shape}, but must be {'(time, *batch, features)' if time_major else '(*batch, time, features)'}"
        )
    return x


def run_cell(
    who: str,
    run: Callable[..., tuple[jax.Array, Any]],
    x: jax.Array,
    parameters: Sequence[jax.Array],
    initial_carry: Any,
    seq_lengths: Any,
    segment_ids: Any,
    *,
    time_major: bool,
    reverse: bool,
    keep_order: bool,
    dtype: Any,
    save: str,
) -> tuple[jax.Array, Any]:
    """What an RNN of Flax makes of its cell and `x`, by `lstm` or `gru`: the outputs, and the last carry.

    Args:
        who: the name of the module.
        run: `run_lstm` or `run_gru`.
        x: (*batch, time, features), or time first.
        parameters: of the cell, in the order of `run`.
        initial_carry, seq_lengths, time_major, reverse, keep_order: as Flax's RNN has them.
        segment_ids, save: as in `lstm` and `gru`.
        dtype: that of the cell, or None.
    """
    checks.shape(who, "inputs", x, (*x.shape[:-1], len(parameters[0])), "(..., in_features)")
    outputs, carry = run(
        who,
        x.astype(dtypes.canonicalize_dtype(x)),
        parameters,
        initial_carry,
        seq_lengths,
        segment_ids,
        reverse=reverse,
        time_major=time_major,
        dtype=dtypes.canonicalize_dtype(x, *parameters, dtype=dtype),
        save=save,
    )
    if reverse and not keep_order:
        outputs = flip_sequences(outputs, seq_lengths, num_batch_dims=x.ndim - 2, time_major=time_major)
    return outputs, carry


def refuse_segment_ids(who: str, segment_ids: Any, obstacle: str) -> None:
    """Raises ValueError where there are ids, which Flax's code, that runs the cell because of an obstacle, does not know."""
    if segment_ids is not None:
        raise ValueError(f"{who}: segment_ids are given, but the cell is run by Flax's code, which has none: {obstacle}")


def _obstacle(rnn: Any, cells: dict[type, KnownCell]) -> str:
    cell: Any = rnn.cell
    if type(cell) not in cells:
        return f"its cell is a {type(cell).__name__}"
    if cell.gate_fn is not nnx.sigmoid or cell.activation_fn is not nnx.tanh:
        return "its cell has activations of its own"
    known = cells[type(cell)]
    if cell.promote_dtype is not dtypes.promote_dtype or not all(_is_plain(getattr(cell, n)) for n in (*known.input_layers, *known.recurrent_layers)):
        return "its cell has products or promotions of its own"
    if rnn.broadcast_rngs is not None or rnn.state_axes != nnx.StateAxes({...: nnx.Carry}):
        return "it has state axes of its own"
    if products_are_patched():
        return "its products are taken over by another library"
    return ""


def _is_plain(layer: Any) -> bool:
    """Whether a layer of a cell is a linear layer, Flax's or this library's, and nothing more."""
    plain = isinstance(layer, nnx.Linear) and (type(layer) is nnx.Linear or type(layer).__module__ == "layers.affine.linear")
    return plain and layer.dot_general is lax.dot_general and layer.precision is None and layer.preferred_element_type is None


def _joined(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, -1)


def without_time(shape: tuple[int, ...], time_major: bool) -> tuple[int, ...]:
    """The shape of one step."""
    return shape[1:] if time_major else (*shape[:-2], shape[-1])
