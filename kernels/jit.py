# SPDX-License-Identifier: Apache-2.0
"""Ahead-of-time compilation of the CPU kernels."""

from collections.abc import Callable
from typing import Any, TypeVar

import numba

_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(
    signature: str, others: bool = False, fastmath: set[str] | None = None
) -> Callable[[_F], _F]:
    """Compile a function for one signature when its module is imported.

    The machine code is kept next to the source, or where numba keeps it if that
    is read-only; a machine on which neither can be written compiles every time.

    Args:
        signature: numba's notation.
        others: compile for other types when they are met, instead of a TypeError.
        fastmath: LLVM's names of what the function's floats never are.
    """

    def decorate(function: _F) -> _F:
        options: dict[str, Any] = {"error_model": "numpy", "nogil": True}
        options["fastmath"] = fastmath or False
        try:
            kernel = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            kernel = numba.njit(**options)(function)
        kernel.compile(signature)
        if not others:
            kernel.disable_compile()
        return kernel

    return decorate
