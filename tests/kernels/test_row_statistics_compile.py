# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels of row statistics compile, without a GPU, into what they should.

Run as a script, this file prints the table that belongs into `resources.json`.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

TABLE = Path(__file__).parents[2] / "kernels" / "row_statistics" / "resources.json"

# Bytes of shared memory that one block may have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}
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


def compiled(kernel: Any, kinds: list[Any], target: Any, **constants: Any) -> Any:
    """What a kernel needs, for aligned tensors and strides that are multiples of 16."""
    from triton.compiler import ASTSource, compile

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
    binary = compile(source, target=target, options={"num_warps": num_warps})
    if "cubin" in binary.asm:
        registers, stack = cuda_usage(binary.asm["cubin"])
    else:
        registers, stack = (
            int(re.findall(rf"\.{field}:\s+(\d+)", binary.asm["amdgcn"])[0])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
    shared = binary.metadata.shared
    return {"registers": registers, "shared_bytes": shared, "stack_bytes": stack}


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", told.stdout)[0]
    return int(registers), int(stack)


def measure() -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget

    from vllm_unmask.kernels.row_statistics import triton as kernels
    from vllm_unmask.kernels.row_statistics.triton_truncation import truncation_kernel

    targets = {
        "sm_80": GPUTarget("cuda", 80, 32),
        "sm_90": GPUTarget("cuda", 90, 32),
        "sm_100": GPUTarget("cuda", 100, 32),
        "gfx942": GPUTarget("hip", "gfx942", 64),
    }
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
                    key: compiled(function, kinds, target, **constants)
                    for key, target in targets.items()
                }
    return table


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compiled afresh and in a process of its own: vLLM disables Triton in this one."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**environment, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table: dict[str, Any] = json.loads(done.stdout)
    return table


@pytest.mark.slow
def test_every_target_has_room(measured: dict[str, Any]) -> None:
    kernels = {name: row for name, row in measured.items() if name != "triton"}
    assert len(kernels) == 10
    for kernel, row in kernels.items():
        assert row.keys() == SHARED.keys()
        for target, needs in row.items():
            assert needs["shared_bytes"] <= SHARED[target], (kernel, target)
            assert needs["stack_bytes"] <= STACK, (kernel, target)


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
