# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of window attention compile, without a GPU, into what they should.

Run as a script, this file prints the table that belongs into `resources.json`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_compilation import SHARED, assert_room, needs, table_of

TABLE = Path(__file__).parents[2] / "kernels" / "window_attention" / "resources.json"

# Bytes of stack of a thread: addresses may lie there, an accumulator (128 bytes and
# more for each thread in these tiles) would be read and written for every key.
STACK = 64
# Element type, its bytes, head size, (row, head) pairs of a window: every branch of
# `tiling` at the size that needs most.
VARIANTS = (
    ("bf16", 2, 80, 16),
    ("bf16", 2, 128, 32),
    ("bf16", 2, 128, 64),
    ("bf16", 2, 256, 32),
    ("bf16", 2, 256, 64),
    ("fp32", 4, 256, 16),
)
TENSORS = "out query key value key_cache value_cache".split()
INDICES = "block_table prefix_lens cu_rows mask holes".split()


def compiled(
    kernel: Any, constants: dict[str, Any], element: str, target: str, **options: Any
) -> dict[str, int]:
    """What a kernel needs, for aligned tensors and strides that are multiples of 16."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    hints: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        kind = "i32"
        if name in constants:
            kind = "constexpr"
        elif name in TENSORS:
            kind = "*" + element
        elif name in INDICES:
            kind = "*i32"
        elif name == "slot_mapping":
            kind = "*i64"
        elif name == "scale":
            kind = "fp32"
        signature[name] = kind
        if kind.startswith("*") or (kind == "i32" and not parameter.do_not_specialize):
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return needs(source, target, options)


def measure() -> dict[str, Any]:
    import triton

    from vllm_unmask.kernels.window_attention import triton as attention
    from vllm_unmask.kernels.window_attention import triton_write

    strides = {"key_dim": 1, "value_dim": 1}
    table: dict[str, Any] = {"triton": triton.__version__}
    for element, size, dim, pairs in VARIANTS:
        tile = attention.tiling(pairs, dim, size)
        for holes in (False, True):
            constants = attention.constants(tile, 4, 16, dim, holes) | strides
            behind = ", holes" if holes else ""
            table[f"window_attention {element} dim {dim} pairs {pairs}{behind}"] = {
                target: compiled(
                    attention.window_attention_kernel,
                    constants,
                    element,
                    target,
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                )
                for target in SHARED
            }
    constants = {"PAGE": 16, "DIM": 80, "BLOCK_DIM": 128, **strides}
    table["write_kept bf16 dim 80"] = {
        target: compiled(
            triton_write.write_kept_kernel, constants, "bf16", target, num_warps=1
        )
        for target in SHARED
    }
    return table


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled afresh."""
    return table_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_every_target_has_room(measured: dict[str, Any]) -> None:
    assert_room(measured, 2 * len(VARIANTS) + 1, STACK)


def told(code: str) -> list[str]:
    """Words that a process without vLLM prints about the kernel's module."""
    start = "from vllm_unmask.kernels.window_attention.triton import *\n"
    command = [sys.executable, "-c", start + code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_no_number_of_a_batch_is_compiled_in() -> None:
    """Requests of other lengths, widths or tables run the kernels that are there."""
    fixed = told(
        "for p in window_attention_kernel.params:\n"
        "    if p.is_constexpr or p.do_not_specialize: print(p.name)"
    )
    assert fixed[:2] == ["table_stride", "words"]
    sizes = (
        "GROUP PAGE DIM BLOCK_DIM BLOCK_ROWS BLOCK_KEYS WORD_KEYS PRECISION HAS_HOLES"
    )
    assert fixed[2:] == sizes.split()
    assert told("print(len({tiling(n, 128, 2) for n in range(1, 600)}))") == ["3"]


@pytest.mark.slow
def test_table_is_true(measured: dict[str, Any]) -> None:
    recorded = json.loads(TABLE.read_text())
    if recorded["triton"] != measured["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}")
    assert recorded == measured


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
