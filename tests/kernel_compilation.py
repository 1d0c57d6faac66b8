# SPDX-License-Identifier: Apache-2.0
"""Compile Triton kernels without a GPU, and run them in Triton's interpreter.

Both in a process of its own: vLLM disables Triton in that of the tests.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Bytes of shared memory that one block may have.
SHARED = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
}


def needs(source: Any, target: str, options: dict[str, int]) -> dict[str, int]:
    """What a kernel takes of a target: registers and stack of a thread, and so on.

    Args:
        source: an `ASTSource`.
        target: key of `SHARED`.
        options: of the compiler.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compile

    if target.startswith("sm_"):
        machine = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    else:
        machine = GPUTarget("hip", target, 64)
    binary = compile(source, target=machine, options=options)
    if "cubin" in binary.asm:
        registers, stack = _cuda_usage(binary.asm["cubin"])
    else:
        registers, stack = (
            int(re.findall(rf"\.{field}:\s+(\d+)", binary.asm["amdgcn"])[0])
            for field in ("vgpr_count", "private_segment_fixed_size")
        )
    shared = binary.metadata.shared
    return {"registers": registers, "shared_bytes": shared, "stack_bytes": stack}


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread; spilled registers lie on the stack."""
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


def table_of(script: str, cache: Path) -> dict[str, Any]:
    """The table that a test file prints when it runs as a script.

    Args:
        script: the file.
        cache: an empty folder for what Triton compiles.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    table: dict[str, Any] = json.loads(_output(script, environment))
    return table


def interpret(script: str) -> None:
    """Run a test file as a script whose kernels are interpreted."""
    _output(script, {**os.environ, "TRITON_INTERPRET": "1"})


def _output(script: str, environment: dict[str, str]) -> str:
    # As pytest does for its own process.
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_room(table: dict[str, Any], count: int, stack: int) -> None:
    """Every kernel fits on every target.

    Args:
        table: of `table_of`.
        count: kernels in it.
        stack: bytes of stack that a thread may have.
    """
    kernels = {name: row for name, row in table.items() if name != "triton"}
    assert len(kernels) == count
    for kernel, row in kernels.items():
        assert row.keys() == SHARED.keys()
        for target, need in row.items():
            assert need["shared_bytes"] <= SHARED[target], (kernel, target)
            assert need["stack_bytes"] <= stack, (kernel, target)
