"""Every touch of JAX that is private or differs between releases, in one place.

Written against JAX 0.10 (the newest for Python 3.11) and 0.12. The private names, and what is lost where a release has moved one: `core/private.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Literal
from jax.sharding import AxisType

from layers.core import private

__all__ = [
    "Literal",
    "SymbolicZero",
    "Tracer",
    "children",
    "cudnn_attention_backward",
    "cudnn_attention_forward",
    "define_linear_primitive",
    "depends_on",
    "evaluate",
    "is_explicit",
    "is_key",
    "linearized",
    "match_placement",
    "may_be_batched",
    "missing_of_cudnn",
    "mosaic_interpreter",
    "mosaic_load",
    "on_first_device",
    "open_jaxpr",
    "scan_counts",
    "source_frames",
    "tangent_type",
    "tpu_flash_attention",
    "tpu_flash_attention_backward",
    "traced_at",
    "used_inputs",
    "vary_like",
    "varying_axes",
    "with_leading_axis",
    "zero_tangent",
    "zeros",
]

_jax: Any = SimpleNamespace(**private.FOUND)


def is_key(x: Any) -> bool:
    """Whether `x` (an array or its type) is a typed PRNG key array."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def tangent_type(aval: Any) -> Any:
    """The type of a tangent of a value of type `aval`: the same for floats, `float0` for the rest."""
    if _jax.to_tangent_aval is None or _jax.strip_weak_type is None:
        dtype = aval.dtype if jnp.issubdtype(aval.dtype, np.inexact) else jax.dtypes.float0
        return jax.ShapeDtypeStruct(aval.shape, dtype, sharding=getattr(aval, "sharding", None))
    return aval.to_tangent_aval().strip_weak_type()


def varying_axes(aval: Any) -> frozenset[str]:
    """The manual mesh axes (`shard_map(check_vma=True)`) over which a value differs from device to device."""
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)


def match_placement(x: jax.Array, aval: Any) -> jax.Array:
    """Gives a cotangent the placement of its primal.

    Under `shard_map` a cotangent is summed over the mesh axes that it varies over and its primal does not, and marked
    as varying over those that only the primal varies over. On a mesh with explicit axes it is resharded.
    """
    have, want = varying_axes(jax.typeof(x)), varying_axes(aval)
    if have - want:
        x = lax.psum(x, tuple(sorted(have - want)))
    if want - have:
        x = lax.pcast(x, tuple(sorted(want - have)), to="varying")
    sharding = getattr(aval, "sharding", None)
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return x if jax.typeof(x).sharding == sharding else jax.sharding.reshard(x, sharding)


def is_staged() -> bool:
    """Whether operations become part of a program that is traced, be it within a transformation, and are not computed at once."""
    return isinstance(jax.lax.iota(jnp.int32, 1), Tracer)


def is_explicit(aval: Any) -> bool:
    """Whether a type says that it is sharded over explicit axes of a mesh."""
    sharding = getattr(aval, "sharding", None)
    return sharding is not None and AxisType.Explicit in sharding.mesh.axis_types and any(p is not None for p in sharding.spec)


def zeros(aval: Any) -> jax.Array:
    """Zeros of the shape, dtype and placement of `aval`."""
    return match_placement(jnp.zeros(aval.shape, aval.dtype), aval)


def zero_tangent(aval: Any) -> Any:
    """Zeros of a tangent type: of NumPy for `float0`, the tangents of integers."""
    return np.zeros(aval.shape, jax.dtypes.float0) if aval.dtype == jax.dtypes.float0 else zeros(aval)


def on_first_device(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    """`x` on the first device along these manual mesh axes, zero on the others: so that a sum over the devices counts it once."""
    if not axes:
        return x
    first = sum(lax.axis_index(a) for a in axes) == 0
    return jnp.where(first, lax.pcast(x, tuple(axes), to="varying"), 0)


def with_leading_axis(aval: Any, axis: Any) -> Any:
    """The type of a batch of `axis.size` values of type `aval`."""
    return _jax.unmapped_aval(axis.size, 0, aval, axis.explicit_mesh_axis)


def depends_on(fn: Callable[..., Any], args: Sequence[Any], marked: Sequence[bool]) -> list[bool]:
    """For each output of `fn(*args)`, whether it is computed from a marked argument."""
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    reached = {v for v, m in zip(jaxpr.invars, marked, strict=True) if m}
    for eqn in jaxpr.eqns:
        if any(not isinstance(v, Literal) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return [not isinstance(v, Literal) and v in reached for v in jaxpr.outvars]


def varies(arrays: Any) -> bool:
    """Whether any of a pytree of arrays varies over a manual mesh axis."""
    return any(varying_axes(jax.typeof(x)) for x in jax.tree.leaves(arrays))


def vary_like(carry: Any, step: Callable[[Any], Any], *beside: Any) -> Any:
    """`carry` marked as varying over every manual mesh axis that `step(carry)` varies over.

    Args:
        carry: a pytree of arrays, what a loop starts from.
        step: a step of the loop; it is not traced where nothing varies.
        *beside: what makes the result vary, beside the carry: pytrees of the other arrays that `step` uses.
    """
    if not varies((carry, beside)):
        return carry
    leaves, tree = jax.tree.flatten(carry)
    while True:
        after = jax.make_jaxpr(lambda *xs: jax.tree.leaves(step(tree.unflatten(xs))))(*leaves).out_avals
        missing = [varying_axes(a) - varying_axes(jax.typeof(x)) for a, x in zip(after, leaves, strict=True)]
        if not any(missing):
            return tree.unflatten(leaves)
        leaves = [lax.pcast(x, tuple(sorted(m)), to="varying") if m else x for x, m in zip(leaves, missing, strict=True)]


def children(node: Any) -> tuple[Sequence[Any], Any] | None:
    """The direct children of a pytree node and its key data, or None for a leaf."""
    parts, tree = jax.tree.flatten(node, is_leaf=lambda x: x is not node)
    data = tree.node_data()
    return None if data is None else (parts, data[1])


def linearized(arrays: Sequence[Any], rule: Callable[..., tuple[list[Any], Callable[[list[Any]], list[Any]]]]) -> list[Any] | None:
    """The outputs of a rule where reverse mode is under way and an array moves, else None.

    What `jax.custom_jvp` does there, less the partial evaluation that finds out which part of its rule is linear: `rule(primals, moving)`
    says so itself. It returns the outputs, and their tangents as a function of those of the arrays that move.
    """
    if private.missing(private.SHORT_WAY):
        return None
    with _jax.take_current_trace() as trace:
        if not isinstance(trace, _jax.LinearizeTrace):
            return None
        primals, tangents = zip(*map(trace.to_primal_tangent_pair, arrays), strict=True)
        differentiated = tuple(type(t) is not _jax.Zero and jax.typeof(t).dtype != jax.dtypes.float0 for t in tangents)
        if not any(differentiated):
            return None
        with _jax.set_current_trace(trace.parent_trace):
            outputs, push = rule(primals, differentiated)
        with _jax.set_current_trace(trace.tangent_trace), _jax.set_name_stack(trace._name_stack_suffix()):
            dots = push([t for t, m in zip(tangents, differentiated, strict=True) if m])
        return [y if type(t) is SymbolicZero else _jax.LinearizeTracer(trace, y, t) for y, t in zip(outputs, dots, strict=True)]


def may_be_batched(arrays: Sequence[Any]) -> bool:
    """Whether `jax.vmap` may be tracing with some of the arrays as its batch."""
    return _jax.BatchTracer is None or any(isinstance(x, _jax.BatchTracer) for x in arrays)


def define_linear_primitive(
    name: str,
    *,
    out_avals: Callable[..., Sequence[Any]],
    evaluate: Callable[..., Sequence[Any]],
    jvp: Callable[..., tuple[Sequence[Any], Sequence[Any]]],
    transpose: Callable[..., Sequence[Any]],
    batch: Callable[..., tuple[Sequence[Any], Sequence[int | None]]],
) -> Callable[..., list[Any]]:
    """A JAX operation given by its rules; returns the function that applies it to arrays.

    `jvp` gets `None` for a tangent that is zero and may return `None`; `transpose` gets `None` for a cotangent that is zero
    and, in place of each operand, the operand or `None` where its cotangent is wanted; `batch` gets the axis (`.size`, `.name`, `.spmd_name`).
    """
    if private.missing(private.LINEAR):
        return lambda *_, **__: private.require(private.LINEAR)  # type: ignore[return-value]
    primitive = _jax.Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(lambda *_, **params: list(out_avals(**params)))

    def jvp_rule(primals, tangents, **params):
        given = [None if type(t) is _jax.Zero else t for t in tangents]
        outs, out_tangents = jvp(primals, given, **params)
        avals = [tangent_type(jax.typeof(o)) for o in outs]
        return outs, [_jax.Zero(a) if t is None else t for t, a in zip(out_tangents, avals, strict=True)]

    def transpose_rule(cotangents, *operands, **params):
        cts = [None if type(c) is _jax.Zero else c for c in cotangents]
        return transpose(cts, *[None if _jax.is_undefined_primal(x) else x for x in operands], **params)

    _jax.primitive_jvps[primitive] = jvp_rule
    _jax.primitive_transposes[primitive] = transpose_rule
    _jax.fancy_primitive_batchers[primitive] = batch
    _jax.register_lowering(primitive, _jax.lower_fun(evaluate, multiple_results=True))
    return primitive.bind


def open_jaxpr(jaxpr: Any) -> Any:
    """The jaxpr inside a closed one (JAX 0.10 has both kinds), or itself."""
    inner = getattr(jaxpr, "jaxpr", None)
    return jaxpr if inner is None or not hasattr(inner, "eqns") else inner


def used_inputs(jaxpr: Any) -> list[bool]:
    """Which inputs of a jaxpr its outputs are computed from."""
    if _jax.dce_jaxpr is not None:
        return list(_jax.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])
    reached = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        if not reached.isdisjoint(eqn.outvars):
            reached.update(v for v in eqn.invars if not isinstance(v, Literal))
    return [v in reached for v in jaxpr.invars]


def source_frames(eqn: Any) -> list[tuple[str, int, str]]:
    """File, line and function of the Python frames outside JAX that an equation was traced in, innermost first."""
    traceback = eqn.source_info.traceback
    if traceback is None or private.missing(private.LINES):
        return []
    return [(f.file_name, f.start_line, f.function_name) for f in _jax.user_frames(traceback)]


def evaluate(eqn: Any, args: Sequence[Any]) -> Sequence[Any]:
    """The outputs of one equation of a jaxpr, for arrays in place of its inputs."""
    private.require(private.REWRITE)
    params = eqn.primitive.get_bind_params(eqn.params)
    fns, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10.2 gave functions beside the parameters
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*fns, *args, **params)
    return out if eqn.primitive.multiple_results else [out]


def traced_at(eqn: Any, stack: Any) -> Any:
    """A context in which operations are traced under the source line of an equation, and the scopes `stack` inside those there are."""
    if private.missing(private.LINES):
        return contextlib.nullcontext()
    return _jax.user_context(eqn.source_info.traceback, name_stack=_jax.current_name_stack() + stack)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many inputs of a scan are the same in each step, and how many are carried from one to the next."""
    p = eqn.params
    if "num_consts" in p:
        return p["num_consts"], p["num_carry"]
    consts, carry, _ = p["ft_in"].unpack()  # JAX 0.12
    return len(consts), len(carry)


def missing_of_cudnn() -> list[str]:
    """The private names of attention by cuDNN that this release of JAX does not have."""
    return private.missing(private.CUDNN)


def cudnn_attention_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, lengths: tuple[jax.Array, jax.Array] | None, **options: Any
) -> list[jax.Array]:
    """The output (batch, time, heads, head_dim) and the logsumexp (batch, heads, time), in float32.

    `jax.nn` has the first alone, or both rounded. `options`: scale; causal; window, the number of keys that a query sees up to its own, or None.
    """
    return _cudnn_attention(_jax.cudnn_forward, (q, k, v, bias, lengths), (), **options, wants_bias=False, beside={"is_training": True})


def cudnn_attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    lengths: tuple[jax.Array, jax.Array] | None,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    **options: Any,
) -> list[jax.Array]:
    """dq, dk, dv and, with `wants_bias`, dbias; the other options are those of `cudnn_attention_forward`."""
    return _cudnn_attention(_jax.cudnn_backward, (q, k, v, bias, lengths), (lse, out, dout), **options, beside={})


def _cudnn_attention(
    primitive: Any,
    arrays: tuple[Any, ...],
    after: tuple[Any, ...],
    *,
    scale: float,
    causal: bool,
    window: int | None,
    wants_bias: bool,
    beside: dict[str, Any],
) -> list[jax.Array]:
    q, k, v, bias, lengths = arrays
    none = jnp.zeros(0, q.dtype)
    masks = _jax.cudnn_masks
    padded = lengths is not None
    mask = (masks.PADDING_CAUSAL if padded else masks.CAUSAL) if causal else (masks.PADDING if padded else masks.NO_MASK)
    if "score_mod" in inspect.signature(_jax.cudnn_options).parameters:  # from JAX 0.11 on
        beside = beside | {"score_mod": None}
    return primitive.bind(
        *(q, k, v, none if bias is None else bias),
        *((none, none) if lengths is None else [n.astype(jnp.int32) for n in lengths]),
        *(none, none, none, none),  # offsets of packed sequences, tables of pages
        *after,
        scale=scale,
        seed=0,
        dropout_rate=0.0,
        variadic_args=(bias is not None, wants_bias),
        mask_type=mask,
        layout=_jax.cudnn_layouts.BTNH.value,
        sliding_window_length=window,
        **beside,
    )


def tpu_flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    *,
    causal: bool,
    scale: float,
    blocks: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The output of JAX's flash attention for TPUs, and of each query the sum of exp(score - largest) and the largest score.

    Arrays are (batch, heads, time, head_dim), and (batch, heads, time); the public function has the output alone.
    """
    flash = _tpu_flash()
    rows, columns = blocks
    return flash._flash_attention_impl(q, k, v, bias, _tpu_segments(segments), True, causal, scale, 1, rows, columns, columns, False)


def tpu_flash_attention_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    total: jax.Array,
    largest: jax.Array,
    dout: jax.Array,
    delta: jax.Array,
    *,
    causal: bool,
    scale: float,
    blocks: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """dq, dk, dv and dbias, from `total` and `largest` of `tpu_flash_attention` and from delta, the sum of dout out."""
    flash = _tpu_flash()
    rows, columns = blocks
    given = (q, k, v, bias, _tpu_segments(segments), total, largest, dout, delta)
    options = {"sm_scale": scale, "causal": causal, "mask_value": flash.DEFAULT_MASK_VALUE, "debug": False}
    by_keys = {"block_q_major": rows, "block_q": rows, "block_k_major": columns, "block_k": columns}
    dk, dv = flash._flash_attention_bwd_dkv(*given, **by_keys, **options)
    dq, dbias = flash._flash_attention_bwd_dq(*given, block_q_major=rows, block_k_major=columns, block_k=columns, **options)
    return dq, dk, dv, dbias


def _tpu_flash() -> Any:
    return importlib.import_module("jax.experimental.pallas.ops.tpu.flash_attention")  # where it is used: Pallas takes long to import


def _tpu_segments(segments: Any) -> Any:
    return None if segments is None else _tpu_flash().SegmentIds(*segments)


def mosaic_interpreter(**options: Any) -> Any:
    """The parameters of the interpreter of Mosaic's kernels for GPUs: public from JAX 0.11 on."""
    public = getattr(importlib.import_module("jax.experimental.pallas.mosaic_gpu"), "InterpretGPUParams", None)
    return (public or private.find_later("mosaic_interpreter"))(**options)


def mosaic_load(ref: Any, layout: Any) -> jax.Array:
    """`plgpu.load` of all of a reference, from the GPU's memory or shared memory; it takes an index before JAX 0.12."""
    load: Any = importlib.import_module("jax.experimental.pallas.mosaic_gpu").load
    index = ((),) if "idx" in inspect.signature(load).parameters else ()
    return load(ref, *index, layout=layout, optimized=False)
