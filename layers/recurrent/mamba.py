"""The Mamba block: a causal convolution, a selective scan whose parameters the input chooses, and a gate.

    x, z = split(in_proj(input)),   x = short_convolution(x, conv1d, silu),   delta, B, C = split(x_proj(x))
    out = out_proj(selective_scan(x, dt_proj(delta), -exp(A_log), B, C, D, z=z, softplus))

Saved: as autodiff does for the projections, and as `short_convolution` and `selective_scan` do: one state in `CHUNK`, where autodiff keeps each.

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4; parameters, their names and
their initial values are those of the block of its authors, kernels laid out as Flax does.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.core import checks
from layers.core.products import matmul
from layers.recurrent.segments import check_segment_ids
from layers.recurrent.selective_scan import selective_scan
from layers.recurrent.short_convolution import short_convolution


class MambaState(NamedTuple):
    """What a block remembers between calls.

    Attributes:
        conv: the last inputs of the convolution, (batch, d_conv - 1, d_inner).
        ssm: the state of the selective scan, (batch, d_inner, d_state).
    """

    conv: jax.Array
    ssm: jax.Array


class Mamba(nnx.Module):
    """The block of Mamba, which mixes time by a selective state-space model in place of attention: (batch, time, d_model) to the same.

    Args:
        d_model: features of input and output.
        d_state: states of each inner feature.
        d_conv: steps that the convolution sees.
        expand: inner features, as a multiple of `d_model`.
        dt_rank: features that the step sizes are projected from; "auto" for d_model / 16.
        dt_min, dt_max: step sizes start between these, evenly in the logarithm.
        dt_init: "random" or "constant", how the kernel of `dt_proj` starts.
        dt_scale: multiplies that.
        dt_init_floor: the least step size to start with.
        conv_bias: whether the convolution has a bias.
        use_bias: whether `in_proj` and `out_proj` have one.
        dtype: what is computed in; None for that of inputs and parameters.
        param_dtype: of the parameters.
        rngs: draws the parameters.

    Raises:
        ValueError: for a size, a rank or a step size out of range, or an unknown `dt_init`.
        TypeError: for an argument of another type.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        use_bias: bool = False,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        d_model, d_state, d_conv, expand = (checks.integer("Mamba", key, size, "[1, 2147483647]") for key, size in sizes.items())
        dt_min, dt_max, dt_scale = (
            checks.number("Mamba", key, value, "(0, inf)") for key, value in (("dt_min", dt_min), ("dt_max", dt_max), ("dt_scale", dt_scale))
        )
        if dt_min > dt_max:
            raise ValueError(f"Mamba: dt_min is {dt_min}, but must be at most dt_max, {dt_max}")
        dt_init = checks.choice("Mamba", "dt_init", dt_init, ("random", "constant"))
        dt_init_floor = checks.number("Mamba", "dt_init_floor", dt_init_floor, "[0, inf)")
        conv_bias, use_bias = checks.flag("Mamba", "conv_bias", conv_bias), checks.flag("Mamba", "use_bias", use_bias)
        dtype = checks.dtype("Mamba", "dtype", dtype)
        param_dtype = checks.dtype("Mamba", "param_dtype", param_dtype, optional=False)
        self.d_inner, self.d_state, self.d_conv = expand * d_model, d_state, d_conv
        self.dt_rank = _rank(dt_rank, d_model)
        self.dtype = dtype

        def linear(inputs: int, outputs: int, use_bias: bool, **options: Any) -> nnx.Linear:
            options = {"kernel_init": _uniform(inputs**-0.5), "bias_init": _uniform(inputs**-0.5)} | options
            return nnx.Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs, **options)

        spread = dt_scale * self.dt_rank**-0.5
        self.in_proj = linear(d_model, 2 * self.d_inner, use_bias)
        self.conv1d = nnx.Conv(
            self.d_inner,
            self.d_inner,
            (d_conv,),
            padding="CAUSAL",
            feature_group_count=self.d_inner,
            use_bias=conv_bias,
            kernel_init=_uniform(d_conv**-0.5),
            bias_init=_uniform(d_conv**-0.5),
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.x_proj = linear(self.d_inner, self.dt_rank + 2 * d_state, False)
        self.dt_proj = linear(
            self.dt_rank,
            self.d_inner,
            True,
            kernel_init=nnx.initializers.constant(spread) if dt_init == "constant" else _uniform(spread),
            bias_init=_step_sizes(dt_min, dt_max, dt_init_floor),
        )
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1, d_state + 1, dtype=param_dtype)), (self.d_inner, 1)))
        self.D = nnx.Param(jnp.ones(self.d_inner, param_dtype))
        self.out_proj = linear(self.d_inner, d_model, use_bias)

    def __call__(
        self,
        inputs: Float[Array, "batch time d_model"],
        state: MambaState | None = None,
        *,
        return_state: bool = False,
        segment_ids: Int[Array, "batch time"] | None = None,
    ) -> Float[Array, "batch time d_model"] | tuple[Float[Array, "batch time d_model"], MambaState]:
        """Applies the block.

        Args:
            inputs: a sequence, or the next part of one, down to a single step.
            state: what an earlier call returned for the part before; None at the start.
            return_state: whether to return the state for the part after.
            segment_ids: packed sequences: where the id changes from one step to the next, nothing before is seen; the first sequence goes on from
                `state`.

        Returns:
            An array of the shape of `inputs`; with `return_state` also a `MambaState`.

        Raises:
            ValueError: where `inputs` is not (batch, time, d_model), or `segment_ids` not (batch, time).
            TypeError: where `inputs` is not of a real floating-point dtype, or `segment_ids` not of integers.
        """
        inputs = checks.array("Mamba", "inputs", inputs)
        if inputs.ndim != 3 or inputs.shape[2] != self.in_proj.in_features:
            raise ValueError(f"Mamba: inputs have shape {inputs.shape}, but must be (batch, time, {self.in_proj.in_features})")
        return_state = checks.flag("Mamba", "return_state", return_state)
        self._check_state(state, inputs)
        check_segment_ids("Mamba", segment_ids, inputs.shape[:2], "(batch, time)", inputs=inputs)
        x, z = jnp.split(self.in_proj(inputs), 2, -1)
        conv1d = self.conv1d
        x, conv = short_convolution(
            x,
            conv1d.kernel[...][:, 0],
            None if conv1d.bias is None else conv1d.bias[...],
            activation="silu",
            initial_state=None if state is None else state.conv,
            return_state=True,
            segment_ids=segment_ids,
        )
        rate, b, c = jnp.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.d_state], -1)
        kernel, bias = self.dt_proj.kernel[...], self.dt_proj.bias
        y, ssm = selective_scan(
            x,
            matmul(rate, kernel.astype(rate.dtype)),
            -jnp.exp(self.A_log[...].astype(jnp.promote_types(self.A_log.dtype, jnp.float32))),
            b,
            c,
            self.D[...],
            z=z,
            delta_bias=None if bias is None else bias[...],
            delta_softplus=True,
            initial_state=None if state is None else state.ssm,
            return_last_state=True,
            segment_ids=segment_ids,
        )
        out = self.out_proj(y)
        return (out, MambaState(conv, ssm)) if return_state else out

    def _check_state(self, state: Any, inputs: jax.Array) -> None:
        if state is None:
            return
        if not isinstance(state, MambaState):
            raise TypeError(f"Mamba: state is {checks.shown(state)}, but must be a MambaState, what a call with return_state=True returns")
        sizes = {"conv": (self.d_conv - 1, self.d_inner), "ssm": (self.d_inner, self.d_state)}
        for key, rest in sizes.items():
            x = checks.array("Mamba", f"state.{key}", getattr(state, key))
            checks.shape("Mamba", f"state.{key}", x, (len(inputs), *rest), "(batch, ...)", inputs=inputs)


def _rank(dt_rank: Any, d_model: int) -> int:
    if isinstance(dt_rank, str):
        checks.choice("Mamba", "dt_rank", dt_rank, ("auto",))
        return math.ceil(d_model / 16)
    return checks.integer("Mamba", "dt_rank", dt_rank, "[1, 2147483647]")


def _uniform(bound: float) -> nnx.Initializer:
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


def _step_sizes(low: float, high: float, floor: float) -> nnx.Initializer:
    """The bias whose softplus is a step size between `low` and `high`."""

    def init(key: Any, shape: Any, dtype: Any = jnp.float32, **_: Any) -> jax.Array:
        size = jnp.exp(jax.random.uniform(key, shape, jnp.float32) * (math.log(high) - math.log(low)) + math.log(low))
        size = jnp.maximum(size, floor)
        return (size + jnp.log(-jnp.expm1(-size))).astype(dtype)

    return init
