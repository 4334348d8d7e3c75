"""Reinforcement learning with a reward that can be verified: a small language model learns to write four digits backwards, by GRPO.

Each step samples completions of the model as it is, rewards the share of digits that are right, and follows the advantage over the other
completions of the same prompt. So the policy that sampled is the one that is trained, and the ratio is 1.

Reference: Shao et al., "DeepSeekMath", 2024.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import layers
from layers.tools.language_model import Decoder
from layers.tools.task import Task, digest

DIGITS, START, GROUP = 4, 10, 8
"""Digits of a prompt, the token before them, completions of each prompt."""


def right(prompts: jax.Array, completions: jax.Array) -> jax.Array:
    """Which digits of completions are those of their prompt, backwards."""
    return completions == prompts[..., ::-1]


def _sequences(prompts: jax.Array, completions: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.full_like(prompts[:, :1], START), prompts, completions], 1)


def complete(model: Decoder, prompts: jax.Array, choose: Any) -> jax.Array:
    """The model's completions; `choose(logits, place)` gives the next token of each."""

    def one(completions: jax.Array, place: jax.Array) -> tuple[jax.Array, None]:
        logits = model(_sequences(prompts, completions)[:, :-1])[:, DIGITS:]
        return completions.at[:, place].set(choose(logits[:, place], place)), None

    return lax.scan(one, jnp.zeros_like(prompts), jnp.arange(DIGITS))[0]


def advantages(prompts: jax.Array, completions: jax.Array) -> jax.Array:
    """The reward of each completion less the mean of its group, over their deviation."""
    reward = right(prompts, completions).mean(-1).reshape(-1, GROUP)
    return ((reward - reward.mean(1, keepdims=True)) / (reward.std(1, keepdims=True) + 1e-4)).reshape(-1)


def fused_loss(model: Decoder, sequences: jax.Array, advantage: jax.Array) -> jax.Array:
    """The policy's loss, without the logits ever being whole in memory."""
    x = model.hidden(sequences[:, :-1])[:, DIGITS:]
    return layers.linear_grpo(x, model.head.kernel[...], sequences[:, DIGITS + 1 :], advantage, loss_type="grpo")


def plain_loss(model: Decoder, sequences: jax.Array, advantage: jax.Array) -> jax.Array:
    """The same, as people write it."""
    log_p = jax.nn.log_softmax(model(sequences[:, :-1])[:, DIGITS:])
    log_prob = jnp.take_along_axis(log_p, sequences[:, DIGITS + 1 :, None], -1)[..., 0]
    ratio, a = jnp.exp(log_prob - lax.stop_gradient(log_prob)), advantage[:, None]
    return -jnp.minimum(ratio * a, jnp.clip(ratio, 0.8, 1.2) * a).mean()


def backwards(modules: ModuleType) -> Task:
    """Four digits, to be written backwards; a tenth of all prompts is held out."""
    every = np.stack(np.unravel_index(np.random.default_rng(0).permutation(10**DIGITS), (10,) * DIGITS), -1).astype(np.int32)
    test, train = jnp.asarray(every[: len(every) // 10]), jnp.asarray(every[len(every) // 10 :])
    policy_loss = fused_loss if modules is layers else plain_loss

    def draw(key: jax.Array, size: int) -> Any:
        of_prompts, of_samples = jax.random.split(key)
        return train[jax.random.randint(of_prompts, (size,), 0, len(train))], of_samples

    def loss(model: Decoder, batch: Any) -> jax.Array:
        prompts, key = jnp.repeat(batch[0], GROUP, 0), batch[1]
        sample = lambda logits, place: jax.random.categorical(jax.random.fold_in(key, place), logits)
        completions = lax.stop_gradient(complete(model, prompts, sample))
        return policy_loss(model, _sequences(prompts, completions), advantages(prompts, completions))

    def validate(model: Decoder) -> dict[str, jax.Array]:
        found = right(test, complete(model, test, lambda logits, _: logits.argmax(-1)))
        return {"digits right": found.mean(), "all digits right": found.all(-1).mean()}

    model = lambda rngs: Decoder(modules, rngs, vocab=11, length=2 * DIGITS, width=64, depth=2)
    return Task(model, draw, loss, validate, "prompts", 1, 400, 32, digest(every))
