"""Attention by cuDNN, on NVIDIA GPUs, as `jax.nn` has it."""

from __future__ import annotations

from typing import Any

import jax


def attend_by_cudnn(query: Any, key: Any, value: Any, bias: Any, mask: Any, *, return_logsumexp: bool, others: dict[str, Any], **options: Any) -> Any:
    """`jax.nn.dot_product_attention` with these options.

    Raises:
        ValueError: where one of `others` is not None: options that it does not have.
    """
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise ValueError(f"dot_product_attention: implementation='cudnn' has no {', '.join(given)}; use implementation='xla'")
    extra = {"return_residual": True} if return_logsumexp else {}
    theirs: Any = jax.nn.dot_product_attention
    return theirs(query, key, value, bias, mask, implementation="cudnn", **options, **extra)
