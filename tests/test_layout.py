# SPDX-License-Identifier: Apache-2.0
"""The house: which part may import which, and what every file must have."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Folder -> parts of the package that it may import, besides itself.
ARROWS = {
    "registration": {"families", "patches", "options", "limits"},
    "families": {"engine", "options", "requirements", "limits"},
    "engine": {"decoding", "grammar", "kernels", "options", "seeds", "limits"},
    "decoding": {"kernels"},
    "grammar": set(),
    "kernels": set(),
    "patches": {"grammar", "options", "requirements", "seeds", "limits"},
    "options": {"request_options", "presets", "limits"},
    "request_options": {"presets", "limits"},
    "requirements": {"request_options", "limits"},
    "request_params": {"options", "request_options", "limits"},
    "presets": set(),
    "trace_format": set(),
    "seeds": {"limits"},
    "limits": set(),
}
# The faces of the package may use all of it.
UNBOUND = {"", "__main__", "cli", "doctor", "trace"}
# Flat lists, which splitting would not make easier to read.
LONG_FILES = {"cpu_kernels.py": 700, "presets.py": 450, "request_options.py": 450}
FREE_OF_VLLM = ("decoding", "grammar", "kernels")
FOLDERS = {
    "families": ROOT / "vllm_plugin" / "families",
    "engine": ROOT / "vllm_plugin" / "engine",
    "decoding": ROOT / "vllm_plugin" / "decoding",
    "grammar": ROOT / "grammar",
    "kernels": ROOT / "kernels",
    "patches": ROOT / "patches",
}


def sources() -> Iterator[tuple[str, Path]]:
    """Every file of the package with the part that it belongs to."""
    for path in sorted((ROOT / "vllm_plugin").glob("*.py")):
        yield ("" if path.stem == "__init__" else path.stem), path
    for part, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            yield part, path


def imported(path: Path, package: str = "") -> set[str]:
    """Dotted names of everything that a file imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_parts(names: set[str]) -> set[str]:
    known = set(ARROWS) | UNBOUND - {""}
    parts = {name.split(".")[1] for name in names if name.startswith("vllm_unmask.")}
    return parts & known


PARAMETERS = [
    pytest.param(part, path, id=str(path.relative_to(ROOT))) for part, path in sources()
]


@pytest.mark.parametrize(("part", "path"), PARAMETERS)
def test_imports_run_downwards(part: str, path: Path) -> None:
    if part in UNBOUND:
        return
    assert part in ARROWS, f"{part} has no place in the layout"
    upward = our_parts(imported(path)) - ARROWS[part] - {part}
    assert not upward, f"{part} must not import {upward}"


@pytest.mark.parametrize(
    ("part", "path"), [p for p in PARAMETERS if p.values[0] in FREE_OF_VLLM]
)
def test_no_vllm_below_the_engine(part: str, path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert "vllm" not in roots


@pytest.mark.parametrize(("part", "path"), PARAMETERS)
def test_only_patches_assign_to_vllm(part: str, path: Path) -> None:
    """`vllm.x.y = ...` and `setattr` on vLLM belong into a patch."""
    if part == "patches":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            text = ast.unparse(target)
            assert not text.startswith("vllm."), f"{path}:{node.lineno}: {text}"


@pytest.mark.parametrize("path", [path for _, path in sources()], ids=lambda p: p.name)
def test_every_file_has_its_header_and_is_small(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"
    limit = LONG_FILES.get(path.name, 350)
    assert len(lines) <= limit, f"{len(lines)} lines: split it"
    assert path.stem not in ("utils", "helpers"), "name it by what is in it"


@pytest.mark.parametrize("path", [path for _, path in sources()], ids=lambda p: p.name)
def test_no_print_and_nothing_left_to_do(path: Path) -> None:
    text = path.read_text()
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
    assert not [c for c in calls if ast.unparse(c.func) == "print"]
    assert "TODO" not in text and "FIXME" not in text


def test_wheel_holds_every_package() -> None:
    """An editable install finds subfolders by itself, a wheel only listed ones."""
    text = (ROOT / "pyproject.toml").read_text()
    for part, path in sources():
        if path.name == "__init__.py" and part:
            folder = path.parent.relative_to(ROOT)
            assert f'= "{folder.as_posix()}"' in text, f"{folder} is not in the wheel"


def test_top_level_folders_do_not_shadow_packages() -> None:
    """`import kernels` outside the repository must not find ours."""
    code = (
        "import importlib.util as u\n"
        "for n in ('kernels', 'grammar', 'patches', 'vllm_plugin'):\n"
        "    s = u.find_spec(n)\n"
        "    print(n, s.origin if s else None)\n"
    )
    result = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(ROOT) not in result.stdout
    spec = importlib.util.find_spec("vllm_unmask.kernels")
    assert spec is not None and spec.origin == str(ROOT / "kernels" / "__init__.py")
