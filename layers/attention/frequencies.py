"""The angles by which a rotary embedding turns each pair of features at a step, and how models for long contexts slow them down.

    default        f_i = base^(-2 i / n)                                     n: the features that are rotated
    linear         f_i / factor
    proportional   the first share of the pairs turns by f_i / factor, the others not at all
    llama3         f_i where the wavelength 2π / f_i is short, f_i / factor where it is long, blended linearly in 1 / wavelength between
    yarn           f_i / factor blended with f_i by a ramp over i, from where a pair turns `beta_slow` times in the original context to where
                   it turns `beta_fast` times; the rotated features are multiplied by an attention factor

Names and defaults are those of the `rope_scaling` of a configuration of Hugging Face's transformers.

Reference: Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation", 2023 (linear); Peng et al., "YaRN", 2023;
Meta, Llama 3.1, 2024; Google, Gemma 4 (proportional).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from layers.core import checks

WHO, LENGTH = "rotary_embedding", "original_max_position_embeddings"
WITHIN = {"partial_rotary_factor": "[0, 1]", "mscale": "[0, inf)", "mscale_all_dim": "[0, inf)"}


def scaled_frequencies(pairs: int, base: float, scaling: Any) -> tuple[np.ndarray, float]:
    """The frequency of each pair, in float64, and what multiplies the rotated features.

    scaling: a mapping with "rope_type" and the numbers of that type; None for the default.
    """
    frequencies = base ** (-np.arange(pairs) / max(pairs, 1))
    if scaling is None:
        return frequencies, 1.0
    if not isinstance(scaling, Mapping):
        raise TypeError(f'{WHO}: scaling is {checks.shown(scaling)}, but must be a dictionary, such as {{"rope_type": "linear", "factor": 2.0}}')
    kind = checks.choice(WHO, 'scaling["rope_type"]', scaling.get("rope_type", scaling.get("type")), TYPES)
    numbers = {key: value for key, value in scaling.items() if key not in ("rope_type", "type")}
    needed, known, scale = TYPES[kind]
    for key in numbers:
        if key not in known:
            raise ValueError(f"{WHO}: scaling has {key!r}, but {kind!r} knows {', '.join(known) or 'no numbers'} only")
    for key in needed:
        if key not in numbers:
            raise ValueError(f"{WHO}: scaling is of type {kind!r}, which needs {key!r}")
    return scale(frequencies, base, {key: _checked(key, value) for key, value in numbers.items()})


def _checked(key: str, value: Any) -> Any:
    if key == "truncate":
        return checks.flag(WHO, "scaling['truncate']", value)
    return checks.number(WHO, f"scaling[{key!r}]", value, WITHIN.get(key, "(0, inf)"))


def _default(f: np.ndarray, base: float, given: dict[str, Any]) -> tuple[np.ndarray, float]:
    return f, 1.0


def _linear(f: np.ndarray, base: float, given: dict[str, Any]) -> tuple[np.ndarray, float]:
    return f / given["factor"], 1.0


def _proportional(f: np.ndarray, base: float, given: dict[str, Any]) -> tuple[np.ndarray, float]:
    turning = int(given["partial_rotary_factor"] * len(f))
    return np.where(np.arange(len(f)) < turning, f / given.get("factor", 1.0), 0.0), 1.0


def _llama3(f: np.ndarray, base: float, given: dict[str, Any]) -> tuple[np.ndarray, float]:
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    if not low < high:
        raise ValueError(f"{WHO}: scaling has low_freq_factor {low}, but must have one below high_freq_factor {high}")
    turns = given[LENGTH] * f / (2 * math.pi)  # in the original context
    share = np.clip((turns - low) / (high - low), 0, 1)
    return share * f + (1 - share) * f / given["factor"], 1.0


def _yarn(f: np.ndarray, base: float, given: dict[str, Any]) -> tuple[np.ndarray, float]:
    factor, pairs = given["factor"], len(f)

    def place(turns: float) -> float:
        """Of the pair that turns so often in the original context, among all."""
        return pairs * math.log(given[LENGTH] / (turns * 2 * math.pi)) / math.log(base)

    if base == 1:
        raise ValueError(f"{WHO}: base is 1, at which all pairs turn alike: yarn needs another")
    first, last = place(given.get("beta_fast", 32.0)), place(given.get("beta_slow", 1.0))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    ramp = np.clip((np.arange(pairs) - first) / ((last - first) or 0.001), 0, 1)
    return (1 - ramp) * f + ramp * f / factor, given.get("attention_factor", _attention_factor(factor, given))


def _attention_factor(factor: float, given: dict[str, Any]) -> float:
    def of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1

    if given.get("mscale") and given.get("mscale_all_dim"):
        return of(given["mscale"]) / of(given["mscale_all_dim"])
    return of(1.0)


Scale = Callable[[np.ndarray, float, dict[str, Any]], tuple[np.ndarray, float]]
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", LENGTH)
YARN = ("factor", LENGTH)
YARN_MORE = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate")
TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...], Scale]] = {
    "default": ((), (), _default),
    "linear": (("factor",), ("factor",), _linear),
    "proportional": (("partial_rotary_factor",), ("partial_rotary_factor", "factor"), _proportional),
    "llama3": (LLAMA3, LLAMA3, _llama3),
    "yarn": (YARN, YARN + YARN_MORE, _yarn),
}
"""Of each type: the numbers that it needs, those that it knows, and what it makes of the frequencies and the base."""
