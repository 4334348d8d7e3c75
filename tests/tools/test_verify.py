"""`python -m layers verify`: what is right and faster is taken, what is wrong, slower or fails is not, and the table says why."""

import json

import jax.numpy as jnp
import pytest

from layers.kernels import mosaic, verified
from layers.kernels.attention import KERNELS
from layers.kernels.dispatch import Kernel
from layers.tools import cli, measure, verify, verify_attention, verify_layers, verify_losses, verify_scans
from tests.kernels.reference import FakeCudnn

SMALL = {"batch": 1, "time": 16, "heads": 4, "kv_heads": 2}


def kernel(change=lambda out: out):
    """A kernel of plain causal attention, whose output is changed; it is there on every machine."""
    fake = FakeCudnn()

    def options(call):
        return {"scale": call.scale, "causal": True, "window": None}

    def forward(call, q, k, v, *_):
        out, lse = fake.forward(q, k, v, None, None, **options(call))
        return change(out), jnp.swapaxes(lse, 1, 2)

    def backward(call, q, k, v, bias, lengths, segments, out, lse, dout, dlse, *, wants_bias):
        return *fake.backward(q, k, v, None, None, jnp.swapaxes(lse, 1, 2), out, dout, **options(call), wants_bias=False), None

    def refuse(call, place):
        return None if call.features == ("causal",) and call.query[3] == 64 and call.dtype == "bfloat16" else "it is for this test"

    return Kernel("cudnn", refuse, forward, backward, lambda *_, **__: True)


@pytest.fixture
def put(monkeypatch, tmp_path):
    """Puts one kernel in place of all, for which the clock gives these seconds beside XLA's 1; returns the file for a table."""

    def put_it(made, seconds=0.5):
        monkeypatch.setattr(verify_attention, "KERNELS", {"cudnn": made})
        monkeypatch.setitem(KERNELS, "cudnn", made)
        monkeypatch.setattr(verify_attention, "SIZES", SMALL)
        monkeypatch.setattr(measure, "in_turn", lambda runs, rounds: {name: [1.0 if name == "xla" else seconds] for name in runs})
        return tmp_path / "table.json"

    yield put_it
    verified.rows.cache_clear()


def only_row():
    (trial,) = verify_attention.trials()
    return trial.row()


def test_kernel_that_is_exact_and_faster_is_taken(put, capsys, monkeypatch):
    path = put(kernel())
    monkeypatch.setattr(verify_layers, "error_of", lambda layer, dtype: 1e-6)
    assert verify.main(["dot_product_attention"], path=path) == 0
    (row,) = json.loads(path.read_text())
    assert row["against"] == "" and row["shape_class"] == "causal, head_dim 64, short"
    assert row["milliseconds"] == 500 and row["xla_milliseconds"] == 1000 and 0 < row["error"] < 0.02
    said = capsys.readouterr().out
    assert "is taken" in said and "DotProductAttentionFunction: float32 1.0e-06" in said


@pytest.mark.parametrize(
    "change, seconds, words",
    [
        (lambda out: out, 2.0, "slower than XLA: 2e+03 ms against 1e+03"),
        (lambda out: out * 1.1, 0.5, "less exact than XLA: an error of 1"),
        (lambda out: out * jnp.nan, 0.5, "less exact than XLA: an error of inf"),
    ],
    ids=["slower", "wrong", "NaN"],
)
def test_kernel_that_is_slower_or_wrong_is_not_taken(change, seconds, words, put):
    put(kernel(change), seconds)
    assert only_row()["against"].startswith(words)


def test_kernel_that_fails_is_reported_and_shut_out(put, capsys, monkeypatch):
    def fail(out):
        raise RuntimeError("no such engine\nand more")

    path = put(kernel(fail))
    monkeypatch.setattr(verify_layers, "error_of", lambda layer, dtype: 1e-6)
    assert verify.main(["dot_product_attention"], path=path) == 1
    (row,) = json.loads(path.read_text())
    assert row["against"] == "failed: RuntimeError: no such engine" and row["milliseconds"] is None
    assert "no such engine" in capsys.readouterr().out


def test_on_this_machine_a_layer_is_right_by_xla(tmp_path, capsys):
    assert cli.main(["verify", "rms_norm", "--json", str(tmp_path / "table.json")]) == 0
    assert "RMSNormFunction: float32 " in capsys.readouterr().out and not (tmp_path / "table.json").exists()


def test_layer_that_is_wrong_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(verify_layers, "error_of", lambda layer, dtype: 0.01)
    assert verify.main(["rms_norm"]) == 1
    assert "float32 1.0e-02, more than 0.0001, bfloat16 1.0e-02" in capsys.readouterr().out


def test_nothing_is_begun_when_the_time_is_over(capsys):
    assert verify.main(["rms_norm"], minutes=-1) == 0
    assert "RMSNormFunction: not begun" in capsys.readouterr().out


def test_unknown_layer_and_a_table_that_cannot_be_written_are_errors(tmp_path):
    with pytest.raises(ValueError, match="verify: no layer is named 'nothing'"):
        verify.main(["nothing"])
    with pytest.raises(OSError, match="cannot be written: give another file by --json"):
        verify.main(["rms_norm"], path=tmp_path / "missing" / "table.json")


def test_kernel_of_the_selective_scan_is_exact_in_its_trial(monkeypatch):
    """Interpreted, as the next."""
    monkeypatch.setattr(verify_scans, "SIZE", (1, 16, 128))
    monkeypatch.setattr(verify_scans, "STATES", (4,))
    monkeypatch.setattr(measure, "in_turn", lambda runs, rounds: {name: [1.0 if name == "xla" else 0.5] for name in runs})
    with mosaic.interpreting():
        rows = [trial.row() for trial in verify_scans.trials()]
    assert [(r["dtype"], r["against"]) for r in rows] == [("bfloat16", ""), ("float32", "")]


def test_kernel_of_the_cross_entropy_is_exact_in_its_trial(monkeypatch):
    """Interpreted: `python -m layers verify` on an H100 runs the same, compiled."""
    monkeypatch.setattr(verify_losses, "ROWS", 3)
    monkeypatch.setattr(verify_losses, "VOCABS", (130,))
    monkeypatch.setattr(measure, "in_turn", lambda runs, rounds: {name: [1.0 if name == "xla" else 0.5] for name in runs})
    with mosaic.interpreting():
        rows = [trial.row() for trial in verify_losses.trials()]
    assert [(r["dtype"], r["against"]) for r in rows] == [("bfloat16", ""), ("float16", ""), ("float32", "")]
