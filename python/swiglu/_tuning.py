"""Says once per process, of every kind of guess, that what is launched was not tuned."""

from __future__ import annotations

import warnings

import torch

from . import _native

_TUNED = ("exact", "nearest M")
_GUESSED = {"untuned": "the default config", "model": "a config that a model of the GPU chose"}
_said: set[str] = set()


def note_new(device: int, word: str, layout: str, n: int, k: int, save: bool, m: int) -> None:
    """:func:`note_untuned` of the plan that a call with ``m`` tokens had to prepare."""
    note_untuned(_native.prepare(device, word, layout, n, k, save), device, word, layout, n, k, save, m)


def note_untuned(
    plan: _native.Plan, device: int, word: str, layout: str, n: int, k: int, training: bool, m: int
) -> None:
    """Warns if ``plan`` serves ``m`` tokens by less than a measurement of its own N and K; says how to tune them."""
    matched = plan.matched(m)
    if matched in _TUNED or matched in _said:
        return
    _said.add(matched)
    name = torch.cuda.get_device_name(device)
    source = _GUESSED.get(matched, f"the {matched} that was tuned")
    shape = f'shape = [{{ n = {n}, k = {k}, m = [{m}], dtype = ["{word}"], layout = ["{layout}"] }}]'
    warnings.warn(
        f"swiglu: N={n}, K={k} was not tuned on {name}; it runs on {source} and may be slower than it could be. To tune it "
        f"(every usual M without `m`, which takes longer; said once):\n  echo '{shape}' > swiglu-shapes.toml\n"
        f"  python -m swiglu tune --gpu {device} --shapes swiglu-shapes.toml --op {'forward,ffn' if training else 'forward'}",
        stacklevel=3,
    )
