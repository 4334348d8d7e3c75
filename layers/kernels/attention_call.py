"""What is known of a call of attention when it is traced."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]
LONG = 1024
"""The number of queries and of keys from which on a call is long: below, starting a kernel takes a good part of its time."""


@dataclass(frozen=True)
class AttentionCall:
    """What is known of a call of attention when it is traced.

    Attributes:
        query, key, value: shapes, (batch, time, heads, head_dim).
        dtype: of all three.
        scale: of the products.
        low, high: bounds of the query's position less the key's; None for no bound.
        bias: its shape, (batch, heads, time, kv_time), each of its own length or 1; None without.
        bias_dtype: its dtype.
        lengths, mask, segments, offsets, sinks, dropout: whether there are such.
        cap: the soft cap of the scores.
        varies: whether the arrays are known to differ along manual axes of a mesh (`shard_map(check_vma=True)`).
        mesh: "automatic" or "explicit" where the arrays may lie along such axes of a mesh.
    """

    query: Shape
    key: Shape
    value: Shape
    dtype: str
    scale: float = 1.0
    low: int | None = None
    high: int | None = None
    bias: Shape | None = None
    bias_dtype: str = ""
    lengths: bool = False
    mask: bool = False
    segments: bool = False
    offsets: bool = False
    sinks: bool = False
    dropout: bool = False
    cap: float | None = None
    varies: bool = False
    mesh: str = ""

    @property
    def sized(self) -> bool:
        """Whether every length is a number above 0, not a symbol (`jax.export`)."""
        return all(isinstance(n, int) and n > 0 for n in (*self.query, *self.key, *self.value))

    @property
    def features(self) -> tuple[str, ...]:
        """The options that a kernel has to have."""
        named = {
            "causal": self.low == 0 and self.high is None,
            "causal window": self.low == 0 and self.high is not None,
            "window": self.low != 0 and self.high is not None,
            "causal with an offset": self.low not in (0, None) and self.high is None,
            "bias": self.bias is not None,
            "soft cap": self.cap is not None,
        }
        flags = {name: getattr(self, name) for name in ("lengths", "mask", "segments", "offsets", "sinks", "dropout")}
        return tuple(name for name, given in (named | flags).items() if given)

    @property
    def shape_class(self) -> str:
        """What a verification of one such call says of others."""
        size = "unsized" if not self.sized else "long" if min(self.query[1], self.key[1]) >= LONG else "short"
        return f"{', '.join(self.features) or 'plain'}, head_dim {self.query[3]}, {size}"
