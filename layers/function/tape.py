"""The tape of one call of a `Function`: what `backward` needs, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from layers.function.record import Record


@jax.tree_util.register_pytree_node_class
class GradFn:
    """The tape of one call of `Function.vjp`: PyTorch's `y.grad_fn`. A pytree of the arrays that were saved."""

    def __init__(self, record: Record, residuals: list[Any]):
        self._record, self._residuals = record, residuals

    def apply(self, *grad_outputs: Any) -> tuple[Any, ...]:
        """Runs `backward`.

        Args:
            *grad_outputs: one gradient for each output of `forward`, of its shape and structure; `None` for zero.

        Returns:
            A tuple with one gradient for each argument, `None` where there is none.

        Raises:
            ValueError: for a wrong number of gradients or a shape that is not the output's.
        """
        record = self._record
        grads = self.pull(record.cotangents(grad_outputs))
        arguments = zip(record.call.arguments, record.call.templates, strict=True)
        return tuple(t.fill_with_gaps(grads, record.avals) if any(grads[i] is not None for i in a.indices) else None for a, t in arguments)

    __call__ = apply

    def pull(self, cotangents: Sequence[Any]) -> list[Any]:
        """Runs `backward` for one cotangent an array of the output; returns one an array of the call. None is zero on both sides."""
        record = self._record
        given = [c if d else None for c, d in zip(cotangents, record.differentiable, strict=True)]
        return record.grads(self._residuals, given, record.differentiated)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `forward` saved for `backward`."""
        return self._record.context(self._residuals).saved_tensors

    @property
    def needs_input_grad(self) -> tuple[bool, ...]:
        """One flag for each argument."""
        return self._record.call.needs(self._record.differentiated)

    def name(self) -> str:
        """The name of the node, `<class>Backward`."""
        return f"{self._record.call.name}Backward"

    def __repr__(self) -> str:
        return f"<{self.name()}>"

    def tree_flatten(self) -> tuple[tuple[list[Any]], Record]:
        return (self._residuals,), self._record

    @classmethod
    def tree_unflatten(cls, record: Record, children: tuple[list[Any]]) -> GradFn:
        return cls(record, children[0])
