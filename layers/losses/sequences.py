"""Pairs of sequences as losses of preferences read them: their tokens, what each counts, and the log-probabilities of a reference."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import checks
from layers.core.numerics import safe_reciprocal
from layers.core.rows import as_rows
from layers.losses.arguments import check_constant_head, check_ids, check_where
from layers.losses.linear_log_prob import log_probs
from layers.losses.preference import REFERENCE_FREE
from layers.losses.targets import Labels, Options

MODEL = "reference_chosen_x, reference_rejected_x and reference_kernel"
BEFORE = "reference_chosen_log_probs and reference_rejected_log_probs"


class Sequences(NamedTuple):
    """Tokens of the sequences of one side, "chosen" or "rejected", one row after another, and what each counts."""

    side: str
    batch: tuple[int, ...]
    labels: Labels
    counted: jax.Array

    @property
    def pairs(self) -> tuple[int, ...]:
        return self.batch[:-1]

    def log_probs(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, options: Options) -> jax.Array:
        """The sum over each sequence."""
        return log_probs(as_rows(x), kernel, bias, self.labels, options)[0].reshape(*self.batch).sum(-1)

    def length(self) -> jax.Array:
        """What the tokens of each sequence count."""
        return self.counted.reshape(*self.batch).sum(-1)

    def averaged(self, total: jax.Array, average: bool) -> jax.Array:
        return total * safe_reciprocal(self.length()) if average else total


def read_pairs(
    who: str, xs: tuple[Any, Any], labels: tuple[Any, Any], counts: tuple[Any, Any], pairs: Any, vocab: int, options: Options
) -> tuple[tuple[Sequences, Sequences], jax.Array]:
    """The tokens of chosen and rejected sequences, and what each pair counts, checked; `counts` is what each token does."""
    chosen, rejected = (
        _read_sequences(who, side, x, y, count, pairs, vocab, options)
        for side, x, y, count in zip(("chosen", "rejected"), xs, labels, counts, strict=True)
    )
    if chosen.pairs != rejected.pairs:
        raise ValueError(
            f"{who}: chosen sequences have batch {chosen.pairs}, but rejected ones {rejected.pairs}: give one of each for a pair "
            f"(chosen_x: {xs[0].shape}, rejected_x: {xs[1].shape})"
        )
    weight = jnp.ones(chosen.pairs) if pairs is None else jnp.asarray(check_where(who, pairs, chosen.pairs)).reshape(chosen.pairs)
    return (chosen, rejected), weight.astype(chosen.counted.dtype)


def _read_sequences(who: str, side: str, x: jax.Array, labels: Any, tokens: Any, pairs: Any, vocab: int, options: Options) -> Sequences:
    """The tokens of one side, checked; those of pairs that do not count do not either."""
    if x.ndim < 2:
        raise ValueError(f"{who}: {side}_x has shape {x.shape}, but must be (*batch, time, features)")
    batch = x.shape[:-1]
    ids = check_ids(who, f"{side}_labels", labels, batch)
    counts, of_pairs = check_where(who, tokens, batch, f"{side}_where", "(*batch, time)"), check_where(who, pairs, batch[:-1])
    if of_pairs is not None:
        kept = jnp.broadcast_to(of_pairs[:, None] != 0, (of_pairs.shape[0], batch[-1])).reshape(-1)
        counts = kept if counts is None else jnp.where(kept, counts, 0)
    read = Labels(as_rows(ids, batch), where=counts)
    return Sequences(side, batch, read, read.read(vocab, options, jnp.promote_types(x.dtype, jnp.float32)).counted)


class Reference(NamedTuple):
    """A reference model, or its log-probabilities of the chosen and rejected sequences, computed before; None where not given."""

    xs: tuple[Any, Any]
    kernel: Any
    bias: Any
    before: tuple[Any, Any]

    def log_probs(
        self, who: str, loss_type: str, sides: tuple[Sequences, Sequences], weight: jax.Array, vocab: int, options: Options, average: bool
    ) -> tuple[Any, Any]:
        """Of each sequence, as constants; 0 where the loss has none. `weight` is what each pair counts."""
        model, before = [x is not None for x in (*self.xs, self.kernel)], [x is not None for x in self.before]
        if loss_type in REFERENCE_FREE:
            if any(model) or any(before) or self.bias is not None:
                raise ValueError(f"{who}: loss_type is {loss_type!r}, which has no reference: leave {MODEL} and {BEFORE} out")
            return 0, 0
        if any(before) and (any(model) or not all(before)):
            raise ValueError(f"{who}: give {BEFORE} together and no reference model, or {MODEL}")
        if not any(before) and not all(model):
            raise ValueError(f"{who}: loss_type={loss_type!r} needs a reference: give {MODEL}, or {BEFORE}; loss_type='cpo' and 'simpo' do without")
        found = [
            _given(who, side, y, weight) if any(before) else side.averaged(self._of_model(who, side, x, vocab, options), average)
            for side, x, y in zip(sides, self.xs, self.before, strict=True)
        ]
        return found[0], found[1]

    def _of_model(self, who: str, side: Sequences, x: Any, vocab: int, options: Options) -> jax.Array:
        names = f"reference_{side.side}_x", "reference_kernel", "reference_bias"
        head = check_constant_head(who, x, self.kernel, self.bias, names, side.batch, f"{side.side}_x", vocab)
        return side.log_probs(*head, options)


def _given(who: str, side: Sequences, log_probs: Any, weight: jax.Array) -> jax.Array:
    what = f"reference_{side.side}_log_probs"
    log_probs = checks.array(who, what, log_probs, "real")
    checks.shape(who, what, log_probs, side.pairs, f"(*batch) of {side.side}_x")
    return lax.stop_gradient(jnp.where(weight == 0, 0, log_probs))
