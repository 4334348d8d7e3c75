"""JAX's operations by what they do, as the patterns need to know them."""

from __future__ import annotations

from typing import Any

from layers.core import compat


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CASTS = _names("convert_element_type")
MOVES = _names("broadcast_in_dim reshape transpose squeeze expand_dims")
VARYING = _names("pvary")
"""The same numbers on each device of a `shard_map`, said to differ."""
LAYOUT = MOVES | VARYING
"""The same numbers in other places, or repeated."""
UNARY = _names(
    "exp exp2 log log1p expm1 tanh logistic sin cos tan sqrt rsqrt cbrt square integer_pow erf erfc erf_inv abs sign is_finite not neg "
    "floor ceil round asin acos atan sinh cosh asinh acosh atanh stop_gradient one_minus_square"
)
BINARY = _names("add sub mul div max min pow rem atan2 and or xor ge gt le lt eq ne select_n clamp nextafter add_any shift_left shift_right_logical")
OTHERS = _names(
    "slice concatenate pad rev split iota cumsum argmax argmin reduce_sum reduce_max reduce_min reduce_and reduce_or gather dynamic_slice "
    "dynamic_update_slice copy"
)
FOLDABLE = UNARY | BINARY | MOVES | CASTS | OTHERS
"""What may be computed while a function is rewritten, where it depends on no argument."""
INLINED = _names("jit pjit closed_call core_call")
REMAT = _names("remat2 checkpoint remat")
RULED = _names("custom_jvp_call")
LIGHT = UNARY | BINARY | MOVES | CASTS | _names("slice concatenate pad rev split iota copy bitcast_convert_type")
"""What may be done again for a backward pass: elementwise operations, and moves of what they give."""


def is_light(n: Any) -> bool:
    """Whether an operation, or all of those that it holds, cost little."""
    if n.name in RULED:
        return _all_light(n.params["call_jaxpr"])
    return n.name in LIGHT and not n.eqn.effects


def _all_light(jaxpr: Any) -> bool:
    inner = lambda e: e.params.get("jaxpr", e.params.get("call_jaxpr"))
    name = lambda e: e.primitive.name
    return all(name(e) in LIGHT or (name(e) in INLINED | RULED and _all_light(inner(e))) for e in compat.open_jaxpr(jaxpr).eqns)
