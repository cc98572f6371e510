"""Tests whose Triton kernels are interpreted, on the CPU.

Triton decides at its import whether it interprets, so these tests have a run of their own, as in `make test`:

    TRITON_INTERPRET=1 pytest

It collects the files that import this module. Those with tests for both runs ask INTERPRETED, those with tests for this
run alone begin with `only_interpreted()`.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def only_interpreted() -> None:
    """Skip the importing test file in any other run, and where there is no Triton."""
    pytest.importorskip("triton")
    if not INTERPRETED:
        pytest.skip("interprets Triton kernels: run by TRITON_INTERPRET=1 pytest", allow_module_level=True)


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
