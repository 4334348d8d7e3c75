"""Zeros made of an element of another array."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from layers.core.deferred import zero_after


@pytest.mark.parametrize("first", [1.0, -1.0, 0.0, jnp.nan, jnp.inf, -jnp.inf])
def test_zero_is_zero_whatever_the_element(first: float) -> None:
    assert zero_after(jnp.full((2, 3), first)) == 0


def test_zero_after_an_empty_array_is_zero() -> None:
    assert zero_after(jnp.zeros((0, 3))) == 0


def test_zero_is_not_known_when_compiled() -> None:
    compiled = jax.jit(lambda x: jnp.full((4,), zero_after(x))).lower(jnp.ones(3)).compile()
    assert "compare" in compiled.as_text()


@pytest.mark.devices(2)
def test_zero_after_an_array_on_several_devices_does_not_read_it() -> None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.ones(4), NamedSharding(mesh, P("d")))
    assert "all-reduce" not in jax.jit(lambda x: x + zero_after(x)).lower(x).compile().as_text()
