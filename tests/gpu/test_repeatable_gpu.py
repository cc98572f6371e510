"""The same call gives the same bits while others use the GPU: a product that has to wait is still done before what its
registers are needed for next. (K = 128 with triton 3.7.1 gave rows of NaN in one of fifty backward passes.)"""

from __future__ import annotations

import pytest

from hola_kernels.verify_cases import cases

BUSY = {name: run for name, run in cases() if " busy " in name}


@pytest.mark.parametrize("name", BUSY)
def test_the_same_bits_while_other_products_run(name):
    assert BUSY[name]() == {"other numbers": 0}
