"""The README's table of kernels: what was seen of each, and where. Generated from the table of what was verified and from what was compiled."""

from __future__ import annotations

import json
from typing import Any

from layers.kernels import attention, cross_entropy, selective_scan, verified
from layers.tools import kernel_registers

KERNELS = {"dot_product_attention": attention.KERNELS, "softmax_cross_entropy": cross_entropy.KERNELS, "selective_scan": selective_scan.KERNELS}
NO_DEVICE = "no device: not taken unless asked for"


def markdown(rows: list[dict[str, Any]], registers: dict[str, Any]) -> str:
    """The table.

    Args:
        rows: those of the table of what was verified.
        registers: what `kernel_registers` wrote.
    """
    lines = ["| layer | implementation | compiled for the H100: registers of a thread (bytes spilled) | verified on |", "|" + 4 * "---|"]
    for layer, kernels in KERNELS.items():
        for name in kernels:
            seen = [_verified(r) for r in rows if (r["layer"], r["implementation"]) == (layer, name)]
            own = [f"{call.removeprefix(layer + ', ')} {x['registers']} ({x['spilled']})" for call, x in registers.items() if call.startswith(layer)]
            lines.append(f"| `{layer}` | {name} | {'; '.join(own) or 'of another library'} | {'; '.join(seen) or NO_DEVICE} |")
    return "\n".join(lines)


def _verified(row: dict[str, Any]) -> str:
    """One verification in words: where, of what, how it ended."""
    place = f"{row['platform']} {row['architecture']}, JAX {row['jax']}, {row['dtype']}, {row['shape_class']}"
    return f"{place}: {row['against'] or _figures(row)}"


def _figures(row: dict[str, Any]) -> str:
    return f"{row['milliseconds']:.3g} ms, XLA {row['xla_milliseconds']:.3g}" if row["milliseconds"] is not None else "taken"


def table() -> str:
    """The table of the files that are committed."""
    return markdown(json.loads(verified.TABLE.read_text()), json.loads(kernel_registers.RESULTS.read_text()))
