"""Attention: two products of matrices around a softmax over the keys, in any layout.

Who is who falls out of the atoms of the axes: those that are contracted in the first product are features, those that the softmax sums over are
keys, shared ones of queries, keys and values are batch and heads, and what only queries have are positions and, where keys and values have fewer
heads, the groups of these. Keys and values that are repeated for several heads are taken as they were before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layers.rewriting.attention_rule import Roles, Rule
from layers.rewriting.axes import Atom, Axis, dot_axes, flat, leaves, through
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
