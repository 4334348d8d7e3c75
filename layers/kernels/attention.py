"""The kernels of attention, and what they are told of a call."""

from __future__ import annotations

from layers.kernels import cudnn_attention
from layers.kernels.attention_call import AttentionCall as AttentionCall
from layers.kernels.dispatch import Kernel

KERNELS = {
    "cudnn": Kernel(
        "cudnn",
        cudnn_attention.refuse,
        cudnn_attention.forward,
        cudnn_attention.backward,
        cudnn_attention.takes_backward,
        cudnn_attention.fails,
    ),
}
"""In the order in which they are tried."""
