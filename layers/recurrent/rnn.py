"""`flax.nnx.RNN` with the cells of this family."""

from __future__ import annotations

from layers.recurrent.gru import GRU
from layers.recurrent.lstm import LSTM
from layers.recurrent.whole_sequences import WholeSequences


class RNN(WholeSequences):
    """`flax.nnx.RNN`: the same arguments and parameters, with the backward pass of `lstm` and `gru`.

    Runs a cell of type LSTMCell, OptimizedLSTMCell or GRUCell with the default activations; any other is run by Flax's code. Values are Flax's, but
    with `seq_lengths` the outputs at padding: they are the state that is held there, where Flax runs the cell on the padding, too. And the
    carry of a sequence of length 0 is its initial one.

    Attributes:
        save: as in `lstm` and `gru`.

    A call takes `segment_ids` too, as `lstm` and `gru` do, where the cell is one of those.
    """

    cells = LSTM.cells | GRU.cells
