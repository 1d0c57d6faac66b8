# SPDX-License-Identifier: Apache-2.0
"""Kernels compile once, for one signature, also where nothing can be written."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from vllm_unmask.kernels.jit import compiled

SOURCE = """
from vllm_unmask.kernels.jit import compiled

@compiled("void(int64[::1])")
def increase(x):
    for i in range(len(x)):
        x[i] += 1
"""


def load(folder: Path) -> ModuleType:
    path = folder / "increase_kernel.py"
    path.write_text(SOURCE)
    # numba compares the time stamp of the source with that of its index.
    os.utime(path, (1, 1))
    spec = importlib.util.spec_from_file_location("increase_kernel", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_second_import_loads_the_machine_code(tmp_path: Path) -> None:
    assert not load(tmp_path).increase.stats.cache_hits
    again = load(tmp_path).increase
    assert again.stats.cache_hits and not again.stats.cache_misses


def test_nowhere_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # No index file can be made below a file, whoever runs this.
    (tmp_path / "__pycache__").write_text("")
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    x = np.zeros(3, dtype=np.int64)
    load(tmp_path).increase(x)
    assert x.tolist() == [1, 1, 1]


def test_other_types() -> None:
    def increase(x: np.ndarray) -> None:
        for i in range(len(x)):
            x[i] += 1

    strict = compiled("void(int64[::1])")(increase)
    lenient = compiled("void(int64[::1])", others=True)(increase)
    x = np.zeros(3, dtype=np.int32)
    with pytest.raises(TypeError):
        strict(x)
    lenient(x)
    assert x.tolist() == [1, 1, 1]
