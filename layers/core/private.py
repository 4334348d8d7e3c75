"""The private names of JAX that the library uses: where each is, and what is lost in a release that has moved it.

Each is looked for once. What is not found is None, `import layers` goes on, and what needs it says so when it is used.
"""

from __future__ import annotations

import pkgutil
from typing import Any

import jax

LINEAR = "the engine of linear operations: every Function runs as a `jax.custom_vjp`, without forward mode and exact flags"
SHORT_WAY = "the short way of reverse mode: a gradient takes longer to trace"
LINES = "the source lines of `layers.residuals` and of what `layers.rewrite` leaves as it is"
UNUSED = "what `layers.residuals` knows of values that are kept and not used: it sees the unused ones of plain operations only"
REWRITE = "`layers.rewrite`"
BATCHES = "knowing where a batch is traced: a gradient under the engine of custom_vjp takes longer to trace"
CUDNN = "attention by cuDNN"
INTERPRETER = "running Mosaic's kernels for GPUs on a CPU, before JAX 0.11: their tests"
_CUDNN = "jax._src.cudnn.fused_attention_stablehlo"

NAMES = {
    "Primitive": ("jax.extend.core:Primitive", LINEAR),
    "Zero": ("jax.interpreters.ad:Zero", LINEAR),
    "primitive_jvps": ("jax.interpreters.ad:primitive_jvps", LINEAR),
    "primitive_transposes": ("jax.interpreters.ad:primitive_transposes", LINEAR),
    "is_undefined_primal": ("jax.interpreters.ad:is_undefined_primal", LINEAR),
    "fancy_primitive_batchers": ("jax.interpreters.batching:fancy_primitive_batchers", LINEAR),
    "register_lowering": ("jax.interpreters.mlir:register_lowering", LINEAR),
    "lower_fun": ("jax.interpreters.mlir:lower_fun", LINEAR),
    "unmapped_aval": ("jax._src.core:unmapped_aval", LINEAR),
    "to_tangent_aval": ("jax.core:ShapedArray.to_tangent_aval", LINEAR),
    "strip_weak_type": ("jax.core:ShapedArray.strip_weak_type", LINEAR),
    "set_current_trace": ("jax._src.core:set_current_trace", SHORT_WAY),
    "take_current_trace": ("jax._src.core:take_current_trace", SHORT_WAY),
    "LinearizeTrace": ("jax._src.interpreters.ad:LinearizeTrace", SHORT_WAY),
    "LinearizeTracer": ("jax._src.interpreters.ad:LinearizeTracer", SHORT_WAY),
    "to_primal_tangent_pair": ("jax._src.interpreters.ad:LinearizeTrace.to_primal_tangent_pair", SHORT_WAY),
    "name_stack_suffix": ("jax._src.interpreters.ad:LinearizeTrace._name_stack_suffix", SHORT_WAY),
    "set_name_stack": ("jax._src.source_info_util:set_name_stack", SHORT_WAY),
    "user_frames": ("jax._src.source_info_util:user_frames", LINES),
    "user_context": ("jax._src.source_info_util:user_context", LINES),
    "current_name_stack": ("jax._src.source_info_util:current_name_stack", LINES),
    "dce_jaxpr": ("jax._src.interpreters.partial_eval:dce_jaxpr", UNUSED),
    "BatchTracer": ("jax._src.interpreters.batching:BatchTracer", BATCHES),
    "get_bind_params": ("jax.extend.core:Primitive.get_bind_params", REWRITE),
    "cudnn_masks": (f"{_CUDNN}:MaskType", CUDNN),
    "cudnn_layouts": (f"{_CUDNN}:AttentionLayout", CUDNN),
    "cudnn_forward": (f"{_CUDNN}:_dot_product_attention_fwd_p_wrapper", CUDNN),
    "cudnn_backward": (f"{_CUDNN}:_dot_product_attention_bwd_p_wrapper", CUDNN),
    "cudnn_options": (f"{_CUDNN}:_dot_product_attention_fwd_impl", CUDNN),
}
"""Of each name, where it is found and what is lost without it."""

LATER = {"mosaic_interpreter": ("jax._src.pallas.mosaic_gpu.interpret.params:InterpretGPUParams", INTERPRETER)}
"""Names of modules that take long to import, found when they are used."""


def _find(place: str) -> Any:
    try:
        return pkgutil.resolve_name(place)
    except (AttributeError, ImportError):
        return None


FOUND: dict[str, Any] = {name: _find(place) for name, (place, _) in NAMES.items()}
"""Each name's object, None where this release of JAX has it elsewhere."""


def find_later(name: str) -> Any:
    """The object of one of `LATER`.

    Raises:
        RuntimeError: where this release of JAX has it elsewhere.
    """
    place, lost = LATER[name]
    found = _find(place)
    if found is None:
        raise RuntimeError(f"JAX {jax.__version__} has no {place}, and without that is lost {lost}")
    return found


def missing(loss: str) -> list[str]:
    """The places of the names that are not found and without which this is lost."""
    return [place for name, (place, lost) in NAMES.items() if lost == loss and FOUND[name] is None]


def require(loss: str) -> None:
    """Raises where a name is not found without which this is lost.

    Raises:
        RuntimeError: it says which.
    """
    absent = missing(loss)
    if absent:
        raise RuntimeError(f"JAX {jax.__version__} has no {', no '.join(absent)}, and without that is lost {loss}")
