"""The examples in docstrings run, and everything public has one."""

import doctest
import inspect
import pkgutil

import pytest

import swiglu
from swiglu import liger, xformers


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(swiglu.__path__) if m.name != "_native"])
def test_examples(name):
    module = __import__(f"swiglu.{name}", fromlist=["_"])
    assert module.__doc__
    assert doctest.testmod(module).failed == 0


PUBLIC = [(module, name) for module in (swiglu, liger, xformers) for name in module.__all__ if name != "__version__"]


@pytest.mark.parametrize("module, name", PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_everything_public_has_an_example(module, name):
    value = getattr(module, name)
    texts = [value.__doc__, *(method.__doc__ for _, method in inspect.getmembers(value, inspect.isfunction))]
    if value is not swiglu.PatchReport:  # patch() shows it
        assert any(text and ">>>" in text for text in texts)


def test_an_older_torch_is_a_sentence():
    import subprocess
    import sys

    script = "import torch; torch.__version__ = '2.4.1+cpu'; import swiglu"
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ImportError: swiglu needs torch 2.5 or later, found 2.4.1+cpu: update torch"


def test_a_second_import_is_a_sentence():
    import subprocess
    import sys

    script = (
        "import sys, swiglu; kept = dict(sys.modules)\n"
        "for name in kept:\n    if name.partition('.')[0] == 'swiglu': del sys.modules[name]\n"
        "import swiglu"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: torch has operations named swiglu already: ")


def test_types_are_shipped():
    from pathlib import Path

    folder = Path(swiglu.__file__).parent
    assert (folder / "py.typed").exists()
    stub = (folder / "_native.pyi").read_text()
    native = [name for name in vars(swiglu._native) if not name.startswith("_")]
    for kind in (swiglu._native.Plan, swiglu._native.Torch):
        native += [name for name in vars(kind) if not name.startswith("_")]
    assert native and all(f"def {name}(" in stub or f"class {name}:" in stub for name in native)
