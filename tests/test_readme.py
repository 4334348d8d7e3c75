"""The README says what is so: its example runs, its tables are those of the code and of the committed results."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import layers

README = Path(__file__).parents[1] / "README.md"


def test_example_runs():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "(4, 3, 4, 3)" in done.stdout


def test_lines_for_a_model_that_exists_run():
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[1]
    model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.LayerNorm(8, rngs=nnx.Rngs(1)))
    names = {"layers": layers, "model": model, "batch": jnp.ones((3, 4)), "loss": lambda model, batch: jnp.sum(model(batch) ** 2)}
    names |= {"hidden": jnp.ones((3, 8)), "kernel": jnp.ones((8, 5)), "labels": jnp.array([0, 4, 1])}
    exec(code, names)
    assert [r.layer for r in names["report"].swapped] == ["Linear", "LayerNorm"]
    assert float(names["loss"]) == pytest.approx(math.log(5))


def test_lines_for_any_model_run(capsys):
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[2]
    params = {"embed": jax.random.normal(jax.random.key(0), (64, 32)), "scale": jnp.ones(32)}
    tokens = jnp.arange(2 * 129).reshape(2, 129) % 64
    names = {"layers": layers, "jax": jax, "jnp": jnp, "params": params, "tokens": tokens}
    exec(code, names)
    replaced = {row.name for row in names["loss"].report(params, tokens).replaced}
    assert replaced == {"dot_product_attention", "rms_norm", "linear_cross_entropy"}
    assert "replaced 3 parts" in capsys.readouterr().out
    plain = jax.grad(names["loss"].__wrapped__)(params, tokens)
    for actual, expected in zip(*map(jax.tree.leaves, (jax.grad(names["loss"])(params, tokens), plain)), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-6)


def test_example_has_about_twenty_lines():
    code = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25


def test_generated_tables_are_current():
    pytest.importorskip("rich")
    pytest.importorskip("optax")
    from layers.tools.readme import fill

    text = README.read_text()
    assert fill(text) == text, "run python -m layers.tools.readme"


def test_ci_runs_the_command_of_the_readme():
    command = next(line for line in README.read_text().splitlines() if "pytest -n 2" in line)
    assert command == 'python3 -m pip install -e ".[test]" && python3 -m pytest -n 2'
    assert "grep -m 1 'pytest -n 2' README.md" in (README.parent / ".ci" / "run").read_text()


def test_no_address_of_a_registry_or_host():
    root = README.parent
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True).stdout.split()
    # the scheme is put together here so that this file does not match itself
    address = re.compile("http" + r"s?://(?!arxiv\.org|doi\.org)")
    found = [name for name in tracked if (root / name).is_file() and address.search((root / name).read_text(errors="ignore"))]
    assert not found
