import jax
import jax.numpy as jnp
import numpy as np
import pytest

from layers.core import products

SIZES = {"b": 2, "h": 3, "n": 4, "i": 5, "j": 6, "k": 7, "v": 8, "r": 3, "f": 4, "s": 5, "q": 6, "g": 2, "d": 4, "t": 5}


@pytest.mark.parametrize(
    "spec",
    [
        "rf,fv->rv",
        "rv,fv->rf",
        "rf,rv->fv",
        "rv,rf->fv",
        "bkgqs,bskh->bkgqh",
        "bkgqs,bkgqh->bskh",
        "bhnik,bhnjk->bhnij",
        "tbnd,tbd->tbn",
        "bhtk,bhtv->bhkv",
        "bi,jb->ijb",
    ],
)
def test_product_is_that_of_einsum(spec):
    x, y = (np.random.default_rng(0).normal(size=[SIZES[c] for c in s]) for s in spec.partition("->")[0].split(","))
    with jax.enable_x64(True):
        np.testing.assert_allclose(products.einsum(spec, jnp.asarray(x), jnp.asarray(y)), np.einsum(spec, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_leading_axes_are_the_first_operands_own(shape):
    x, y = jnp.ones(shape), jnp.arange(20.0).reshape(5, 4)
    assert (products.matmul(x, y) == x @ y).all()


def test_options_reach_dot_general():
    product = products.matmul(jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16), preferred_element_type=jnp.float32)
    assert product.dtype == jnp.float32


def test_inner_product_is_over_all_axes():
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    assert products.inner(x, y) == 15


def test_axis_that_is_nowhere_else_is_refused():
    with pytest.raises(AssertionError, match="nowhere else"):
        products.einsum("ij,jk->k", jnp.ones((2, 3)), jnp.ones((3, 4)))


def test_replaced_product_is_used_and_leaves_no_trace(monkeypatch):
    x, y = jnp.ones((2, 3)), jnp.ones((3, 4))
    with monkeypatch.context() as patch:
        own = jax.lax.dot_general
        patch.setattr(jax.lax, "dot_general", lambda *args, **options: 2 * own(*args, **options))
        assert (products.matmul(x, y) == 6).all()
    assert (products.matmul(x, y) == 3).all()
