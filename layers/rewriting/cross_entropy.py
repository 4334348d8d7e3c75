"""Cross entropy: logsumexp or log-softmax of rows of logits with one class of each row, or a distribution, and the product that makes the logits.

Where the loss of each row is all that is read, and only summed up, its gradients are computed in forward. Where more is read (a z-loss, smoothing),
everything follows from three numbers a row:

    lp_y = -loss,   z_y = lse - loss,   Σ lp = Σ z - V lse,   Σ z = x Σ kernel + Σ bias
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from layers.core.numerics import wide
from layers.core.products import einsum
from layers.losses.linear_cross_entropy import linear_cross_entropy
from layers.losses.softmax_cross_entropy import softmax_cross_entropy
from layers.rewriting.follow import Follow
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.labels import NO_CLASS, Labels, takes_all
from layers.rewriting.logits import Head, find_head
from layers.rewriting.match import Match, need
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.readers import Readers, Reading
from layers.rewriting.softmax import StableExp, find_stable_exp
from layers.rewriting.walk import before_casts


def find_cross_entropy(n: Node) -> list[Match]:
    """The cross entropies whose logarithm is `n`: with the product that makes the logits, and without."""
    nodes = {n}
    exp = _exp_of_log(n, nodes)
    if exp is None:
        return []
    z = exp.scores
    if exp.axes != (z.ndim - 1,):
        return []
    readers = Readers(exp, n, Follow(z), nodes)
    readers.collect()
    readings, labels = readers.readings, readers.labels
    if all(r.is_lse for r in readings):
        return []
    soft = [r.distribution for r in readings if r.distribution is not None]
    need(not soft or (labels is None and len(soft) == 1), "several distributions are read")
    if labels is None or labels.outside != "nothing":  # else a label that is no class leaves lse
        readings = _without_logsumexp(readings, nodes)
    summed, more = _summed_up(readings)
    matches = []
    for some, reduction, extra in ((summed, "sum", more), (readings, "none", set())):
        if some is None:
            continue
        inside = nodes | extra
        head = find_head(z, lambda u, inside=inside: u in inside)
        if head is not None and not (head.cap and any(r.of_all for r in some)):
            matches.append(_match(inside | head.nodes, z, head, labels, some, reduction))
        matches.append(_match(inside, z, None, labels, some, reduction))
    return matches


def _exp_of_log(n: Node, nodes: set[Node]) -> StableExp | None:
    """The exp(z - max) of whose sum along each row `n` is the logarithm."""
    if n.name != "log":
        return None
    t = n.inputs[0]
    while t.node is not None and (t.node.name == "abs" or t.node.name in LAYOUT or widens(t.node)):
        nodes.add(t.node)
        t = t.node.inputs[0]
    if t.node is None or t.node.name != "reduce_sum":
        return None
    nodes.add(t.node)
    exp = find_stable_exp(before_casts(t.node.inputs[0], nodes), nodes)
    return exp if exp is not None and tuple(t.node.params["axes"]) == exp.axes else None


def _without_logsumexp(readings: list[Reading], nodes: set[Node]) -> list[Reading]:
    """Takes lse - z_y for the loss that it is, where both are read for nothing else."""
    if len(readings) != 2 or not readings[0].is_lse or not readings[1].raw or readings[1].at_label != 1 or readings[1].of_all:
        return readings
    (a, first), (b, second) = (_to_difference(r.value) for r in readings)
    if a is None or b is None or a is not b or a.name != "sub" or a.inputs[0] is not (first[-1].out if first else readings[0].value):
        return readings
    nodes |= {a, *first, *second}
    return [Reading(a.out, at_label=-1.0)]


def _to_difference(v: Value) -> tuple[Node | None, list[Node]]:
    """The node that is all that reads a number of each row, after the nodes that lay these out in their order."""
    chain: list[Node] = []
    while (u := v.only_user) is not None and _keeps_rows(u):
        chain.append(u)
        v = u.out
    return u, chain


def _keeps_rows(n: Node) -> bool:
    return widens(n) or takes_all(n) or (n.name in LAYOUT - {"transpose"} and n.inputs[0].size == n.out.size)


def _summed_up(readings: list[Reading]) -> tuple[list[Reading] | None, set[Node]]:
    """The sum over all rows of the only thing that is read, where it is read for nothing else, and the nodes on the way."""
    if len(readings) != 1 or readings[0].of_all or readings[0].raw:
        return None, set()
    v, sign, nodes = readings[0].value, 1.0, set()
    while (u := v.only_user) is not None:
        nodes.add(u)
        if u.name == "neg":
            sign = -sign
        elif u.name == "reduce_sum" and len(u.params["axes"]) == v.ndim and v.ndim:
            r = readings[0]
            return [replace(r, value=u.out, at_label=r.at_label * sign, sign=r.sign * sign)], nodes
        elif not _keeps_rows(u):
            break
        v = u.out
    return None, set()


def _match(nodes: set[Node], z: Value, head: Head | None, labels: Labels | None, readings: list[Reading], reduction: str) -> Match:
    distribution = next((r.distribution for r in readings if r.distribution is not None), None)
    rule = Rule(z.shape, head, labels, tuple(readings), reduction, distribution is not None)
    targets = [labels.value] if labels is not None else [distribution] if distribution is not None else []
    rows = z.size // z.shape[-1]
    keeps = 8 * rows if head is None or reduction == "none" else head.keeps
    name = "softmax_cross_entropy" if head is None else "linear_cross_entropy"
    inputs = [z] if head is None else head.inputs
    return Match(name, nodes, [*inputs, *targets], [r.value for r in readings], rule, keeps=keeps, detail=rule.detail)


@dataclass(frozen=True)
class Rule:
    """Computes what is read of the logits, by `linear_cross_entropy` or `softmax_cross_entropy`."""

    shape: tuple[int, ...]
    head: Head | None
    labels: Labels | None
    readings: tuple[Reading, ...]
    reduction: str
    soft: bool

    @property
    def detail(self) -> str:
        more = ", logsumexp" * any(r.is_lse for r in self.readings) + ", sum of all classes" * any(r.of_all for r in self.readings)
        cap = f", cap {self.head.cap:g}" if self.head is not None and self.head.cap else ""
        kind = "distributions" if self.soft else "labels"
        return f"{'sum over rows' if self.reduction == 'sum' else 'each row'}, {kind}{more}{cap}"

    def __call__(self, *args: Any) -> list[Any]:
        own, last = (args, None) if self.labels is None and not self.soft else (args[:-1], args[-1])
        x, kernel, bias = self.head.arguments(*own) if self.head is not None else (own[0], None, None)
        labels = self._labels(last)
        options: dict[str, Any] = {"reduction": self.reduction, "ignore_index": NO_CLASS, "return_logsumexp": self._wants_lse}
        if self.head is None or kernel is None:
            found = softmax_cross_entropy(x, labels, **options)
        else:
            found = linear_cross_entropy(x, kernel, labels, bias, logit_soft_cap=self.head.cap, **options)
        loss, lse = found if self._wants_lse else (found, None)
        total = self._total(x, kernel, bias) if any(r.of_all for r in self.readings) else None
        inside = self._inside(last)
        return [self._value(r, loss, lse, total, inside).reshape(r.value.shape).astype(r.value.dtype) for r in self.readings]

    @property
    def _wants_lse(self) -> bool:
        return any(r.is_lse or r.of_all or (r.raw and r.at_label) for r in self.readings)

    def _labels(self, given: Any) -> Any:
        if self.soft:
            return given
        rows = self.shape[:-1]
        return jnp.zeros(rows, jnp.int32) if self.labels is None else self.labels.prepared(given, rows, self.shape[-1])

    def _total(self, x: Any, kernel: Any, bias: Any) -> Any:
        """Σ z."""
        if kernel is None:
            return x.astype(wide(x.dtype)).sum(-1)
        dtype = wide(kernel.dtype)
        total = einsum("...i,i->...", x.astype(dtype), kernel.astype(dtype).sum(1))
        return total if bias is None else total + bias.astype(dtype).sum()

    def _inside(self, given: Any) -> Any:
        """Whether the label of each row is a class, where one that is not adds nothing; else True."""
        if self.labels is None or self.labels.outside != "nothing":
            return True
        return self.labels.prepared(given, self.shape[:-1], self.shape[-1]) != NO_CLASS

    def _value(self, r: Reading, loss: Any, lse: Any, total: Any, inside: Any) -> Any:
        if r.is_lse:
            return lse
        if r.distribution is not None:
            return -r.sign * loss
        y = 0.0
        if r.at_label:
            y = r.at_label * (jnp.where(inside, lse - loss, 0) if r.raw else -loss)
        if r.of_all:
            y = y + r.of_all * (total if r.raw else total - self.shape[-1] * lse)
        return y
