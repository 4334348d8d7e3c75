"""Layers that run along time, with their backward pass as a loop of its own."""

from layers.recurrent.checkpointed_scan import checkpointed_scan as checkpointed_scan
from layers.recurrent.checkpointed_scan import checkpointed_while as checkpointed_while
from layers.recurrent.gated_delta_rule import gated_delta_rule as gated_delta_rule
from layers.recurrent.gated_linear_attention import gated_linear_attention as gated_linear_attention
from layers.recurrent.gru import GRU as GRU
from layers.recurrent.gru import gru as gru
from layers.recurrent.linear_recurrence import linear_recurrence as linear_recurrence
from layers.recurrent.lstm import LSTM as LSTM
from layers.recurrent.lstm import lstm as lstm
from layers.recurrent.mamba import Mamba as Mamba
from layers.recurrent.rnn import RNN as RNN
from layers.recurrent.selective_scan import selective_scan as selective_scan
from layers.recurrent.short_convolution import short_convolution as short_convolution
from layers.recurrent.state_space_dual import state_space_dual as state_space_dual
