"""What takes the place of attention: a call of `dot_product_attention` with its operands in that function's layout."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.attention.dot_product_attention import dot_product_attention
from layers.core.numerics import wide
from layers.rewriting.axes import Atom, Axis, arrange, length, restore
from layers.rewriting.dropped import Dropout
from layers.rewriting.graph import Value
from layers.rewriting.masks import Band, Mask
from layers.rewriting.scores import Scores


@dataclass
class Roles:
    """The atoms by what they are: batch axes that a mask tells apart, heads, groups of heads of queries, queries, keys, features of both kinds."""

    batch: list[Atom]
    heads: list[Atom]
    groups: list[Atom]
    queries: list[Atom]
    keys: list[Atom]
    features: list[Atom]
    value_features: list[Atom]

    @property
    def plane(self) -> list[list[Atom]]:
        return [self.batch, self.heads + self.groups, self.queries, self.keys]


class Rule:
    """Computes what the pattern does, by `dot_product_attention`."""

    def __init__(self, roles: Roles, axes: Any, scores: Scores, band: Band, masks: list[Mask], dropout: Dropout, out_axes: list[Axis], out: Value):
        self.roles, self.axes, self.scores, self.band, self.masks, self.dropout = roles, axes, scores, band, masks, dropout
        self.out_axes, self.out = out_axes, out

    @property
    def keeps(self) -> int:
        r = self.roles
        rows = math.prod(length(x) for x in (r.batch, r.heads, r.groups, r.queries))
        lost = self.out.size * 4 if self.out.dtype.itemsize < 4 else 0
        drawn = self.dropout.value.bytes if self.dropout.value is not None else 0
        return rows * 4 + lost + drawn

    @property
    def detail(self) -> str:
        s = self.scores
        cap = f", cap {s.cap:g}" if s.cap else ""
        rest = (
            ", mask" * bool(self.masks) + ", bias" * bool(s.terms) + ", sinks" * (s.sink is not None) + ", dropout" * (self.dropout.value is not None)
        )
        return f"scale {s.scale:.4g}{self.band}{cap}{rest}"

    def __call__(self, q: Any, k: Any, v: Any, *rest: Any) -> list[Any]:
        r, s = self.roles, self.scores
        rest_ = list(rest)
        dtype = functools.reduce(jnp.promote_types, (x.dtype for x in (q, k, v)))
        heads = r.heads + r.groups
        q = arrange(q.astype(dtype), self.axes[0], [r.batch, r.queries, heads, r.features])
        k = arrange(k.astype(dtype), self.axes[1], [r.batch, r.keys, r.heads, r.features])
        v = arrange(v.astype(dtype), self.axes[2], [r.batch, r.keys, r.heads, r.value_features])
        bias = sinks = None
        if s.terms:
            bias = arrange(rest_.pop(0), s.terms[0].axes, r.plane)
            bias = -bias if s.terms[0].negative else bias
        if s.sink is not None:
            sinks = jnp.broadcast_to(arrange(rest_.pop(0), s.sink.axes, [heads])[: length(heads)], (length(heads),)).astype(wide(dtype))
        mask = self._mask(rest_)
        drop = self._drop(rest_)
        options = {"is_causal": self.band.is_causal, "local_window_size": self.band.window, "logit_soft_cap": s.cap, **drop}
        blind = mask is not None and any(m.low != -math.inf for m in self.masks)
        if blind and drop:  # what a row that sees nothing drops counts: its scores become 0
            mask, sees = self._seen(mask, q.shape[1], k.shape[1])
            q, mask = jnp.where(sees, q, 0), mask | ~mask.any(-1, keepdims=True)
            options |= {"is_causal": False, "local_window_size": None}
        y = dot_product_attention(q, k, v, bias, mask, scale=s.scale, sinks=sinks, **options)
        if blind and not drop:
            y = self._of_blind_rows(y, mask, v)
        return [restore(y, [r.batch, r.queries, heads, r.value_features], self.out_axes, self.out.shape).astype(self.out.dtype)]

    def _mask(self, values: list[Any]) -> Any:
        """The conjunction of the masks that are passed on."""
        planes = []
        for m in self.masks:
            array = jnp.asarray(m.array) if m.array is not None else values.pop(0)
            plane = arrange(array, m.axes, self.roles.plane)
            planes.append(~plane if m.inverted else plane)
        return functools.reduce(jnp.logical_and, planes) if planes else None

    def _drop(self, values: list[Any]) -> dict[str, Any]:
        d = self.dropout
        if d.value is None:
            return {}
        plane = arrange(values.pop(0), d.axes or [], self.roles.plane)
        return {"dropout_rate": d.rate, "dropout_mask": ~plane if d.inverted else plane}

    def _seen(self, mask: Any, queries: int, keys: int) -> tuple[Any, Any]:
        """(mask, which queries see a key, laid out as those): what is seen by the mask and within the bounds."""
        low, high = self.band
        d = jnp.arange(keys)[None] - jnp.arange(queries)[:, None]
        seen = mask if low is None else mask & (d >= low)
        seen = seen if high is None else seen & (d <= high)
        return seen, jnp.swapaxes(seen.any(-1), 1, 2)[..., None]

    def _of_blind_rows(self, y: Any, mask: Any, v: Any) -> Any:
        """A row that sees nothing has the same score everywhere, hence the mean of all values."""
        _, sees = self._seen(mask, y.shape[1], v.shape[1])
        mean = v.mean(1, keepdims=True, dtype=wide(v.dtype)).astype(y.dtype)
        return jnp.where(sees, y, jnp.repeat(mean, y.shape[2] // v.shape[2], 2))
