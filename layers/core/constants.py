"""Options of a rule that are arrays, and have no gradient."""

from __future__ import annotations


def refuse_gradient(who: str, what: str, needed: bool) -> None:
    """Raises TypeError where an option, or what one of a few holds, is being differentiated."""
    if needed:
        raise TypeError(f"{who}: {what} has no gradient: pass it through jax.lax.stop_gradient")
