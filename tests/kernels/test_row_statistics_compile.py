# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of row statistics compile, without a GPU, into what they should.

Run as a script, this file prints the table that belongs into `resources.json`.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernel_compilation import SHARED, assert_room, needs, table_of

TABLE = Path(__file__).parents[2] / "kernels" / "row_statistics" / "resources.json"

# Bytes of stack of a thread; spilled registers would lie there.
STACK = 0
POINTERS = {
    "static": "*i32",
    "masks": "*i32",
    "places": "*i64",
    "starts": "*i64",
    "ids": "*i64",
    "biases": "*fp32",
}
BATCH = (
    "logits stride vocab mask_id static masks words places starts ids biases".split()
)
LAW = {"temperature": "*fp32", "plain": "*i1", "borders": "*i32", "lasts": "*i32"}
OPTIONS = {"temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32"}
NONE = "constexpr"


def batch(element: str, constrained: bool) -> tuple[str, ...]:
    """Types of a batch; a Qwen vocabulary's strides are multiples of 16."""
    kinds = {"logits": "*" + element} | (POINTERS if constrained else {})
    absent = {} if constrained else dict.fromkeys(POINTERS, NONE)
    return tuple((kinds | absent).get(name, "i32") for name in BATCH)


def compiled(kernel: Any, kinds: list[Any], target: str, **constants: Any) -> Any:
    """What a kernel needs, for aligned tensors and strides that are multiples of 16."""
    from triton.compiler import ASTSource

    names = [parameter.name for parameter in kernel.params]
    signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(constants, NONE)
    fixed: dict[tuple[int, ...], Any] = {}
    hints: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(names):
        kind = signature[name]
        parts = {(i, k): part for k, part in enumerate(kind)}
        for place, part in (parts if isinstance(kind, tuple) else {(i,): kind}).items():
            if part == NONE:
                fixed[place] = constants.get(name)
            elif part.startswith("*") or place[1:] == (1,):
                hints[place] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, fixed, hints)
    num_warps = 16 if "options" in names else 8
    return needs(source, target, {"num_warps": num_warps})


def measure() -> dict[str, Any]:
    import triton

    from vllm_unmask.kernels.row_statistics import triton as kernels
    from vllm_unmask.kernels.row_statistics.triton_truncation import truncation_kernel

    tile = {"TILE": kernels.TILE}
    # The tiles of 151 936 logits.
    tiles = {"TILES": 64, **tile}
    table: dict[str, Any] = {"triton": triton.__version__}
    for element in ("bf16", "fp32"):
        for name, all_of_it in (("greedy", False), ("all", True)):
            law = tuple(LAW.values()) if all_of_it else (NONE,) * 4
            rows = batch(element, all_of_it)
            parts = ["*fp32", "*i32"]
            draws = "*fp64" if all_of_it else NONE
            found = ["*i64", "*fp32", "i32"]
            variants = {
                "tile": (kernels.tile_kernel, [*parts, rows, law], tile),
                "row": (
                    kernels.row_kernel,
                    [*found, *parts, "i32", rows, law, draws],
                    tiles,
                ),
            }
            if all_of_it:
                variants["truncation"] = (
                    truncation_kernel,
                    ["*i32", "*i32", rows, tuple(OPTIONS.values())],
                    tile,
                )
            for kernel, (function, kinds, constants) in variants.items():
                table[f"{kernel} {element} {name}"] = {
                    target: compiled(function, kinds, target, **constants)
                    for target in SHARED
                }
    return table


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled afresh."""
    return table_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.slow
def test_every_target_has_room(measured: dict[str, Any]) -> None:
    assert_room(measured, 10, STACK)


def test_no_number_of_a_batch_is_compiled_in() -> None:
    """A batch of another size runs the kernels that are there."""
    code = (
        "from vllm_unmask.kernels.row_statistics import triton, triton_truncation\n"
        "for k in (triton.tile_kernel, triton.row_kernel,"
        " triton_truncation.truncation_kernel):\n"
        "    fixed = [p for p in k.params if p.is_constexpr or p.do_not_specialize]\n"
        "    print(*[p.name for p in fixed])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines() == ["TILE", "rows TILES TILE", "TILE"]


@pytest.mark.slow
def test_table_is_true(measured: dict[str, Any]) -> None:
    recorded = json.loads(TABLE.read_text())
    if recorded["triton"] != measured["triton"]:
        pytest.skip(f"recorded with Triton {recorded['triton']}")
    assert recorded == measured


if __name__ == "__main__":
    print(json.dumps(measure(), indent=1))
