"""The tuner by `python -m swiglu`, and the one warning about what it has not seen."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import operands

import swiglu
from swiglu import _tuning


def run(*arguments, **environment):
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "swiglu", *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def tuner(tmp_path):
    """Stands in for swiglu-tune: says how it was called."""
    path = tmp_path / "swiglu-tune"
    path.write_text('#!/bin/sh\necho "$SWIGLU_NVRTC"; for word; do echo "$word"; done\nexit 7\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    "given, handed_on",
    [
        (["tune", "--gpu", "auto", "--model", "llama 3"], ["--gpu", "auto", "--model", "llama 3"]),
        (["report", "--json"], ["report", "--json"]),
        (["doctor"], ["doctor"]),
    ],
)
def test_arguments_and_exit_code_are_handed_on(tuner, given, handed_on):
    done = run(*given, SWIGLU_TUNE=str(tuner), SWIGLU_NVRTC="here")
    assert done.stdout.splitlines() == ["here", *handed_on] and done.returncode == 7


def test_it_is_found_on_the_path(tuner):
    done = run("doctor", SWIGLU_TUNE="", PATH=f"{tuner.parent}:{os.environ['PATH']}")
    assert done.returncode == 7 and done.stdout.splitlines()[1:] == ["doctor"]


def test_a_missing_tuner_is_a_sentence(tmp_path):
    done = run("tune", SWIGLU_TUNE="", PATH=str(tmp_path))
    assert done.returncode == 1 and "cargo install" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("tune", SWIGLU_TUNE=str(tmp_path / "none"))
    assert done.returncode == 1 and "SWIGLU_TUNE is " in done.stderr


def test_help_and_version():
    assert "swiglu-tune" in run("--help").stdout
    assert run("--version").stdout == f"swiglu {swiglu.__version__}\n"
    assert run().returncode == 2


class Plan:
    def __init__(self, matched):
        self.matched = lambda m: matched


CALL = (0, "bf16", "separate_nk", 12, 8, False, 5)


@pytest.fixture
def nothing_said(monkeypatch):
    monkeypatch.setattr(_tuning, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")


def test_a_missing_tuning_is_said_once(nothing_said):
    with pytest.warns(UserWarning, match=r"N=12, K=8 was not tuned on Some GPU.*default config"):
        _tuning.note_untuned(Plan("untuned"), *CALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tuning.note_untuned(Plan("untuned"), *CALL)


@pytest.mark.parametrize("training, ops", [(False, "forward"), (True, "forward,ffn")])
def test_what_is_said_tunes_that_shape(nothing_said, training, ops, tmp_path):
    with pytest.warns(UserWarning) as said:
        _tuning.note_untuned(Plan("untuned"), 1, "f16", "separate_kn", 12, 8, training, 5)
    _, write, tune = (line.strip() for line in str(said[0].message).splitlines())
    assert tune == f"python -m swiglu tune --gpu 1 --shapes swiglu-shapes.toml --op {ops}"
    subprocess.run(write, shell=True, check=True, cwd=tmp_path)
    # In the words that swiglu-tune's own tests of shape files use.
    shape = '{ n = 12, k = 8, m = [5], dtype = ["f16"], layout = ["separate_kn"] }'
    assert (tmp_path / "swiglu-shapes.toml").read_text() == f"shape = [{shape}]\n"


def test_what_was_tuned_is_not_worth_a_word(nothing_said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _tuning.note_untuned(Plan("exact"), *CALL)
        _tuning.note_untuned(Plan("nearest M"), *CALL)
    with pytest.warns(UserWarning, match="nearest shape that was tuned"):
        _tuning.note_untuned(Plan("nearest shape"), *CALL)
    with pytest.warns(UserWarning, match="runs on a config that a model of the GPU chose"):
        _tuning.note_untuned(Plan("model"), *CALL)


def test_the_first_call_asks_and_the_cpu_needs_no_tuning(nothing_said, monkeypatch):
    asked = []
    monkeypatch.setattr(_tuning, "note_untuned", lambda plan, *rest: asked.append((plan.matched(5), *rest)))
    inputs = operands(5, 37, 23)
    swiglu.forward(*inputs)
    swiglu.forward(*inputs)
    assert asked == [("exact", -1, "f32", "separate_nk", 37, 23, False, 5)]


@pytest.mark.gpu
def test_an_untuned_shape_on_a_gpu_is_said(monkeypatch):
    monkeypatch.setattr(_tuning, "_said", set())
    with pytest.warns(UserWarning, match="was not tuned on"):
        swiglu.forward(*operands(64, 1048, 1032, torch.bfloat16, "cuda"))
