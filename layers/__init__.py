"""Layers for JAX whose gradient is written by hand."""

import importlib as _importlib
import importlib.util as _util
import pkgutil as _pkgutil
from typing import TYPE_CHECKING as _TYPE_CHECKING

from layers.activations.geglu import geglu as geglu
from layers.activations.gelu import gelu as gelu
from layers.activations.mish import mish as mish
from layers.activations.relu import relu as relu
from layers.activations.relu_squared import relu_squared as relu_squared
from layers.activations.silu import silu as silu
from layers.activations.softplus import softplus as softplus
from layers.activations.swiglu import swiglu as swiglu
from layers.affine.linear import Linear as Linear
from layers.affine.linear import LinearFunction as LinearFunction
from layers.affine.linear import linear as linear
from layers.attention.dot_product_attention import dot_product_attention as dot_product_attention
from layers.attention.multi_head_attention import MultiHeadAttention as MultiHeadAttention
from layers.attention.rotary_embedding import rotary_embedding as rotary_embedding
from layers.checking.advise import advise as advise
from layers.checking.audit import Residuals as Residuals
from layers.checking.contract import check as check
from layers.checking.gradcheck import GradcheckError as GradcheckError
from layers.checking.gradcheck import gradcheck as gradcheck
from layers.checking.gradcheck import gradgradcheck as gradgradcheck
from layers.checking.implementations import implementations as implementations
from layers.checking.residuals import residuals as residuals
from layers.core.machine import compiling_for as compiling_for
from layers.embeddings.embed import Embed as Embed
from layers.embeddings.embed import embed as embed
from layers.experts.grouped_matmul import grouped_matmul as grouped_matmul
from layers.experts.modules import GatedMoE as GatedMoE
from layers.experts.modules import MoE as MoE
from layers.experts.moe import moe as moe
from layers.experts.top_k_routing import Routing as Routing
from layers.experts.top_k_routing import top_k_routing as top_k_routing
from layers.function.custom_vjp import custom_vjp as custom_vjp
from layers.function.custom_vjp import from_custom_vjp as from_custom_vjp
from layers.function.engine import engine as engine
from layers.function.function import Function as Function
from layers.function.function import forward_mode as forward_mode
from layers.function.function import once_differentiable as once_differentiable
from layers.implicit.argmin import argmin as argmin
from layers.implicit.deq import DEQ as DEQ
from layers.implicit.failure import ConvergenceError as ConvergenceError
from layers.implicit.fixed_point import fixed_point as fixed_point
from layers.implicit.root import root as root
from layers.implicit.rule import Convergence as Convergence
from layers.losses.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from layers.losses.linear_dpo import linear_dpo as linear_dpo
from layers.losses.linear_grpo import linear_grpo as linear_grpo
from layers.losses.linear_jsd import linear_jsd as linear_jsd
from layers.losses.linear_kl_divergence import linear_kl_divergence as linear_kl_divergence
from layers.losses.linear_kto import linear_kto as linear_kto
from layers.losses.linear_log_prob import linear_log_prob as linear_log_prob
from layers.losses.linear_orpo import linear_orpo as linear_orpo
from layers.losses.linear_ppo import linear_ppo as linear_ppo
from layers.losses.policy import PolicyMetrics as PolicyMetrics
from layers.losses.softmax_cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from layers.norms.add_layer_norm import add_layer_norm as add_layer_norm
from layers.norms.add_rms_norm import add_rms_norm as add_rms_norm
from layers.norms.batch_norm import BatchNorm as BatchNorm
from layers.norms.batch_norm import batch_norm as batch_norm
from layers.norms.group_norm import GroupNorm as GroupNorm
from layers.norms.group_norm import group_norm as group_norm
from layers.norms.layer_norm import LayerNorm as LayerNorm
from layers.norms.layer_norm import layer_norm as layer_norm
from layers.norms.rms_norm import RMSNorm as RMSNorm
from layers.norms.rms_norm import rms_norm as rms_norm
from layers.perceptrons.gated_mlp import GatedMLP as GatedMLP
from layers.perceptrons.gated_mlp import gated_mlp as gated_mlp
from layers.perceptrons.mlp import MLP as MLP
from layers.perceptrons.mlp import mlp as mlp
from layers.quantization.binarize import binarize as binarize
from layers.quantization.fake_quantize import fake_quantize as fake_quantize
from layers.quantization.finite_scalar_codes import finite_scalar_codes as finite_scalar_codes
from layers.quantization.finite_scalar_codes import finite_scalar_indices as finite_scalar_indices
from layers.quantization.finite_scalar_quantize import finite_scalar_quantize as finite_scalar_quantize
from layers.quantization.fp8_linear import Fp8Linear as Fp8Linear
from layers.quantization.fp8_linear import fp8_linear as fp8_linear
from layers.quantization.int8_linear import Int8Linear as Int8Linear
from layers.quantization.int8_linear import int8_linear as int8_linear
from layers.quantization.residual_vector_quantize import residual_vector_quantize as residual_vector_quantize
from layers.quantization.round_ste import round_ste as round_ste
from layers.quantization.ternarize import ternarize as ternarize
from layers.quantization.vector_quantize import QuantizationLosses as QuantizationLosses
from layers.quantization.vector_quantize import VectorQuantizer as VectorQuantizer
from layers.quantization.vector_quantize import vector_quantize as vector_quantize
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
from layers.regularization.dropout import Dropout as Dropout
from layers.regularization.dropout import dropout as dropout
from layers.reversible.reversible_coupling import reversible_coupling as reversible_coupling
from layers.reversible.reversible_stack import ReversibleStack as ReversibleStack
from layers.rewriting.report import RewriteReport as RewriteReport
from layers.rewriting.rewrite import rewrite as rewrite
from layers.surgery.add_gradient_noise import add_gradient_noise as add_gradient_noise
from layers.surgery.clip_gradient import clip_gradient as clip_gradient
from layers.surgery.replace_gradient import replace_gradient as replace_gradient
from layers.surgery.reverse_gradient import reverse_gradient as reverse_gradient
from layers.surgery.scale_gradient import scale_gradient as scale_gradient
from layers.surgery.straight_through import straight_through as straight_through
from layers.swapping import SwapReport as SwapReport
from layers.swapping import swap as swap

if _TYPE_CHECKING:
    from layers import linen as linen


def __getattr__(name: str):
    """Imports a part of the library that is not needed by the rest, such as `layers.linen`, where it is first used."""
    if name.startswith("_") or _util.find_spec(f"layers.{name}") is None:
        raise AttributeError(f"module 'layers' has no attribute '{name}'")
    return _importlib.import_module(f"layers.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(module.name for module in _pkgutil.iter_modules(__path__))})
