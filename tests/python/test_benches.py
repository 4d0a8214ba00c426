"""The evidence scripts run on a CPU, hold everybody to float64, and write what they saw; IDX files are read."""

import gzip
import importlib
import json
import struct
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benches" / "python"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def rows(load, tmp_path):
    def run(script, *flags):
        out = tmp_path / "out.json"
        load(script).main(["--device", "cpu", "--quick", "--out", str(out), *flags])
        written = json.loads(out.read_text())
        assert written["environment"]["torch"] == torch.__version__
        return written["rows"]

    return run


def test_liger_takes_no_part_on_the_cpu(load, monkeypatch):
    module = object()
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.swiglu", module)
    for package in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, package, object())
    harness = load("harness")
    assert harness.liger(torch.device("cpu")) is None and harness.liger(torch.device("cuda")) is module
    with pytest.raises(ImportError, match="no GPU"):
        harness.need_liger(torch.device("cpu"))


@pytest.mark.parametrize("flags", [["--sustained", "0.3"], ["--sustained", "-1"], ["--sustained", "0.3", "--host"]])
def test_sustained_samples_need_a_gpu_and_some_seconds(load, capsys, flags):
    with pytest.raises(SystemExit):
        load("ffn").main(["--device", "cpu", "--quick", *flags])
    assert "--sustained takes seconds over 0" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gate(rows, dtype):
    found = rows("gate", "--dtype", dtype)
    assert {row["provider"] for row in found} >= {"ours", "torch", "copy"}
    assert {row["way"] for row in found} == {"forward", "backward"}
    assert all(row["us"] > 0 and row["gb_s"] > 0 for row in found)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layer(rows, dtype):
    found = rows("layer", "--b", "4,8", "--d", "64", "--dtype", dtype)
    assert {(row["m"], row["way"]) for row in found} == {(b, w) for b in (4, 8) for w in ("forward", "dX", "dX + dW")}


def test_sweep_and_its_plot(rows, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / "sweep.svg"
    assert {row["m"] for row in rows("layer", "--sweep", "--plot", str(path))} == {1, 4, 16}
    assert "<svg" in path.read_text()


def test_ffn(rows):
    found = rows("ffn")
    assert {row["provider"] for row in found} >= {"ours", "ours, nothing kept", "torch"}


def test_ffn_leaves_out_who_is_wrong_or_fails(load, rows, monkeypatch, capsys):
    ffn = load("ffn")
    monkeypatch.setitem(
        ffn.PROVIDERS, "wrong", lambda weights, args: ffn.Block(lambda *given: 2 * ffn.plain(*given), weights)
    )
    monkeypatch.setitem(ffn.PROVIDERS, "broken", lambda weights, args: 1 / 0)
    found = rows("ffn", "--ways", "forward", "--m", "1,4", "--providers", "ours,wrong,broken,torch")
    assert {(row["provider"], row["way"]) for row in found} == {("ours", "forward"), ("torch", "forward")}
    said = capsys.readouterr().out
    assert "wrong: left out, ArithmeticError" in said and "broken: left out, ZeroDivisionError" in said
    with pytest.raises(SystemExit):
        rows("ffn", "--providers", "nobody")


def test_memory(rows):
    kept = {row["provider"]: row["kept_mb"] for row in rows("memory")}
    assert kept["ours, nothing kept"] < kept["ours, forward + linear"] < kept["ours"] < kept["torch"]


def test_a_wrong_provider_is_caught(load):
    harness = load("harness")
    with pytest.raises(ArithmeticError, match="half: relative error"):
        harness.hold("half", [torch.ones(3) / 2], [torch.ones(3).double()])
    with pytest.raises(ArithmeticError):
        harness.hold("nan", [torch.full((3,), torch.nan)], [torch.ones(3).double()])


def idx_file(path, tensor, zipped=False):
    data = struct.pack(">BBBB", 0, 0, 8, tensor.dim()) + struct.pack(f">{tensor.dim()}I", *tensor.shape)
    data += bytes(tensor.flatten().tolist())
    path.write_bytes(gzip.compress(data) if zipped else data)


def write_mnist(folder, counts=(64, 32)):
    """Ten prototypes with noise, as MNIST's four files."""
    prototypes = torch.randint(0, 200, (10, 28, 28))
    for part, count in zip(("train", "t10k"), counts):
        labels = torch.arange(count) % 10
        images = prototypes[labels] + torch.randint(0, 55, (count, 28, 28))
        idx_file(folder / f"{part}-images-idx3-ubyte.gz", images, zipped=True)
        idx_file(folder / f"{part}-labels-idx1-ubyte", labels)


def test_idx_files(load, tmp_path):
    idx = load("idx")
    tensor = torch.randint(0, 256, (3, 4, 5))
    for zipped in (False, True):
        idx_file(tmp_path / "some", tensor, zipped)
        read = idx.read(tmp_path / "some")
        assert read.dtype is torch.uint8 and torch.equal(read.long(), tensor)
    whole = (tmp_path / "some").read_bytes()
    plain = gzip.decompress(whole)
    for data, reason in (
        (plain[:-1], "its sizes"),
        (plain + b"\0", "its sizes"),
        (plain[:6], "ends in its sizes"),
        (b"PK\3\4", "no IDX file"),
        (b"", "no IDX file"),
        (b"\0\0\x0d" + plain[3:], "type 0xd"),
    ):
        (tmp_path / "some").write_bytes(data)
        with pytest.raises(ValueError, match=f"some: .*{reason}"):
            idx.read(tmp_path / "some")
    with pytest.raises(FileNotFoundError, match="train-images"):
        idx.mnist(tmp_path)


@pytest.mark.parametrize("data", ["digits", "mnist"])
def test_training(rows, data, tmp_path):
    if data == "digits":
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
        flags = []
    else:
        write_mnist(tmp_path)
        flags = ["--mnist", str(tmp_path)]
    last = {row["arm"]: row for row in rows("digits", *flags) if row["epoch"] == 8}
    ours, plain = last["ours"], last["torch"]
    assert ours["learnt"] == ours["parameters"] == 3
    assert last["ours, frozen"]["learnt"] == 2
    # The same numbers at the start and the same batches: the same training but for rounding.
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    if data == "digits":
        assert ours["accuracy"] > 0.9 and abs(ours["accuracy"] - plain["accuracy"]) < 0.02


def test_scripts_run_as_programs():
    import subprocess

    done = subprocess.run([sys.executable, str(FOLDER / "ffn.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout
