"""What is read of the softmax of rows of logits: their logsumexp, one class of each row, a sum over classes.

With z the logits, lse their logsumexp and lp = z - lse, what is read is a lp_y + b Σ lp or a z_y + b Σ z for the label y of the row, -Σ t lp for a
distribution t, or lse itself. All of it follows from the loss lse - z_y, from lse, and from Σ z.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from layers.rewriting.constants import number_of
from layers.rewriting.follow import Follow
from layers.rewriting.graph import Node, Value, widens
from layers.rewriting.labels import Labels, gathered, hot_labels, takes_all
from layers.rewriting.match import Nearly, need
from layers.rewriting.onehot import of_one_hot
from layers.rewriting.primitives import LAYOUT
from layers.rewriting.softmax import StableExp
from layers.rewriting.walk import before_layout


@dataclass(frozen=True)
class Reading:
    """One number a row that is read: `at_label` lp_y + `of_all` Σ lp, of z in place of lp where `raw`; or lse; or Σ t lp of a distribution."""

    value: Value
    at_label: float = 0.0
    of_all: float = 0.0
    raw: bool = False
    is_lse: bool = False
    distribution: Value | None = None
    sign: float = 1.0


@dataclass
class Readers:
    """Collects what is read of the softmax `exp` of logits whose logarithm of the sum is `log`."""

    exp: StableExp
    log: Node
    follow: Follow
    nodes: set[Node]
    readings: list[Reading] = field(default_factory=list)
    labels: Labels | None = None

    @property
    def z(self) -> Value:
        return self.exp.scores

    def collect(self) -> None:
        self._after_log(self.log.out)
        for u in list(dict.fromkeys(self.z.users)):
            if u not in self.nodes:
                self._take(u, self.z, 1.0, raw=True, required=False)

    def _after_log(self, v: Value) -> None:
        need(not v.kept, "the logarithm of the sum is read by itself")
        for u in dict.fromkeys(v.users):
            if _keeps_order(u) or (u.name in LAYOUT and self.follow.axes(u.out) is not None):
                self.nodes.add(u)
                self._after_log(u.out)
            elif u.name == "add" and self._is_maximum(u.other(v)) and self.follow.is_row_of(u.out, self.z.ndim - 1):
                self.nodes.add(u)
                self._after_lse(u.out)
            elif u.name == "sub" and u.inputs[0] is self.exp.difference and self.follow.axes(u.out) is not None:
                self.nodes.add(u)
                self._after_log_softmax(u.out, 1.0)
            else:
                raise Nearly(f"the logarithm of the sum is read by {u.name}")

    def _is_maximum(self, v: Value) -> bool:
        base, own = (before_layout(_unguarded(before_layout(x)[0]))[0] for x in (v, self.exp.maximum))
        return base is own

    def _after_lse(self, v: Value) -> None:
        """lse is what the match makes; z - lse is a log-softmax."""
        through = [u for u in dict.fromkeys(v.users) if self._is_log_softmax(u, v)]
        for u in through:
            self.nodes.add(u)
            self._after_log_softmax(u.out, 1.0)
        repeats = [u for u in dict.fromkeys(v.users) if u.name in LAYOUT and any(self._is_log_softmax(w, u.out) for w in u.out.users)]
        for u in repeats:
            self.nodes.add(u)
            self._after_lse(u.out)
        if v.kept or any(u not in self.nodes for u in v.users):
            need(v.size == self.z.size // self.z.shape[-1], "the logsumexp is repeated")
            self.readings.append(Reading(v, is_lse=True))

    def _is_log_softmax(self, u: Node, v: Value) -> bool:
        return u.name == "sub" and u.inputs[0] is self.z and u.inputs[1] is v and self.follow.axes(u.out) is not None

    def _after_log_softmax(self, v: Value, sign: float) -> None:
        need(not v.kept, "the log-softmax is read elsewhere too")
        for u in dict.fromkeys(v.users):
            if widens(u):
                self.nodes.add(u)
                self._after_log_softmax(u.out, sign)
            elif u.name == "neg":
                self.nodes.add(u)
                self._after_log_softmax(u.out, -sign)
            else:
                self._take(u, v, sign, raw=False, required=True)

    def _take(self, u: Node, v: Value, sign: float, *, raw: bool, required: bool) -> None:
        """Adds what `u` reads of `v`, the logits or their log-softmax."""
        inner: set[Node] = set()
        reading = self._by_index(u, v, sign, raw, inner) or self._by_sum(u, v, sign, raw, inner)
        if reading is None:
            need(not required, f"the log-softmax is read by {u.name} over more than the label of each row")
            return
        self.nodes |= inner
        self.readings.append(reading)

    def _by_index(self, u: Node, v: Value, sign: float, raw: bool, inner: set[Node]) -> Reading | None:
        labels = gathered(u, v, inner)
        return None if labels is None or not self._same_labels(labels) else Reading(u.out, at_label=sign, raw=raw)

    def _by_sum(self, u: Node, v: Value, sign: float, raw: bool, inner: set[Node]) -> Reading | None:
        """Σ t v along the classes, t one-hot, a function of that, or a distribution."""
        at_label, of_all, distribution, total = 0.0, 1.0, None, u
        if u.name in ("mul", "select_n"):
            weights = _weights(u, v)
            total = u.out.only_user
            while total is not None and (widens(total) or total.name == "neg"):
                sign = -sign if total.name == "neg" else sign
                inner.add(total)
                total = total.out.only_user
            if weights is None or total is None:
                return None
            inner.add(u)
            hot = of_one_hot(weights, lambda x: hot_labels(x, self.z.shape))
            if hot is not None and self._same_labels(hot.labels):
                at_label, of_all = hot.at_label, hot.elsewhere
            elif u.name == "mul" and not raw and weights.shape == v.shape:
                distribution, of_all = weights, 0.0
            else:
                return None
        if total.name != "reduce_sum" or tuple(total.params["axes"]) != (self.z.ndim - 1,) or total.inputs[0].shape != self.z.shape:
            return None
        inner.add(total)
        return Reading(total.out, sign * at_label, sign * of_all, raw, distribution=distribution, sign=sign)

    def _same_labels(self, labels: Labels) -> bool:
        if self.labels is None:
            self.labels = labels
        return labels == self.labels


def _weights(u: Node, v: Value) -> Value | None:
    """What `v` is multiplied by; a selection of it or 0 multiplies it by its condition."""
    if u.name == "mul":
        return u.other(v)
    return u.inputs[0] if len(u.inputs) == 3 and u.inputs[2] is v and number_of(u.inputs[1]) == 0 else None


def _unguarded(v: Value) -> Value:
    """A maximum before that of a row of infinities became 0."""
    n = v.node
    guarded = n is not None and n.name == "select_n" and n.inputs[0].node is not None and n.inputs[0].node.name == "is_finite"
    return n.inputs[2] if guarded and n is not None else v


def _keeps_order(n: Node) -> bool:
    """Whether a node only casts, or lays out the same numbers in the same order."""
    return widens(n) or takes_all(n) or (n.name in LAYOUT - {"transpose"} and n.inputs[0].size == n.out.size)
