"""The nnx modules of the library as Flax Linen modules, derived.

`layers.linen.Linear(3, 4)` takes what `layers.Linear(3, 4)` takes, without `rngs`. What is made of other modules (`DEQ`, `ReversibleStack`,
`RNN`) is made of Linen modules: they are called by the nnx module, as pure functions of their variables and random keys.

Parameters have the same names and lie in Linen's collections (`params`, `batch_stats`, ...); random streams are Linen's.
"""

from __future__ import annotations

from layers.attention.multi_head_attention import MultiHeadAttention as _MultiHeadAttention
from layers.dropout.dropout import Dropout as _Dropout
from layers.embeddings.embed import Embed as _Embed
from layers.linear.linear import Linear as _Linear
from layers.linen.deq import DEQ as DEQ
from layers.linen.derived import derive as derive
from layers.linen.reversible_stack import ReversibleStack as ReversibleStack
from layers.linen.rnn import RNN as RNN
from layers.mlp.gated_mlp import GatedMLP as _GatedMLP
from layers.mlp.mlp import MLP as _MLP
from layers.norms.batch_norm import BatchNorm as _BatchNorm
from layers.norms.group_norm import GroupNorm as _GroupNorm
from layers.norms.layer_norm import LayerNorm as _LayerNorm
from layers.norms.rms_norm import RMSNorm as _RMSNorm
from layers.quantization.fp8_linear import Fp8Linear as _Fp8Linear
from layers.quantization.int8_linear import Int8Linear as _Int8Linear
from layers.quantization.vector_quantize import VectorQuantizer as _VectorQuantizer
from layers.recurrent.gru import GRU as _GRU
from layers.recurrent.lstm import LSTM as _LSTM
from layers.recurrent.mamba import Mamba as _Mamba

BatchNorm = derive(_BatchNorm)
Dropout = derive(_Dropout)
Embed = derive(_Embed)
Fp8Linear = derive(_Fp8Linear)
GRU = derive(_GRU)
GatedMLP = derive(_GatedMLP)
GroupNorm = derive(_GroupNorm)
Int8Linear = derive(_Int8Linear)
LSTM = derive(_LSTM)
LayerNorm = derive(_LayerNorm)
Linear = derive(_Linear)
MLP = derive(_MLP)
Mamba = derive(_Mamba)
MultiHeadAttention = derive(_MultiHeadAttention)
RMSNorm = derive(_RMSNorm)
VectorQuantizer = derive(_VectorQuantizer)
