"""Which of the two ways a `Function` is made differentiable in: the engine, and who chooses it."""

from __future__ import annotations

import os
from typing import Any, Literal

import jax

from layers.core import checks, private

Engine = Literal["linear", "custom_vjp"]

ENGINES = ("linear", "custom_vjp")

_chosen: Any = jax.make_user_context(None)  # part of the key of JAX's caches: what was traced under the other engine is traced anew
_asked = os.environ.get("LAYERS_ENGINE")
if _asked is not None:
    checks.choice("LAYERS_ENGINE", "the environment variable", _asked, ENGINES)


class engine:
    """Chooses how every `Function` is made differentiable, like `jax.set_mesh`: from the call on, or for a `with` block.

        layers.engine("custom_vjp")  # from here on, in this thread

        with layers.engine("custom_vjp"):
            grads = jax.grad(loss)(params)

    - `"linear"`: a `jax.custom_jvp` whose tangent is a linear operation with `backward` as its transpose. It has forward mode, exact
      `needs_input_grad`, and outputs that a batch shares. It rests on private names of JAX (`core/private.py`).
    - `"custom_vjp"`: one `jax.custom_vjp` whose forward rule is `forward` and whose backward rule is `backward`. `needs_input_grad` is true for
      all that could be differentiated, forward mode is an error (inside `jit` JAX's own, which does not name the function: what forward and reverse
      mode trace there is the same, so that no rule can tell), and `jvp` methods are not used.

    The default is `"linear"`, `"custom_vjp"` in a release of JAX that has moved what `"linear"` needs, and the environment variable
    `LAYERS_ENGINE` before both. What was compiled under one engine is traced anew under the other.

    Args:
        name: "linear" or "custom_vjp".

    Raises:
        ValueError: for another name.
        RuntimeError: for "linear", where this JAX has moved what it needs.
    """

    def __init__(self, name: Engine):
        checks.choice("engine", "name", name, ENGINES)
        if name == "linear":
            private.require(private.LINEAR)
        self._context = _chosen(name)
        self._context.__enter__()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


def current() -> str:
    """The engine under which a `Function` is applied now."""
    return _chosen.value or _asked or ("custom_vjp" if private.missing(private.LINEAR) else "linear")
