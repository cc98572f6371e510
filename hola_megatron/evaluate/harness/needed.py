"""Whether lm-evaluation-harness is installed."""

from __future__ import annotations

import importlib.util

from hola_megatron.errors import InstallError


def need_harness(option: str) -> None:
    """Raise InstallError, naming the `option` that needs it, where it is not."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InstallError(f"{option}: needs lm-evaluation-harness, which is not installed: pip install -e '.[eval]'")
