"""The benchmark's rows are complete and its figures are those of the programs; the whole training step keeps its memory promise."""

import json

import jax
import numpy as np
import pytest

from layers.tools import bench, bench_step, readme
from layers.tools.cases import CASES
from layers.tools.measure import compile_program, of_program

SMALL = {"vocab": 64, "length": 16, "width": 16, "depth": 2, "heads": 2}


def test_row_names_are_unique():
    assert len(set(bench.names())) == len(bench.names())


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_ways_of_a_row_give_values_of_the_same_shapes(case):
    args = jax.eval_shape(case.args)
    shapes = [jax.eval_shape(way, *args) for way in (case.idiomatic, case.ours, *dict(case.others).values())]
    assert all(jax.tree.map(lambda x: x.shape, s) == jax.tree.map(lambda x: x.shape, shapes[0]) for s in shapes)


def test_row_holds_exact_memory_and_its_ratio(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {}, "rows": [{"name": "linear", "work": "kept", "ways": {}}]}))
    assert bench.main(["rms_norm"], rounds=0, json_path=str(path)) == 0
    rows = {r["name"]: r for r in json.loads(path.read_text())["rows"]}
    assert rows["linear"]["work"] == "kept"
    ways = rows["rms_norm"]["ways"]
    assert ways["ours"]["temp_ratio"] == ways["ours"]["temp_bytes"] / ways["idiomatic"]["temp_bytes"] < 0.1
    assert ways["ours"]["seconds"] is None


def test_unknown_row_is_an_error():
    with pytest.raises(ValueError, match="no row is named 'nothing'"):
        bench.main(["nothing"])


def test_results_that_are_committed_have_every_row():
    names = [r["name"] for r in json.loads(bench.RESULTS.read_text())["rows"]]
    assert names == [n for n in bench.names() if n != "function"]
    assert readme.bench_table().count("\n| ") >= len(CASES)


@pytest.mark.parametrize("scan", [False, True], ids=bench_step.STACKS)
def test_training_step_takes_a_quarter_of_the_temporary_memory_of_flax(scan):
    """Full size; compiled, not run."""

    def temp(way):
        step, state = bench_step.make_step(way, scan=scan)
        return of_program(compile_program(step, (state, bench_step.draw_tokens()), donate_argnums=0)).temp_bytes

    assert temp("ours") <= 0.25 * temp("idiomatic")


@pytest.mark.parametrize("scan", [False, True], ids=bench_step.STACKS)
def test_every_way_of_the_training_step_has_the_same_losses(scan):
    tokens = bench_step.draw_tokens(SMALL, batch=2)
    losses = {}
    for way in bench_step.WAYS:
        step, state = bench_step.make_step(way, scan=scan, sizes=SMALL)
        step = jax.jit(step)
        losses[way] = []
        for _ in range(4):
            state, loss = step(state, tokens)
            losses[way].append(float(loss))
        np.testing.assert_allclose(losses[way], losses["idiomatic"], rtol=2e-4)
    assert losses["ours"][-1] < losses["ours"][0]


def test_row_that_was_only_compiled_keeps_its_times_and_its_peers():
    old = {"seconds": 1.0, "spread": 0.1, "time_ratio": 1.0, "temp_bytes": 8, "resident_bytes": None, "resident_ratio": None}
    before = {"name": "x", "ways": {"idiomatic": old, "torch": {**old, "temp_bytes": None}}}
    after = bench._with_times({"name": "x", "ways": {"idiomatic": {**dict.fromkeys(old), "temp_bytes": 4}}}, before)
    assert after["ways"] == {"idiomatic": {**old, "temp_bytes": 4}, "torch": before["ways"]["torch"]}
