"""The benchmark's rows are complete and its figures are those of the programs; the whole training step keeps its memory promise."""

import json

import jax
import numpy as np
import pytest

from layers.tools import bench, bench_rows, bench_step, cli, goals_table, kernel_table, llama_step, measure, readme
from layers.tools.bench_rows import layer_row, with_times
from layers.tools.cases import CASES, goals
from layers.tools.cases.case import forward_and_backward
from layers.tools.measure import compile_program, of_program

SMALL = {"vocab": 64, "length": 16, "width": 16, "depth": 2, "heads": 2}
SMALL_LLAMA = {"vocab": 32, "width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "hidden": 24, "batch": 1, "time": 4}
TINY = goals.Sizes(
    batch=1,
    time=8,
    heads=2,
    kv_heads=1,
    head_dim=4,
    rows=8,
    width=4,
    hidden=8,
    vocab=12,
    wide=4,
    wide_hidden=8,
    loss_rows=4,
    groups=2,
    group_hidden=4,
)


@pytest.fixture
def small(monkeypatch):
    """Rows of the size of a GPU, of the size of a test."""
    monkeypatch.setattr(goals, "CASES", goals.cases(TINY))
    monkeypatch.setattr(llama_step, "SIZES", SMALL_LLAMA)
    monkeypatch.setattr(bench, "machine_limits", lambda: (1e9, 1e9))


def test_row_names_are_unique():
    assert len(set(bench.names())) == len(bench.names())


@pytest.mark.parametrize("case", (*CASES, *goals.CASES), ids=lambda c: c.name)
def test_ways_of_a_row_give_values_of_the_same_shapes(case):
    args = jax.eval_shape(case.args)
    shapes = [jax.eval_shape(way, *args) for way in (case.idiomatic, case.ours, *dict(case.others).values())]
    assert all(jax.tree.map(lambda x: x.shape, s) == jax.tree.map(lambda x: x.shape, shapes[0]) for s in shapes)


def test_row_holds_exact_memory_and_its_ratio(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"machine": {}, "rows": [{"name": "linear", "work": "kept", "ways": {}}]}))
    assert bench.main(["rms_norm"], bench.Plan(rounds=0), json_path=str(path)) == 0
    rows = {r["name"]: r for r in json.loads(path.read_text())["rows"]}
    assert rows["linear"]["work"] == "kept"
    ways = rows["rms_norm"]["ways"]
    assert ways["ours"]["temp_ratio"] == ways["ours"]["temp_bytes"] / ways["idiomatic"]["temp_bytes"] < 0.1
    assert ways["ours"]["seconds"] is None


@pytest.mark.parametrize(("run_again", "machine"), [(["linear"], "old"), (["linear", "relu"], "new")])
def test_machine_is_that_of_the_rows_that_were_not_run_again(run_again, machine):
    row = lambda name: {"name": name, "ways": {"idiomatic": {"seconds": 1.0}}}
    results = lambda which, names: {"machine": {"processor": which, "matmul_flops": 1e9}, "rows": list(map(row, names))}
    merged = bench_rows.merged(results("new", run_again), results("old", ["linear", "relu"]), ["linear", "relu"])
    assert merged["machine"]["processor"] == machine


def test_unknown_row_is_an_error():
    with pytest.raises(ValueError, match="no row is named 'nothing'"):
        bench.main(["nothing"])


def test_results_that_are_committed_have_every_row():
    names = [r["name"] for r in json.loads(bench.RESULTS.read_text())["rows"]]
    assert names == [n for n in bench.names("cpu") if n != "function"]
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
    after = with_times({"name": "x", "ways": {"idiomatic": {**dict.fromkeys(old), "temp_bytes": 4}}}, before)
    assert after["ways"] == {"idiomatic": {**old, "temp_bytes": 4}, "torch": before["ways"]["torch"]}


def test_every_row_of_the_size_of_a_gpu_has_a_goal():
    assert list(goals.GOALS) == bench.names("gpu")


def test_size_of_a_gpu_runs_its_rows_and_the_step_in_bfloat16(small, monkeypatch, tmp_path):
    monkeypatch.setattr(goals, "CASES", [c for c in goals.CASES if c.name in ("gpu_rms_norm", "gpu_int8_linear")])
    path = tmp_path / "results.json"
    assert cli.main(["bench", "--size", "gpu", "--rounds", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [r["name"] for r in rows] == ["gpu_rms_norm", "gpu_int8_linear", "training_step_gpu"]
    assert all(r["dtype"] == "bfloat16" and r["ways"]["ours"]["seconds"] > 0 for r in rows)


def test_quick_runs_two_ways_of_few_rows_and_prints_each(small, monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", ("gpu_rms_norm", "gpu_softmax_cross_entropy"))
    assert cli.main(["bench", "--quick"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gpu_")]
    assert {line.split(",")[0] for line in lines} == set(bench.QUICK)
    assert all("idiomatic" in line and "ours" in line and "checkpoint" not in line and " ms" in line for line in lines)


def test_quick_rows_are_rows():
    assert set(bench.QUICK) <= set(bench.names())


@pytest.mark.parametrize("words", [["--quick", "relu"], ["--size", "gpu", "relu"], ["--quick", "--size", "gpu"]], ids=" ".join)
def test_two_ways_to_pick_rows_are_an_error(words, capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", *words])
    assert "give one of them" in capsys.readouterr().err


def test_rows_are_in_the_file_as_soon_as_they_are_measured(small, monkeypatch, tmp_path):
    path = tmp_path / "results.json"

    def one_row_and_an_end(*_):
        yield {"name": "relu", "work": "", "ways": {"idiomatic": {"seconds": 1.0}}}
        assert [r["name"] for r in json.loads(path.read_text())["rows"]] == ["relu"]
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "rows", one_row_and_an_end)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["relu", "gelu"], json_path=str(path))


def test_no_row_is_begun_after_the_last_minute(small, capsys):
    assert bench.main(["gpu_rms_norm"], bench.Plan(minutes=0)) == 0
    assert "0 minutes are over: the other rows were not begun" in capsys.readouterr().out


def test_rows_of_another_dtype_stand_beside_each_other(small, tmp_path):
    path = tmp_path / "results.json"
    for dtype in ("bfloat16", "float32"):
        bench.main(["gpu_rms_norm"], bench.Plan(rounds=0, dtype=dtype), json_path=str(path))
    assert [r["dtype"] for r in json.loads(path.read_text())["rows"]] == ["float32", "bfloat16"]


def test_forward_and_backward_are_timed_as_two_programs(small):
    case = goals.cases(TINY)[0]
    row = layer_row(case, dtype="bfloat16", rounds=1, limits=(0.0, 0.0), apart=True, main_ways=True)
    assert all(row["ways"][way]["apart_seconds"] > 0 for way in ("idiomatic", "ours"))
    args = case.arguments("float32")
    together = jax.jit(forward_and_backward(case.ours))(*args)
    for x, y in zip(jax.tree.leaves(together), jax.tree.leaves(measure._two_programs(case.ours, args)()), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_table_of_goals_says_what_was_missed_and_what_was_not_run():
    name = "gpu_gated_mlp"
    compiled = {n: {"ours": 1e9, "idiomatic": 2e9} for n in goals.GOALS}
    ways = {"ours": {"seconds": 0.004}, "idiomatic": {"seconds": 0.005}}
    lines = goals_table.markdown(compiled, {"rows": [{"name": name, "ways": ways}]}).splitlines()
    (row,) = (line for line in lines if "SwiGLU" in line)
    assert row.endswith("| 5.4 | 4 | 5 | 0.75, missed | 1.000 | 2.000 |")
    assert sum("not run" in line for line in lines) == len(goals.GOALS) - 1


def test_table_of_kernels_says_what_was_verified_and_what_no_device_has_seen():
    row = {"layer": "dot_product_attention", "implementation": "cudnn", "jax": "0.12", "platform": "cuda", "architecture": "9.0"}
    row |= {"dtype": "bfloat16", "shape_class": "causal", "against": "", "milliseconds": 2.0, "xla_milliseconds": 8.0}
    registers = {"selective_scan, bfloat16, forward": {"registers": 80, "spilled": 0}, "jax": "0.12"}
    lines = kernel_table.markdown([row, row | {"against": "slower than XLA", "dtype": "float16"}], registers).splitlines()
    (cudnn,) = (line for line in lines if "cudnn" in line)
    assert "cuda 9.0, JAX 0.12, bfloat16, causal: 2 ms, XLA 8; cuda 9.0, JAX 0.12, float16, causal: slower than XLA" in cudnn
    (scan,) = (line for line in lines if "selective_scan" in line)
    assert scan == f"| `selective_scan` | mosaic | bfloat16, forward 80 (0) | {kernel_table.NO_DEVICE} |"
