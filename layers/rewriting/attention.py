"""Attention: two products of matrices around a softmax over the keys, in any layout.

Who is who falls out of the atoms of the axes: those that are contracted in the first product are features, those that the softmax sums over are
keys, shared ones of queries, keys and values are batch and heads, and what only queries have are positions and, where keys and values have fewer
heads, the groups of these. Keys and values that are repeated for several heads are taken as they were before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from layers.attention.dot_product_attention import dot_product_attention
from layers.core.numerics import wide
from layers.rewriting.axes import Atom, Axis, arrange, dot_axes, flat, leaves, length, restore, through
from layers.rewriting.dropped import Dropout
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.masks import Band, Mask, conjuncts, static_band
from layers.rewriting.match import Match, Nearly, given, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.scores import Scores, find_product
from layers.rewriting.softmax import Softmax, find_softmax
from layers.rewriting.walk import is_product, unrepeated


def find_attention(n: Node) -> Match | None:
    """The attention whose softmax ends at the division `n`."""
    softmax = find_softmax(n)
    if softmax is None or find_product(softmax.scores) is None:
        return None
    try:
        return _find(n, softmax, see=True)
    except Nearly:
        return _find(n, softmax, see=False)


@dataclass
class Operand:
    """An array that is read, before it was repeated; its axes, and those after."""

    value: Value
    axes: list[Axis]
    full: list[Axis]

    @property
    def atoms(self) -> list[Atom]:
        return flat(self.axes)


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


def _find(n: Node, softmax: Softmax, *, see: bool) -> Match:
    product, steps = find_product(softmax.scores) or (n, [])
    need(is_product(product), "the product of queries and keys has a precision, sharding or dtype of its own")
    q, k = (Operand(*unrepeated(v, see)) for v in product.inputs)
    axes = given(dot_axes(product, q.full, k.full), "the axes of queries and keys do not fit")
    nodes = softmax.nodes | {product}
    features = [q.full[i] for i in product.params["dimension_numbers"][0][0]]
    scores = Scores(axes, nodes=nodes)
    for step in steps:
        scores.take(step)
    scores.finish()
    keys = [scores.axes[i] for i in softmax.axes]
    weights, axes, dropout = _weights(n.out, scores, softmax.axes, nodes)
    values_product = given(weights.only_user, "the weights are read elsewhere too")
    side = values_product.inputs.index(weights)
    need(is_product(values_product) and values_product.inputs[1 - side] is not weights, "the product with the values has a precision of its own")
    v = Operand(*unrepeated(values_product.inputs[1 - side], see))
    out_axes = given(dot_axes(values_product, *((axes, v.full) if side == 0 else (v.full, axes))), "the axes of the weights and values do not fit")
    contracted = values_product.params["dimension_numbers"][0][side]
    need({x for i in contracted for x in leaves(axes[i])} == set(flat(keys)), "the softmax is not over what the product with the values sums over")
    nodes.add(values_product)
    return _assemble(q, k, v, flat(features), flat(keys), scores, dropout, out_axes, values_product.out)


def _weights(weights: Value, scores: Scores, over: Sequence[int], nodes: set[Node]) -> tuple[Value, list[Axis], Dropout]:
    """The weights as they go into the product with the values, with their axes and what dropped some."""
    dropout = Dropout()
    axes = scores.axes
    cut = scores.sink is None
    while True:
        u = given(weights.only_user, "the weights are read elsewhere too")
        if u.name == "dot_general":
            need(cut, "the column of the sink goes into the product with the values")
            dropout.finish()
            return weights, axes, dropout
        if u.name == "slice" and not cut:
            need(_drops_last_column(u, over), "the weights are cut")
            cut = True
        elif u.name in ("mul", "div", "select_n"):
            need(cut, "the column of the sink is dropped too")
            dropout.take(u, weights, axes)
        else:
            need(u.name in LAYOUT or widens(u), f"the weights go through {u.name} before the product with the values")
            axes = given(through(u, axes), "the axes of the weights are lost")
            need(u.inputs[0].size == u.out.size and cut, "the axes of the weights are lost")
        nodes.add(u)
        weights = u.out


def _drops_last_column(n: Node, over: Sequence[int]) -> bool:
    p, x = n.params, n.inputs[0]
    ends = [m - 1 if i in over else m for i, m in enumerate(x.shape)]
    return len(over) == 1 and list(p["limit_indices"]) == ends and not any(p["start_indices"]) and p["strides"] is None


def _assemble(
    q: Operand, k: Operand, v: Operand, features: list[Atom], keys: list[Atom], scores: Scores, dropout: Dropout, out_axes: list[Axis], out: Value
) -> Match:
    if not set(keys) <= set(k.atoms) or set(keys) & set(q.atoms):
        q, k = k, q  # the keys may be the first operand of the product
    fits = set(keys) <= set(k.atoms) and not set(keys) & set(q.atoms) and features
    need(fits, "the softmax is not over the keys")
    shared = [x for x in q.atoms if x in k.atoms and x not in features]
    free = [x for x in q.atoms if x not in shared and x not in features]
    value_features = [x for x in v.atoms if x not in shared and x not in keys]
    need(set(k.atoms) == {*shared, *keys, *features}, "the keys have an axis of their own")
    need(set(v.atoms) == {*shared, *keys, *value_features}, "the values lack an axis of the keys")
    need(not set(free) & set(v.atoms) and not set(features) & set(v.atoms), "the values have an axis of the queries")
    need(free and value_features, "there are no positions of queries, or no features of values")
    masks = [c for m in scores.masks for c in conjuncts(m)]
    roles = _roles(shared, free, keys, features, value_features, masks)
    band, given = _split_masks(masks, roles)
    need(len(scores.terms) <= 1, "several biases are added")
    for t in scores.terms:
        need(set(flat(t.axes)) <= {x for g in roles.plane for x in g}, "the bias has an axis that the scores do not have")
    if scores.sink is not None:
        need(set(flat(scores.sink.axes)) <= {*roles.heads, *roles.groups}, "the sink is not one number for each head")
        need(not given, "a sink beside a mask that depends on the arguments")
    need(set(flat(dropout.axes or [])) <= {x for g in roles.plane for x in g}, "the mask of dropout has an axis that the weights do not have")
    counts = dropout.value is not None and any(m.low != -math.inf for m in given)
    need(not (counts and scores.terms), "dropout, a bias and a mask of which a query may see nothing")
    rule = Rule(roles, (q.axes, k.axes, v.axes), scores, band, given, dropout, out_axes, out)
    inputs = [q.value, k.value, v.value, *(t.value for t in scores.terms), *([scores.sink.value] if scores.sink else [])]
    inputs += [m.value for m in given if m.value is not None]
    inputs += [dropout.value] if dropout.value is not None else []
    return Match("dot_product_attention", scores.nodes, inputs, [out], rule, keeps=rule.keeps, detail=rule.detail, holds=[*inputs, out])


def _roles(shared: list[Atom], free: list[Atom], keys: list[Atom], features: list[Atom], value_features: list[Atom], masks: list[Mask]) -> Roles:
    told_apart = {x for m in masks for x in flat(m.axes)}
    queries = [x for x in free if x in told_apart] or [max(free, key=lambda x: x.size)]
    batch = [x for x in shared if x in told_apart] or shared[:1]
    heads, groups = [x for x in shared if x not in batch], [x for x in free if x not in queries]
    return Roles(batch, heads, groups, queries, keys, features, value_features)


def _split_masks(masks: list[Mask], roles: Roles) -> tuple[Band, list[Mask]]:
    """The bounds that some masks stand for, and the other masks."""
    band, given = Band(), []
    allowed = {x for g in roles.plane for x in g}
    for m in masks:
        need(set(flat(m.axes)) <= allowed, "the mask has an axis that the scores do not have")
        found = static_band(m, roles.batch, roles.heads + roles.groups, roles.queries, roles.keys)
        if found is None:
            need(m.low is not None, "large negative numbers are added to the scores in a pattern that is no band")
            given.append(m)
        else:
            band = band.within(found)
    return band, given


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
