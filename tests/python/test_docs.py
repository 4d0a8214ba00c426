"""The examples in docstrings run."""

import doctest
import pkgutil

import pytest

import swiglu


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(swiglu.__path__) if m.name != "_native"])
def test_examples(name):
    module = __import__(f"swiglu.{name}", fromlist=["_"])
    assert doctest.testmod(module).failed == 0
