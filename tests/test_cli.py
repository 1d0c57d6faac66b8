# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask serve`, and how arguments reach the subcommands."""

import os
import subprocess
import sys
from typing import Any

import pytest

from vllm_unmask import cli, doctor


class Executed(Exception):
    """Raised where the process would have become another one."""


@pytest.fixture
def execve(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        calls.append(arguments)
        raise Executed

    monkeypatch.setattr(os, "execve", record)
    for name in ("VLLM_PLUGINS", "UNMASK_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (None, None),
        ("", "unmask"),
        ("unmask", "unmask"),
        ("other", "other,unmask"),
        ("unmask,other", "unmask,other"),
        ("unmasked", "unmasked,unmask"),
    ],
)
def test_plugins_with_ours(allowed: str | None, expected: str | None) -> None:
    assert cli.plugins_with_ours(allowed) == expected


def test_serve_becomes_vllm_serve(
    execve: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(Executed):
        cli.main(["serve", "some/model", "--port", "8001", "--help"])
    ((path, command, environment),) = execve
    assert path == sys.executable
    assert command == [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        "some/model",
        "--port",
        "8001",
        "--help",
    ]
    assert environment["VLLM_PLUGINS"] == "other,unmask"
    assert {k: v for k, v in environment.items() if k != "VLLM_PLUGINS"} == {
        k: v for k, v in os.environ.items() if k != "VLLM_PLUGINS"
    }


def test_serve_leaves_unset_plugins_unset(execve: list[tuple[Any, ...]]) -> None:
    with pytest.raises(Executed):
        cli.main(["serve", "some/model"])
    assert "VLLM_PLUGINS" not in execve[0][2]


def test_serve_refuses_when_switched_off(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("UNMASK_DISABLE", "1")
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert "UNMASK_DISABLE=1 switches the plugin off" in capsys.readouterr().err


def test_serve_refuses_when_vllm_cannot_see_us(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "entry_point_visible", lambda: False)
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert doctor.NOT_INSTALLED in capsys.readouterr().err


def test_serve_refuses_an_unsupported_vllm(
    execve: list[tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    assert cli.main(["serve", "some/model"]) == 1
    assert not execve
    assert "found 0.40.1" in capsys.readouterr().err


@pytest.mark.parametrize("as_json", [False, True])
def test_doctor_returns_its_code(
    monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    seen = []
    monkeypatch.setattr(doctor, "run", lambda as_json: seen.append(as_json) or 7)
    assert cli.main(["doctor"] + ["--json"] * as_json) == 7
    assert seen == [as_json]


@pytest.mark.parametrize("arguments", [[], ["nosuch"], ["doctor", "--nosuch"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: python -m vllm_unmask" in capsys.readouterr().err


def test_module_runs_outside_the_repository() -> None:
    """`python -m vllm_unmask --help` needs no vLLM, so it answers at once."""
    result = subprocess.run(
        [sys.executable, "-m", "vllm_unmask", "--help"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "doctor" in result.stdout and "serve" in result.stdout
