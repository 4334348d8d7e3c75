"""Tokens of sampled sequences as losses of policies read them: what each counts, and their log-probabilities under a policy or a constant model."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from layers.core import checks
from layers.core.numerics import product, wide
from layers.core.rows import as_rows
from layers.losses.arguments import check_constant_head, check_ids, check_where
from layers.losses.linear_log_prob import log_probs
from layers.losses.targets import Labels, Options


class Tokens(NamedTuple):
    """Tokens of sequences.

    Attributes:
        batch: (*batch, time).
        labels: the tokens, one row after another, without those that do not count.
        weight: (*batch, time), what each counts: 0 for those, NaN for a token that is none of the vocabulary.
    """

    batch: tuple[int, ...]
    labels: Labels
    weight: jax.Array

    def under(self, x: jax.Array, kernel: jax.Array, bias: jax.Array | None, options: Options) -> list[Any]:
        """The log-probability of each token, 0 where it does not count, and what else `options` ask for, (*batch, time) each."""
        found = log_probs(as_rows(x, self.batch), kernel, bias, self.labels, options)
        return [y if y is None else y.reshape(self.batch) for y in found]

    def of_sequences(self, log_prob: jax.Array) -> jax.Array:
        """The sum over each sequence of what counts."""
        return product(self.weight, log_prob).sum(-1)

    def constant(self, who: str, model: Model, given: Any, vocab: int, options: Options, *, of_sequences: bool = False) -> jax.Array | None:
        """The log-probability of each token, or sequence, under another model, `given` or computed, a constant; None where it is neither."""
        names, before = model.names, f"{model.name}_log_probs"
        head = [array is not None for array in (model.x, model.kernel, model.bias)]
        if given is None:
            if not any(head):
                return None
            if not all(head[:2]):
                raise ValueError(
                    f"{who}: {names[head.index(True)]} is given without the rest of the head: give {names[0]} and {names[1]}, or {before}"
                )
            found = self.under(*check_constant_head(who, model.x, model.kernel, model.bias, names, self.batch, "x", vocab), options)[0]
            return self.of_sequences(found) if of_sequences else found
        if any(head):
            raise ValueError(f"{who}: {before} is given, and so is {names[head.index(True)]}: give {before}, or {names[0]} and {names[1]}")
        given = checks.array(who, before, given, "real")
        checks.shape(who, before, given, self.batch[:-1] if of_sequences else self.batch, "(*batch)" if of_sequences else "(*batch, time)")
        counts = (self.weight != 0).any(-1) if of_sequences else self.weight != 0
        return lax.stop_gradient(jnp.where(counts, given.astype(wide(given.dtype)), 0))


class Model(NamedTuple):
    """Another model's hidden states and head, each None where not given, and its name in arguments."""

    name: str
    x: Any
    kernel: Any
    bias: Any

    @property
    def names(self) -> tuple[str, str, str]:
        return f"{self.name}_x", f"{self.name}_kernel", f"{self.name}_bias"


def read_tokens(who: str, x: jax.Array, ids: Any, where: Any, vocab: int, options: Options, names: tuple[str, str] = ("ids", "where")) -> Tokens:
    """The tokens of sequences and what each counts, checked; `names` are theirs in errors."""
    if x.ndim < 2:
        raise ValueError(f"{who}: x has shape {x.shape}, but must be (*batch, time, features)")
    batch = x.shape[:-1]
    ids, where = check_ids(who, names[0], ids, batch), check_where(who, where, batch, names[1], "(*batch, time)")
    dtype = wide(x.dtype)
    weight = Labels(as_rows(ids, batch), where=where).read(vocab, options, dtype).counted
    return Tokens(batch, Labels(as_rows(ids, batch), where=None if where is None else where != 0), weight.reshape(batch))


def read_advantages(who: str, advantages: Any, tokens: Tokens) -> jax.Array:
    """The advantage of each token, of its own or its sequence's; a constant."""
    advantages = lax.stop_gradient(checks.array(who, "advantages", advantages, "real"))
    if advantages.shape == tokens.batch[:-1]:
        advantages = jnp.broadcast_to(advantages[..., None], tokens.batch)
    checks.shape(who, "advantages", advantages, tokens.batch, "(*batch) or (*batch, time)")
    return jnp.where(tokens.weight == 0, 0, advantages.astype(tokens.weight.dtype))
