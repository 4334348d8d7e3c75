"""Makes `data/torch.json`: what PyTorch computes where a layer has to compute the same, from arguments that stand beside it, in float64.

`python tests/torch_references.py`, where PyTorch is installed; the tests read the file by `tests.support.torch_reference`.
"""

import json
import pathlib

import numpy as np
import torch

FILE = pathlib.Path(__file__).parent / "data" / "torch.json"
rng = np.random.default_rng(0)
BATCH, TIME, FEATURES, HIDDEN, ROWS, CLASSES = 2, 5, 3, 4, 15, 7


def draw(*shape):
    return torch.tensor(rng.normal(size=shape), requires_grad=True)


def case(inputs, outputs):
    """The arrays by name, and `d_name`, the gradient by each floating-point input of the sum of the sines of all outputs."""
    sum(y.sin().sum() for y in outputs.values()).backward()
    gradients = {f"d_{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    return {name: x.detach().tolist() for name, x in (inputs | outputs | gradients).items()}


def linear():
    inputs = {"x": draw(ROWS, FEATURES), "weight": draw(HIDDEN, FEATURES), "bias": draw(HIDDEN)}
    return case(inputs, {"y": torch.nn.functional.linear(*inputs.values())})


def recurrent(layer, states):
    """Kernels in the layer's own layout, (features, gates * hidden)."""
    gates = layer.weight_hh_l0.shape[0]
    inputs = {"x": draw(BATCH, TIME, FEATURES), "input_kernel": draw(FEATURES, gates), "recurrent_kernel": draw(HIDDEN, gates)}
    inputs |= {"bias": draw(gates), "recurrent_bias": draw(gates)} | {name: draw(BATCH, HIDDEN) for name in states}
    weights = {"weight_ih_l0": inputs["input_kernel"].T, "weight_hh_l0": inputs["recurrent_kernel"].T}
    weights |= {"bias_ih_l0": inputs["bias"], "bias_hh_l0": inputs["recurrent_bias"]}
    first = [inputs[name][None] for name in states]
    y, last = torch.func.functional_call(layer, weights, (inputs["x"], tuple(first) if len(first) > 1 else first[0]))
    return case(inputs, {"y": y} | {f"last_{n}": s[0] for n, s in zip(states, last if len(first) > 1 else [last], strict=True)})


def cross_entropy(labels, **options):
    inputs = {"logits": draw(ROWS, CLASSES), "labels": labels}
    loss = torch.nn.functional.cross_entropy(*inputs.values(), **options)
    return case(inputs, {"loss": loss}) | {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


classes = torch.tensor(rng.integers(0, CLASSES, ROWS)).index_fill(0, torch.tensor([2, 8]), -100)
distributions = torch.softmax(draw(ROWS, CLASSES), -1).detach()
smoothed = {"label_smoothing": 0.1, "weight": torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0, 1.5, 0.7], dtype=torch.float64)}
CASES = {
    "made with": {"torch": torch.__version__},
    "linear": linear(),
    "lstm": recurrent(torch.nn.LSTM(FEATURES, HIDDEN, batch_first=True, dtype=torch.float64), ("h", "c")),
    "gru": recurrent(torch.nn.GRU(FEATURES, HIDDEN, batch_first=True, dtype=torch.float64), ("h",)),
    "cross_entropy": cross_entropy(classes),
    "cross_entropy, mean": cross_entropy(classes, **smoothed),
    "cross_entropy, none": cross_entropy(classes, **smoothed, reduction="none"),
    "cross_entropy, distributions": cross_entropy(distributions, **smoothed),
}

FILE.write_text("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(arrays)}" for name, arrays in CASES.items()) + "\n}\n")
