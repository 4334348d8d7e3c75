"""Long short-term memory.

    a_t = x_t W + h_{t-1} R + bias,   (i, f, g, o) = (σ, σ, tanh, σ)(a_t)
    c_t = f c_{t-1} + i g,   h_t = o tanh(c_t)

with W the input kernel and R the recurrent kernel. Going back in time, with dh and dc what arrives from step t + 1, and dh with dy_t added:

    dc  = dc + dh o (1 - tanh² c_t)
    da  = (dc g i (1 - i),  dc c_{t-1} f (1 - f),  dc i (1 - g²),  dh tanh(c_t) o (1 - o))
    dc' = dc f,   dh' = da Rᵀ                                        (what goes on to step t - 1)

The rest needs no loop over steps: dx = da Wᵀ, dW = Σ x_tᵀ da, dR = Σ h_{t-1}ᵀ da, dbias = Σ da, one product each for a chunk of time.
A step beyond the length of its sequence hands on c and h, dc and dh, as they are. Where a packed sequence starts, c_{t-1}, h_{t-1}, dc' and dh'
are 0.

Saved: the arguments, h (which is the output), and c and h before each chunk. From these, the gates of a chunk are one product of x and the states
h before each step, and c is one elementwise pass. With `save="gates"`, also the gates, which spares backward that product.

Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers et al., "Learning to Forget", 2000.
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
from layers.recurrent.gates import Plan, add_wanted, gate_products, hold, product, summed_product, visible, zero_sums
from layers.recurrent.loops import fold_chunks, scan
from layers.recurrent.one_cell import OneCell
from layers.recurrent.recurrence import before
from layers.recurrent.segments import restart
from layers.recurrent.sequences import KERNELS, prepare
from layers.recurrent.whole_sequences import KnownCell


class LSTMFunction(Function):
    @staticmethod
    def forward(ctx, x, input_kernel, recurrent_kernel, bias, c, h, lengths, resets, plan):
        y, c, h, kept = _run(x, input_kernel, recurrent_kernel, bias, c, h, lengths, resets, plan=plan)
        ctx.save_for_backward(x, input_kernel, recurrent_kernel, bias, lengths, resets, y, kept)
        ctx.plan = plan
        return y, c, h

    @staticmethod
    def backward(ctx, dy, dc, dh):
        saved, grads = barrier(ctx.saved_tensors, (dy, dc, dh))
        return *_run_back(*saved, *grads, plan=ctx.plan, needs=ctx.needs_input_grad), None, None, None

    @staticmethod
    def example(key, dtype):
        shapes = (2, 4, 3), (3, 8), (2, 8), (8,), (2, 2), (2, 2)
        arrays = [jax.random.normal(k, s, dtype) for k, s in zip(jax.random.split(key, 6), shapes, strict=True)]
        return *arrays, jnp.array([4, 3]), jnp.array([[[0], [1], [0], [0]]] * 2, bool), Plan(steps=2, reverse=True)

    @staticmethod
    def examples(key, dtype):
        x, input_kernel, recurrent_kernel, bias, c, h, _, resets, _ = LSTMFunction.example(key, dtype)
        arrays, gates = (input_kernel, recurrent_kernel, bias, c, h), Plan(save="gates", steps=3)
        turned = replace(gates, time_major=True)
        return {
            "gates kept, no lengths": (x, *arrays, None, None, gates),
            "far out": (1e4 * x, *arrays, None, None, gates),
            "time first": (x.swapaxes(0, 1), *arrays, jnp.array([2, 0]), resets.swapaxes(0, 1), turned),
            "one step": (x[:, :1], *arrays, None, None, gates),
            "no steps": (x[:, :0], *arrays, None, None, gates),
        }


@partial(jit, static_argnames="plan")
def _run(x, input_kernel, recurrent_kernel, bias, c, h, lengths, resets, *, plan: Plan):
    """The outputs, both last states, and for each chunk both states before it and the gates if they are to be kept."""

    def step(carry, now):
        a, keep, reset = now
        c, h = restart(reset, carry)
        i, f, g, o = activated = _activate(a, jnp.split(product(h, recurrent_kernel), 4, -1))
        after = f * c + i * g
        carry = hold(keep, (after, (o * jnp.tanh(after)).astype(h.dtype)), carry)
        return carry, (carry[1], plan.kept(activated, recurrent_kernel.dtype))

    def chunk(carry, start, size, _):
        before, outputs = carry
        keep, reset = plan.keep(x, lengths, start, size), plan.restarts(resets, start, size)
        a = gate_products(visible(plan.cut(x, start, size), keep), input_kernel, bias, 4)
        after, (states, activated) = scan(step, before, (a, keep, reset), beside=recurrent_kernel)
        return (after, plan.put(outputs, states, start)), (before, activated)

    carry = (c.astype(wide(c.dtype)), h), sharded_as(jnp.zeros((*x.shape[:2], h.shape[-1]), h.dtype), x)
    beside = x, input_kernel, recurrent_kernel, bias, lengths, resets
    ((last, h), outputs), kept = fold_chunks(chunk, carry, plan.time(x), plan.steps, beside=beside)
    return outputs, last.astype(c.dtype), h, kept


@partial(jit, static_argnames=("plan", "needs"))
def _run_back(x, input_kernel, recurrent_kernel, bias, lengths, resets, y, kept, dy, dc, dh, *, plan: Plan, needs: tuple[bool, ...]):
    """The gradients of x, both kernels, bias and both states."""
    dtype, back_kernel = wide(y.dtype), recurrent_kernel.T

    def step(carry, now):
        dc, dh = carry
        dy, (i, f, g, o), c_before, tanh_c, keep, reset = now
        dh = dh + dy.astype(dtype)
        held, dc = (dc, dh), dc + dh * o * (1 - tanh_c * tanh_c)
        da = jnp.concatenate([dc * g * i * (1 - i), dc * c_before * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o)], -1)
        da = visible(da, keep)
        return hold(keep, restart(reset, (dc * f, product(da, back_kernel).astype(dtype))), held), da

    def chunk(carry, start, size, kept):
        (state, sums, into), ((c_start, h_start), activated) = carry, kept
        keep, reset = plan.keep(x, lengths, start, size), plan.restarts(resets, start, size)
        inputs, h = visible(plan.cut(x, start, size), keep), restart(reset, before(h_start, plan.cut(y, start, size)))
        if activated is None:
            activated = _activate(gate_products(inputs, input_kernel, bias, 4), gate_products(h, recurrent_kernel, None, 4))
        activated = jax.tree.map(lambda a: a.astype(dtype), activated)
        c_before, c = _cells(c_start, activated, keep, reset)
        rows = plan.cut(dy, start, size), activated, c_before, jnp.tanh(c), keep, reset
        state, da = scan(step, state, rows, reverse=True, beside=back_kernel)
        terms = (lambda: summed_product(inputs, da, input_kernel), lambda: summed_product(h, da, recurrent_kernel), lambda: da.sum((0, 1)))
        into = None if into is None else plan.put(into, product(da, input_kernel.T), start)
        return (state, add_wanted(sums, terms), into), None

    sums = zero_sums((input_kernel, recurrent_kernel, bias), needs[1:4])
    carry = (dc.astype(dtype), dh.astype(dtype)), sums, sharded_as(jnp.zeros_like(x), x) if needs[0] else None
    beside = x, input_kernel, recurrent_kernel, bias, lengths, resets, y, dy
    (state, sums, dx), _ = fold_chunks(chunk, carry, plan.time(x), plan.steps, kept, reverse=True, beside=beside)
    return dx, *sums, *state


def _activate(a: Sequence[jax.Array], u: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    i, f, g, o = (p + q for p, q in zip(a, u, strict=True))
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)


def _cells(start: jax.Array, activated: tuple[jax.Array, ...], keep: Any, resets: Any) -> tuple[jax.Array, jax.Array]:
    """The cell state before and after each step of a chunk."""
    i, f, g, _ = activated

    def step(c, now):
        f, ig, keep, reset = now
        last = restart(reset, c)
        after = hold(keep, f * last + ig, c)
        return after, (last, after)

    return scan(step, start.astype(f.dtype), (f, i * g, keep, resets))[1]


def lstm(
    x: Float[Array, "*batch time features"],
    input_kernel: Float[Array, "features 4*hidden"],
    recurrent_kernel: Float[Array, "hidden 4*hidden"],
    bias: Float[Array, " 4*hidden"] | None = None,
    *,
    initial_carry: tuple[Float[Array, "*batch hidden"], Float[Array, "*batch hidden"]] | None = None,
    seq_lengths: Int[Array, "*batch"] | None = None,
    segment_ids: Int[Array, "*batch time"] | None = None,
    reverse: bool = False,
    time_major: bool = False,
    dtype: Any = None,
    save: str = "states",
) -> tuple[Float[Array, "*batch time hidden"], tuple[Float[Array, "*batch hidden"], Float[Array, "*batch hidden"]]]:
    """Runs a long short-term memory (LSTM) over a sequence: a memory c that gates keep, add to and read, and the output h of each step.

    Args:
        x: the inputs; (time, *batch, features) with `time_major`.
        input_kernel: for the gates i, f, g, o, one after the other along the last axis.
        recurrent_kernel: the same, of the hidden state.
        bias: the same, or None. The two of PyTorch are added to one.
        initial_carry: the states (c, h) before the first step, as in Flax; zeros by default.
        seq_lengths: steps from there on are padding: the state stays as it is, is the output there, and x gets no gradient, whatever it holds.
        segment_ids: packed sequences, (*batch, time), or (time, *batch) with `time_major`: where the id changes from one step to the next, the state
            starts again from zeros; the first sequence that is run starts from `initial_carry`.
        reverse: runs from the last step of each sequence to the first. Outputs keep the order of `x`.
        time_major: whether the time axis of `x` and of the outputs is the first one.
        dtype: of the matrix products; by default that which all arrays promote to.
        save: what backward keeps beyond arguments and outputs: "states", two states a chunk of time; or "gates", also the gates of every step,
            which it need not compute again.

    Returns:
        `(outputs, (c, h))`: the hidden state after each step, (*batch, time, hidden), and both states after the last step.

    Raises:
        ValueError: where shapes do not fit, or for an unknown `save`.
        TypeError: where arrays are not of a floating-point dtype, or lengths or ids not of integers.

    Reference: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; layout of the gates: `flax.nnx.OptimizedLSTMCell`.
    """
    options: dict[str, Any] = {"reverse": reverse, "time_major": time_major, "dtype": dtype, "save": save}
    return run_lstm("lstm", x, (input_kernel, recurrent_kernel, bias), initial_carry, seq_lengths, segment_ids, **options)


def run_lstm(
    who: str, x: Any, parameters: Sequence[Any], initial_carry: Any, seq_lengths: Any, segment_ids: Any, **options: Any
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """`lstm` of its kernels and bias, whose errors are those of `who`."""
    kernels, biases = dict(zip(KERNELS, parameters[:2], strict=True)), {"bias": parameters[2]}
    s = prepare(who, x, kernels, biases, initial_carry, seq_lengths, segment_ids, gates=4, states=2, **options)
    if not s.time:
        c, h = s.states(*s.carry)
        return s.no_steps(), (c, h)
    y, *carry = LSTMFunction.apply(s.x, *s.parameters, *s.carry, s.lengths, s.resets, s.plan)
    c, h = s.states(*carry)
    return s.outputs(y), (c, h)


class LSTM(OneCell):
    """`flax.nnx.RNN(flax.nnx.OptimizedLSTMCell(...))`: the same parameters, under `cell`, calls and values, by `lstm`.

    As in `lstm`, the state is held over padding, and the outputs there are that state.

    Args:
        in_features, hidden_features: of the cell.
        time_major, return_carry, reverse, keep_order: as in `flax.nnx.RNN`, and the same of the call.
        save: as in `lstm`.
        rngs: where the parameters are drawn from.
        **cell_options: the other arguments of `flax.nnx.OptimizedLSTMCell`: dtype, param_dtype, kernel_init, ...
    """

    cells: ClassVar[dict[type, KnownCell]] = {
        nnx.OptimizedLSTMCell: KnownCell(run_lstm, ("dense_i",), ("dense_h",), ("dense_h",)),
        nnx.LSTMCell: KnownCell(run_lstm, ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"), ("hi", "hf", "hg", "ho")),
    }
    cell_class = nnx.OptimizedLSTMCell
