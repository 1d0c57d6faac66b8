# SPDX-License-Identifier: Apache-2.0
"""The entry point, in this process and in fresh ones."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vllm_unmask import patches, registration
from vllm_unmask.families import FAMILIES

# What a vLLM process does before it knows its model, and what that has loaded.
FRESH_PROCESS = """
import json, sys
import vllm_unmask
report = {"after_import": sorted({m.split(".")[0] for m in sys.modules})}

from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
import torch
# Building the parser loads general plugins: nothing here calls register().
parser = make_arg_parser(FlexibleArgumentParser())
arguments = parser.parse_args(["some/model", "--plugin", "unmask"])
report["model"] = arguments.model_tag
report["stored"] = sorted(a for a in vars(arguments) if "plugin" in a)
try:
    parser.parse_args(["some/model", "--plugin", "unmask,nosuch"])
except SystemExit as error:
    report["exit"] = error.code

from vllm.entrypoints.serve.utils.api_utils import get_non_default_args
report["non_default"] = get_non_default_args(arguments)
from vllm_unmask import registration
report["registered"] = registration._registered
report["cuda"] = torch.cuda.is_initialized()
report["families_loaded"] = "vllm_unmask.families.sdar" in sys.modules
report["engine_loaded"] = [m for m in sys.modules if m.startswith("vllm_unmask.engine")]
report["runner_loaded"] = "vllm.v1.worker.gpu.model_runner" in sys.modules
from vllm import ModelRegistry
report["architectures"] = list(ModelRegistry.get_supported_archs())
sys.stdout.write("\\n" + json.dumps(report))
"""


def run(code: str, **environment: str) -> tuple[dict[str, Any], str]:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.fixture(scope="module")
def fresh() -> tuple[dict[str, Any], str]:
    return run(FRESH_PROCESS)


def test_importing_the_package_loads_nothing_heavy(fresh: Any) -> None:
    assert not {"torch", "vllm", "transformers", "triton"} & set(
        fresh[0]["after_import"]
    )


def test_vllm_registers_us_when_it_builds_its_parser(fresh: Any) -> None:
    report, _ = fresh
    assert report["registered"]
    for family in FAMILIES:
        assert family.architecture in report["architectures"]


def test_registration_loads_no_model_and_no_device(fresh: Any) -> None:
    report, _ = fresh
    assert not report["cuda"]
    assert not report["families_loaded"]
    assert not report["engine_loaded"]
    assert not report["runner_loaded"]


def test_plugin_flag_parses_and_stores_nothing(fresh: Any) -> None:
    report, _ = fresh
    assert report["model"] == "some/model"
    assert not [name for name in report["stored"] if name.rstrip("s") == "plugin"]
    assert list(report["non_default"]) == ["model_tag"]


def test_plugin_flag_refuses_a_name_that_is_not_loaded(fresh: Any) -> None:
    report, stderr = fresh
    assert report["exit"] == 2
    assert "plugin 'nosuch' is not loaded; loaded plugins: " in stderr
    assert "unmask" in stderr.split("loaded plugins: ")[1]


@pytest.fixture
def again() -> Iterator[None]:
    """Lets `register` run once more in this process, from vLLM's own code."""
    patches.revert_all()
    registered = registration._registered
    registration._registered = False
    yield
    registration._registered = registered
    if registered:
        patches.apply_all("0.32", allow_untested=True)


def applied() -> set[bool]:
    states = patches.inventory("0.32")
    return {state.applied for state in states if state.patch.when == "registration"}


@pytest.mark.usefixtures("again")
def test_disable_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_DISABLE", "1")
    registration.register()
    assert not registration._registered
    assert applied() == {False}


@pytest.mark.usefixtures("again")
def test_unclear_switch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_DISABLE", "yes")
    with pytest.raises(RuntimeError, match="UNMASK_DISABLE='yes' .* expected 0 or 1"):
        registration.register()


@pytest.mark.usefixtures("again")
@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.32.0", "dev"])
def test_unsupported_version(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("vllm.__version__", version)
    with pytest.raises(RuntimeError) as caught:
        registration.register()
    message = str(caught.value)
    assert f"supports vLLM 0.32 and 0.33, found {version}" in message
    assert "UNMASK_DISABLE=1" in message
    assert "UNMASK_ALLOW_UNTESTED_VLLM=1" in message
    assert applied() == {False}


@pytest.mark.usefixtures("again")
def test_untested_version_on_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.35.0")
    monkeypatch.setenv("UNMASK_ALLOW_UNTESTED_VLLM", "1")
    with caplog.at_level("WARNING", logger="vllm.vllm_unmask"):
        registration.register()
    assert applied() == {True}
    assert any("found 0.35.0" in record.message for record in caplog.records)
    assert any("none recorded for vLLM 0.35" in r.message for r in caplog.records)


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc1", True),
        ("0.3.2", False),
        ("0.320.0", False),
        ("dev", False),
    ],
)
def test_supported_versions(version: str, supported: bool) -> None:
    assert registration.is_supported(version) is supported


@pytest.mark.usefixtures("again")
def test_register_is_idempotent() -> None:
    from vllm.sampling_params import SamplingParams

    registration.register()
    first = SamplingParams._validate_diffusion
    registration.register()
    registration._registered = False
    registration.register()
    assert SamplingParams._validate_diffusion is first


@pytest.mark.usefixtures("again")
def test_config_class_without_remote_code(tmp_path: Path) -> None:
    """`auto_map` in a published checkpoint must not ask for trust_remote_code."""
    from vllm.transformers_utils.config import get_config

    registration.register()
    for family in FAMILIES:
        module, _, name = family.config_cls.partition(":")
        content = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "auto_map": {"AutoConfig": f"configuration_remote.{name}"},
        }
        (tmp_path / "config.json").write_text(json.dumps(content))
        config = get_config(str(tmp_path), trust_remote_code=False)
        assert type(config).__module__ == module
        assert type(config).__name__ == name


@pytest.mark.usefixtures("again")
def test_a_config_class_of_vllm_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.transformers_utils import configs

    name = FAMILIES[0].config_cls.partition(":")[2]
    monkeypatch.setitem(configs._CLASS_TO_MODULE, name, "vllm.somewhere")
    with pytest.raises(RuntimeError, match=f"class {name} of its own"):
        registration.register()
    assert applied() == {False}
