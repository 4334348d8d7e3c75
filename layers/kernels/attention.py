"""The kernels of attention, and what they are told of a call."""

from __future__ import annotations

from typing import Any

from layers.kernels import cudnn_attention, tpu_attention
from layers.kernels.attention_call import AttentionCall as AttentionCall
from layers.kernels.dispatch import Kernel


def _kernel(name: str, module: Any) -> Kernel:
    return Kernel(name, module.refuse, module.forward, module.backward, module.takes_backward, module.fails)


KERNELS = {name: _kernel(name, module) for name, module in (("cudnn", cudnn_attention), ("mosaic", tpu_attention))}
"""In the order in which they are tried."""
