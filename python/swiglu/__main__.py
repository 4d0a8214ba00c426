"""``python -m swiglu tune|report|doctor|...``: the tuner, on the NVRTC that this Python's torch brings.

``tune`` takes the tuner's own flags; every other word is a subcommand of ``swiglu-tune`` and is handed on as it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

from . import __version__
from ._op import nvrtc_folder

_USAGE = """\
usage: python -m swiglu tune --gpu auto [--model NAME] [--dtype bf16] ...
       python -m swiglu report | doctor | bench | list | ... [--help]

Runs `swiglu-tune`, found as $SWIGLU_TUNE or on PATH, with the arguments given."""
_MISSING = (
    "swiglu-tune is not installed: run `cargo install --path crates/swiglu-tune` in the repository, "
    "or set SWIGLU_TUNE to the program"
)


def command(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The program and its arguments.

    Raises:
        FileNotFoundError: there is no such program; the message says how to get it.
    """
    named = environment.get("SWIGLU_TUNE")
    program = shutil.which(named or "swiglu-tune", path=environment.get("PATH"))
    if program is None:
        raise FileNotFoundError(f"SWIGLU_TUNE is {named!r}, which is no program" if named else _MISSING)
    return [program, *(arguments[1:] if arguments[0] == "tune" else arguments)]


def main() -> int:
    """Becomes the tuner; returns an exit code only where that fails: 1 without it, 2 without arguments."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"swiglu {__version__}")
        return 0
    environment = dict(os.environ)
    folder = nvrtc_folder()
    if folder is not None:
        environment.setdefault("SWIGLU_NVRTC", str(folder))
    try:
        words = command(arguments, environment)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    os.execve(words[0], words, environment)


if __name__ == "__main__":
    sys.exit(main())
