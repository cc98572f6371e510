"""Tests whose Triton kernels are interpreted, on the CPU.

Triton decides at its import whether it interprets, so such a test file starts itself again, in a process of its own:

    if os.environ.get("TRITON_INTERPRET") != "1":
        def test_under_the_interpreter(interpreted):    # the fixture of tests/kernels; elsewhere `check_interpreted`
            interpreted(__file__)
    else: ...
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def start_interpreted(file: str | Path, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """A pytest of its own over `file`, until it ends."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", str(file)],
                          env=environment, capture_output=True, text=True, timeout=timeout, check=False)


def check_interpreted(file: str | Path, timeout: float = 500) -> None:
    pytest.importorskip("triton")
    assert_passed(start_interpreted(file, timeout))


def assert_passed(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def patch_language_once() -> None:
    """A third less time: the interpreter patches triton.language again for every function that a kernel calls.

    Here it does so for the kernel, and for functions whose `tl` is another module.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton
        return
    patch, patched = interpreter._patch_lang, set()

    def patch_lang(function: Any) -> SimpleNamespace:
        missing = {module for module in function.__globals__.values() if module is tl or module is tl.core} - patched
        if not missing:
            return SimpleNamespace(restore=lambda: None)
        scope = patch(function)
        patched.update(missing)

        def restore() -> None:
            patched.difference_update(missing)
            scope.restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = patch_lang
