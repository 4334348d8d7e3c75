"""`flax.linen` with the layers of this library: `from layers import linen as nn` in a Linen file works as it is.

What Linen has too (`Dense`, `Embed`, `LayerNorm`, `MultiHeadDotProductAttention`, ...) is a subclass of Linen's, with the same fields, variables,
names and values. The other nnx modules of the library are derived: `linen.MLP(3, 4)` takes what `layers.MLP(3, 4)` takes, without `rngs`.
What is made of other modules (`DEQ`, `ReversibleStack`, `RNN`) is made of Linen modules. Everything else is `flax.linen`'s own.

Parameters lie in Linen's collections (`params`, `batch_stats`, ...); random streams are Linen's.
"""

from __future__ import annotations

from typing import Any

from flax import linen as _linen

from layers.affine.linear import Linear as _Linear
from layers.experts.modules import GatedMoE as _GatedMoE
from layers.experts.modules import MoE as _MoE
from layers.linen.attentions import MultiHeadAttention as MultiHeadAttention
from layers.linen.attentions import MultiHeadDotProductAttention as MultiHeadDotProductAttention
from layers.linen.attentions import SelfAttention as SelfAttention
from layers.linen.attentions import dot_product_attention as dot_product_attention
from layers.linen.deq import DEQ as DEQ
from layers.linen.derived import derive as derive
from layers.linen.drops import Dropout as Dropout
from layers.linen.normalizations import BatchNorm as BatchNorm
from layers.linen.normalizations import GroupNorm as GroupNorm
from layers.linen.normalizations import LayerNorm as LayerNorm
from layers.linen.normalizations import RMSNorm as RMSNorm
from layers.linen.projections import Dense as Dense
from layers.linen.projections import Embed as Embed
from layers.linen.reversible_stack import ReversibleStack as ReversibleStack
from layers.linen.rnn import RNN as RNN
from layers.perceptrons.gated_mlp import GatedMLP as _GatedMLP
from layers.perceptrons.mlp import MLP as _MLP
from layers.quantization.fp8_linear import Fp8Linear as _Fp8Linear
from layers.quantization.int8_linear import Int8Linear as _Int8Linear
from layers.quantization.vector_quantize import VectorQuantizer as _VectorQuantizer
from layers.recurrent.gru import GRU as _GRU
from layers.recurrent.lstm import LSTM as _LSTM
from layers.recurrent.mamba import Mamba as _Mamba

Fp8Linear = derive(_Fp8Linear)
GRU = derive(_GRU)
GatedMLP = derive(_GatedMLP)
GatedMoE = derive(_GatedMoE)
Int8Linear = derive(_Int8Linear)
LSTM = derive(_LSTM)
Linear = derive(_Linear)
MLP = derive(_MLP)
Mamba = derive(_Mamba)
MoE = derive(_MoE)
VectorQuantizer = derive(_VectorQuantizer)


def __getattr__(name: str) -> Any:
    return getattr(_linen, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *dir(_linen)})
