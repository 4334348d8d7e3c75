import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from layers.core import checks


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_, jnp.complex64])
def test_array_of_another_kind_is_named_with_the_cure(dtype):
    with pytest.raises(TypeError, match=r"layer: kernel is of dtype .*, but must be of a real floating.*cast it, kernel.astype\('float32'\)"):
        checks.array("layer", "kernel", jnp.ones(2, dtype))


@pytest.mark.parametrize("value", [np.ones(2, np.float16), [1.0, 2.0], 2.5, np.float32(1), jnp.ones(2, jnp.bfloat16), nnx.Param(jnp.ones(3))])
def test_whatever_jax_makes_an_array_of_is_one(value):
    assert isinstance(checks.array("layer", "x", value), jax.Array)


@pytest.mark.parametrize(
    "value", ["abc", None, {"a": 1}, {1.0}, [1.0, [2.0]], ["a"], object(), np.array(["a"]), np.array([object()]), b"1", np.str_("1")]
)
def test_what_is_no_array_is_a_type_error_that_names_it(value):
    with pytest.raises(TypeError, match=r"layer: x is .*, but must be an array"):
        checks.array("layer", "x", value)


def test_none_is_an_optional_argument_only():
    assert checks.array("layer", "x", None, optional=True) is None
    assert checks.number("layer", "x", None, optional=True) is None
    assert checks.integer("layer", "x", None, optional=True) is None
    with pytest.raises(TypeError, match=r"layer: x is None, but must be a number that is finite"):
        checks.number("layer", "x", None)


def test_wrong_shape_is_named_with_what_it_comes_from():
    x, scale = jnp.ones((3, 8)), jnp.ones(7)
    with pytest.raises(ValueError, match=r"layer: scale has shape \(7,\), but must be \(features,\) = \(8,\) \(x: \(3, 8\)\): cut it"):
        checks.shape("layer", "scale", scale, (8,), "(features,)", hint=": cut it", x=x, bias=None)
    checks.shape("layer", "scale", None, (8,), "(features,)")
    with pytest.raises(ValueError, match=r"layer: x has shape .*, but must have 1 axis"):
        checks.array("layer", "x", x, ndim=1)


@pytest.mark.parametrize("value", [0.5, 0, np.float32(0.5), jnp.asarray(0.5), np.array(0.25)])
def test_number_in_its_interval_becomes_a_python_number(value):
    found = checks.number("layer", "rate", value, "[0, 1)")
    assert type(found) in (int, float)
    assert found == float(value)


@pytest.mark.parametrize("value", [1, -1e-30, math.nan, math.inf, -math.inf, 10**400, jnp.asarray(jnp.nan)])
def test_number_outside_its_interval_is_a_value_error(value):
    with pytest.raises(ValueError, match=r"layer: rate is .*, but must be a number in \[0, 1\)"):
        checks.number("layer", "rate", value, "[0, 1)")


@pytest.mark.parametrize("value", ["0.5", True, np.bool_(True), 1j, None, [0.5], object(), jnp.asarray(True)])
def test_what_is_no_number_is_a_type_error(value):
    with pytest.raises(TypeError, match=r"layer: rate is .*, but must be a number in \[0, 1\)"):
        checks.number("layer", "rate", value, "[0, 1)")


def test_intervals_say_whether_they_hold_their_ends_and_infinity():
    assert checks.number("layer", "n", math.inf, "[0, inf]") == math.inf
    assert checks.number("layer", "n", 0, "[0, inf)") == 0
    with pytest.raises(ValueError, match=r"a number above 0"):
        checks.number("layer", "n", 0, "(0, inf)")
    with pytest.raises(ValueError, match=r"a number of at least 0"):
        checks.number("layer", "n", math.inf, "[0, inf)")
    with pytest.raises(ValueError, match=r"that is not NaN"):
        checks.number("layer", "n", math.nan, "[-inf, inf]")


def test_array_with_axes_is_no_number():
    with pytest.raises(ValueError, match=r"layer: rate has shape \(1,\), but must be a number in \[0, 1\)"):
        checks.number("layer", "rate", jnp.ones(1), "[0, 1)")


def test_traced_number_is_refused_with_the_cure_or_allowed():
    with pytest.raises(TypeError, match=r"layer: rate is traced, but is part of the program.*static_argnames"):
        jax.jit(lambda r: checks.number("layer", "rate", r, "[0, 1)"))(0.5)
    assert jax.jit(lambda r: 2 * checks.number("layer", "rate", r, "[0, 1)", traced=True))(0.5) == 1
    with pytest.raises(TypeError, match=r"layer: rate is traced and of dtype bool"):
        jax.jit(lambda r: checks.number("layer", "rate", r, "[0, 1)", traced=True))(True)
    with pytest.raises(ValueError, match=r"layer: rate is 2"):
        checks.number("layer", "rate", jnp.asarray(2.0), "[0, 1)", traced=True)


@pytest.mark.parametrize("value", [3, np.int8(3), jnp.asarray(3)])
def test_whole_number_becomes_an_int(value):
    found = checks.integer("layer", "bits", value, "[1, 8]")
    assert type(found) is int
    assert found == 3


@pytest.mark.parametrize(
    ("value", "error"), [(3.0, TypeError), ("3", TypeError), (True, TypeError), (math.nan, TypeError), (9, ValueError), (10**30, ValueError)]
)
def test_what_is_no_whole_number_in_its_interval_is_an_error(value, error):
    with pytest.raises(error, match=r"layer: bits is .*, but must be a whole number in \[1, 8\]"):
        checks.integer("layer", "bits", value, "[1, 8]")


def test_flags_are_true_or_false():
    assert [checks.flag("layer", "f", v) for v in (True, np.bool_(False), 1, jnp.asarray(True))] == [True, False, True, True]
    for value in ("False", 2, None, 0.5, [], jnp.ones(1, bool)):
        with pytest.raises((TypeError, ValueError), match=r"layer: f .*, but must be True or False"):
            checks.flag("layer", "f", value)


@pytest.mark.parametrize(("value", "error"), [("xla2", ValueError), (3, TypeError), ([], TypeError), (jnp.ones(2), TypeError), ({}, TypeError)])
def test_choice_lists_what_there_is(value, error):
    with pytest.raises(error, match=r"layer: implementation is .*, but must be one of 'xla', None"):
        checks.choice("layer", "implementation", value, ("xla", None))
    assert checks.choice("layer", "implementation", None, ("xla", None)) is None


def test_what_cannot_be_called_is_no_function():
    assert checks.function("layer", "f", jnp.sin) is jnp.sin
    with pytest.raises(TypeError, match=r"layer: f is 3, but must be a function"):
        checks.function("layer", "f", 3)


def test_axes_are_counted_from_the_front():
    assert checks.axis("layer", "axis", -1, 3) == 2
    assert checks.axes("layer", "axis", (-1, 0), 3) == (2, 0)
    for value in (3, -4, 1.5, "x", None, True):
        with pytest.raises((TypeError, ValueError), match=r"layer: axis is"):
            checks.axis("layer", "axis", value, 3)
    with pytest.raises(ValueError, match=r"must name each axis once"):
        checks.axes("layer", "axis", (-1, 2), 3)


def test_places_are_counted_from_the_front_and_all_of_them_for_none():
    for value, found in ((None, [0, 1, 2]), (1, [1]), (np.int64(-1), [2]), ((0, -1), [0, 2]), (range(2), [0, 1])):
        assert checks.indices("layer", "argnums", value, 3) == found
    with pytest.raises(ValueError, match="layer: argnums names argument 3, but there are 3: it must lie from -3 to 2"):
        checks.indices("layer", "argnums", (0, 3), 3)
    for wrong in ("0", 0.5, True, (0, None)):
        with pytest.raises(TypeError, match="layer: argnums is"):
            checks.indices("layer", "argnums", wrong, 3)


def test_one_or_several_become_a_tuple():
    for value, found in (("ab", ("ab",)), (3, (3,)), ([1, 2], (1, 2)), (np.array(4), (np.array(4),)), (np.arange(2), (0, 1)), (None, (None,))):
        assert checks.several(value) == found


def test_dtypes_are_of_their_kind():
    assert checks.dtype("layer", "dtype", "bfloat16") == jnp.bfloat16
    assert checks.dtype("layer", "dtype", None) is None
    for value in (jnp.int32, "bool", "abc", 3, object()):
        with pytest.raises(TypeError, match=r"layer: dtype is .*, but must be a real floating-point dtype"):
            checks.dtype("layer", "dtype", value)


@pytest.mark.parametrize("value", [3, np.uint32(3), jax.random.key(3), jax.random.PRNGKey(3), jnp.asarray(3)])
def test_keys_and_seeds_become_one_typed_key(value):
    assert jax.random.key_data(checks.key("layer", "key", value)).tolist() == [0, 3]


@pytest.mark.parametrize(
    "value", ["abc", None, 1.5, jnp.ones(2), jnp.ones(3, jnp.uint32), jax.random.split(jax.random.key(0)), 2**70, True, object()]
)
def test_what_is_no_key_is_named(value):
    with pytest.raises((TypeError, ValueError), match=r"layer: key .*"):
        checks.key("layer", "key", value)


def test_mesh_axes_are_mapped_where_they_are_named():
    assert jax.vmap(lambda x: x * len(checks.mesh_axes("layer", "axis_name", "i")), axis_name="i")(jnp.ones(2)).tolist() == [1, 1]
    assert checks.mesh_axes("layer", "axis_name", None) == ()
    with pytest.raises(ValueError, match=r"layer: axis_name is 'i', but no axis of that name is mapped here"):
        checks.mesh_axes("layer", "axis_name", "i")
    with pytest.raises(TypeError, match=r"layer: axis_name is 3, but must be the name of a mesh axis"):
        checks.mesh_axes("layer", "axis_name", 3)


def test_messages_stay_short():
    assert len(checks.shown("a" * 10**6)) < 80
    assert len(checks.shown(list(range(10**5)))) < 80
