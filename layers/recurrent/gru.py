"""Gated recurrent unit.

    z_t = x_t W + bias,   u_t = h_{t-1} R + recurrent_bias,   each in three parts for the gates r, z, n
    r = σ(z_r + u_r),   z = σ(z_z + u_z),   n = tanh(z_n + r u_n),   h_t = (1 - z) n + z h_{t-1}

with W the input kernel and R the recurrent kernel. Going back in time, with dh what arrives from step t + 1 and dy_t added:

    dn = dh (1 - z) (1 - n²),   dr = dn u_n r (1 - r),   dz = dh (h_{t-1} - n) z (1 - z)      (of the arguments of σ and tanh)
    da = (dr, dz, dn),   du = (dr, dz, r dn),   dh' = dh z + du Rᵀ                            (what goes on to step t - 1)

The rest needs no loop over steps: dx = da Wᵀ, dW = Σ x_tᵀ da, dR = Σ h_{t-1}ᵀ du, dbias = Σ da, drecurrent_bias = Σ du, one product each for a
chunk of time. A step beyond the length of its sequence hands on h and dh as they are. Where a packed sequence starts, h_{t-1} and dh' are 0.

Saved: the arguments, h (which is the output), and h before each chunk. From these, the gates of a chunk are one product of x and the states h
before each step. With `save="gates"`, also r, z, n and u_n of every step, which spares backward that product.

Reference: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014, with r after the product, as in cuDNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from layers.core.numerics import wide
from layers.core.products import jit
from layers.core.recompute import barrier
from layers.core.sharding import sharded_as
from layers.function.function import Function
from layers.recurrent.gates import Plan, add_bias, add_wanted, gate_products, hold, product, summed_product, visible, zero_sums
from layers.recurrent.loops import fold_chunks, scan
from layers.recurrent.one_cell import OneCell
from layers.recurrent.recurrence import before
from layers.recurrent.segments import restart
from layers.recurrent.sequences import KERNELS, prepare
from layers.recurrent.whole_sequences import KnownCell


class GRUFunction(Function):
    @staticmethod
    def forward(ctx, x, input_kernel, recurrent_kernel, bias, recurrent_bias, h, lengths, resets, plan):
        y, h, kept = _run(x, input_kernel, recurrent_kernel, bias, recurrent_bias, h, lengths, resets, plan=plan)
        ctx.save_for_backward(x, input_kernel, recurrent_kernel, bias, recurrent_bias, lengths, resets, y, kept)
        ctx.plan = plan
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        saved, grads = barrier(ctx.saved_tensors, (dy, dh))
        return *_run_back(*saved, *grads, plan=ctx.plan, needs=ctx.needs_input_grad), None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = (2, 4, 3), (3, 6), (2, 6), (6,), (6,), (2, 2)
        arrays = [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 6), shapes, strict=True)]
        return *arrays, jnp.array([4, 3]), jnp.array([[[0], [1], [0], [0]]] * 2, bool), Plan(steps=2, reverse=True)

    @staticmethod
    def examples(key, dtype):
        x, input_kernel, recurrent_kernel, bias, recurrent_bias, h, _, resets, _ = GRUFunction.example(key, dtype)
        arrays, gates = (input_kernel, recurrent_kernel, bias), Plan(save="gates", steps=3)
        turned = replace(gates, time_major=True)
        return {
            "gates kept, no lengths, no recurrent bias": (x, *arrays, None, h, None, None, gates),
            "far out": (1e4 * x, *arrays, None, h, None, None, gates),
            "time first": (x.swapaxes(0, 1), *arrays, recurrent_bias, h, jnp.array([2, 0]), resets.swapaxes(0, 1), turned),
            "one step": (x[:, :1], *arrays, None, h, None, None, gates),
            "no steps": (x[:, :0], *arrays, None, h, None, None, gates),
        }


@partial(jit, static_argnames="plan")
def _run(x, input_kernel, recurrent_kernel, bias, recurrent_bias, h, lengths, resets, *, plan: Plan):
    """The outputs, the last state, and for each chunk the state before it and the gates if they are to be kept."""

    def step(h, now):
        a, keep, reset = now
        last = restart(reset, h)
        u = jnp.split(add_bias(product(last, recurrent_kernel), recurrent_bias), 3, -1)
        _, z, n, _ = activated = _activate(a, u)
        after = hold(keep, ((1 - z) * n + z * last).astype(h.dtype), h)
        return after, (after, plan.kept(activated, recurrent_kernel.dtype))

    def chunk(carry, start, size, _):
        before, outputs = carry
        keep, reset = plan.keep(x, lengths, start, size), plan.restarts(resets, start, size)
        a = gate_products(visible(plan.cut(x, start, size), keep), input_kernel, bias, 3)
        after, (states, activated) = scan(step, before, (a, keep, reset), beside=(recurrent_kernel, recurrent_bias))
        return (after, plan.put(outputs, states, start)), (before, activated)

    carry = h, sharded_as(jnp.zeros((*x.shape[:2], h.shape[-1]), h.dtype), x)
    beside = x, input_kernel, recurrent_kernel, bias, recurrent_bias, lengths, resets
    (h, outputs), kept = fold_chunks(chunk, carry, plan.time(x), plan.steps, beside=beside)
    return outputs, h, kept


@partial(jit, static_argnames=("plan", "needs"))
def _run_back(x, input_kernel, recurrent_kernel, bias, recurrent_bias, lengths, resets, y, kept, dy, dh, *, plan: Plan, needs: tuple[bool, ...]):
    """The gradients of x, both kernels, both biases and the state."""
    dtype, back_kernel = wide(y.dtype), recurrent_kernel.T

    def step(dh, now):
        dy, (r, z, n, u), h, keep, reset = now
        dh = dh + dy.astype(dtype)
        dn = dh * (1 - z) * (1 - n * n)
        da = visible(jnp.concatenate([dn * u * r * (1 - r), dh * (h - n) * z * (1 - z), dn], -1), keep)
        return hold(keep, restart(reset, dh * z + product(_recurrent(da, r), back_kernel).astype(dtype)), dh), da

    def chunk(carry, start, size, kept):
        (dh, sums, into), (h_start, activated) = carry, kept
        keep, reset = plan.keep(x, lengths, start, size), plan.restarts(resets, start, size)
        inputs, h = visible(plan.cut(x, start, size), keep), restart(reset, before(h_start, plan.cut(y, start, size)))
        if activated is None:
            activated = _activate(gate_products(inputs, input_kernel, bias, 3), gate_products(h, recurrent_kernel, recurrent_bias, 3))
        activated = jax.tree.map(lambda a: a.astype(dtype), activated)
        dh, da = scan(step, dh, (plan.cut(dy, start, size), activated, h.astype(dtype), keep, reset), reverse=True, beside=back_kernel)
        du = _recurrent(da, activated[0])
        kernels = (lambda: summed_product(inputs, da, input_kernel), lambda: summed_product(h, du, recurrent_kernel))
        sums = add_wanted(sums, (*kernels, lambda: da.sum((0, 1)), lambda: du.sum((0, 1))))
        into = None if into is None else plan.put(into, product(da, input_kernel.T), start)
        return (dh, sums, into), None

    sums = zero_sums((input_kernel, recurrent_kernel, bias, recurrent_bias), needs[1:5])
    carry = dh.astype(dtype), sums, sharded_as(jnp.zeros_like(x), x) if needs[0] else None
    beside = x, input_kernel, recurrent_kernel, bias, recurrent_bias, lengths, resets, y, dy
    (dh, sums, dx), _ = fold_chunks(chunk, carry, plan.time(x), plan.steps, kept, reverse=True, beside=beside)
    return dx, *sums, dh


def _activate(a: Sequence[jax.Array], u: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """r, z, n and the part u_n of `u`."""
    (a_r, a_z, a_n), (u_r, u_z, u_n) = a, u
    r = jax.nn.sigmoid(a_r + u_r)
    return r, jax.nn.sigmoid(a_z + u_z), jnp.tanh(a_n + r * u_n), u_n


def _recurrent(da: jax.Array, r: jax.Array) -> jax.Array:
    """du from da."""
    hidden = r.shape[-1]
    return jnp.concatenate([da[..., : 2 * hidden], da[..., 2 * hidden :] * r], -1)


def gru(
    x: Float[Array, "*batch time features"],
    input_kernel: Float[Array, "features 3*hidden"],
    recurrent_kernel: Float[Array, "hidden 3*hidden"],
    bias: Float[Array, " 3*hidden"] | None = None,
    recurrent_bias: Float[Array, " 3*hidden"] | None = None,
    *,
    initial_carry: Float[Array, "*batch hidden"] | None = None,
    seq_lengths: Int[Array, "*batch"] | None = None,
    segment_ids: Int[Array, "*batch time"] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    dtype: Any = None,
    save: str = "states",
) -> tuple[Float[Array, "*batch time hidden"], Float[Array, "*batch hidden"]]:
    """Runs a gated recurrent unit (GRU) over a sequence: a state h that each step mixes with new values, by gates read from the step and h.

    Args:
        x: the inputs; (time, *batch, features) with `time_major`.
        input_kernel: for the gates r, z, n, one after the other along the last axis.
        recurrent_kernel: the same, of the hidden state.
        bias: the same, or None.
        recurrent_bias: is added to the product with `recurrent_kernel`, before r multiplies it: PyTorch's `bias_hh`, which Flax does not have.
        initial_carry: the state before the first step; zeros by default.
        seq_lengths: steps from there on are padding: the state stays as it is, is the output there, and x gets no gradient, whatever it holds.
        segment_ids: packed sequences, (*batch, time), or (time, *batch) with `time_major`: where the id changes from one step to the next, the state
            starts again from zeros; the first sequence that is run starts from `initial_carry`.
        reverse: runs from the last step of each sequence to the first. Outputs keep the order of `x`.
        time_major: whether the time axis of `x` and of the outputs is the first one.
        dtype: of the matrix products; by default that which all arrays promote to.
        save: what backward keeps beyond arguments and outputs: "states", one state a chunk of time; or "gates", also the gates of every step,
            which it need not compute again.

    Returns:
        `(outputs, h)`: the hidden state after each step, (*batch, time, hidden), and after the last one.

    Raises:
        ValueError: where shapes do not fit, or for an unknown `save`.
        TypeError: where arrays are not of a floating-point dtype, or lengths or ids not of integers.

    Reference: Cho et al., 2014; layout of the gates: `flax.nnx.GRUCell`.
    """
    options: dict[str, Any] = {"reverse": reverse, "time_major": time_major, "dtype": dtype, "save": save}
    parameters = (input_kernel, recurrent_kernel, bias, recurrent_bias)
    return run_gru("gru", x, parameters, initial_carry, seq_lengths, segment_ids, **options)


def run_gru(
    who: str, x: Any, parameters: Sequence[Any], initial_carry: Any, seq_lengths: Any, segment_ids: Any, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """`gru` of its kernels and one bias or both, whose errors are those of `who`."""
    bias, *more = parameters[2:]
    kernels, biases = dict(zip(KERNELS, parameters[:2], strict=True)), {"bias": bias, "recurrent_bias": more[0] if more else None}
    carry = None if initial_carry is None else (initial_carry,)
    s = prepare(who, x, kernels, biases, carry, seq_lengths, segment_ids, gates=3, states=1, **options)
    if not s.time:
        return s.no_steps(), s.states(*s.carry)[0]
    y, h = GRUFunction.apply(s.x, *s.parameters, *s.carry, s.lengths, s.resets, s.plan)
    return s.outputs(y), s.states(h)[0]


class GRU(OneCell):
    """`flax.nnx.RNN(flax.nnx.GRUCell(...))`: the same parameters, under `cell`, calls and values, by `gru`.

    As in `gru`, the state is held over padding, and the outputs there are that state.

    Args:
        in_features, hidden_features: of the cell.
        time_major, return_carry, reverse, keep_order: as in `flax.nnx.RNN`, and the same of the call.
        save: as in `gru`.
        rngs: where the parameters are drawn from.
        **cell_options: the other arguments of `flax.nnx.GRUCell`: dtype, param_dtype, kernel_init, ...
    """

    cells: ClassVar[dict[type, KnownCell]] = {nnx.GRUCell: KnownCell(run_gru, ("dense_i",), ("dense_h",), ("dense_i",))}
    cell_class = nnx.GRUCell
