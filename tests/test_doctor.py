# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask doctor`."""

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import EOS, MASK, llada2_config, sdar_config, write_checkpoint
from family_references import REFERENCES

from vllm_unmask import __version__, cli, doctor, registration
from vllm_unmask.families import FAMILIES
from vllm_unmask.options import server_limits


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "UNMASK_DISABLE", "UNMASK_ALLOW_UNTESTED_VLLM"):
        monkeypatch.delenv(name, raising=False)


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code = doctor.run(as_json=True)
    return code, json.loads(capsys.readouterr().out)


def test_a_working_installation(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = report(capsys)
    assert (code, found["missing"]) == (0, [])
    assert found["versions"]["vllm-unmask"] == __version__
    assert found["versions"]["vllm"] == registration.vllm_version()
    assert all(found["versions"][name] for name in ("torch", "python"))
    assert found["supported"] and found["entry_point"]
    assert found["device"]
    assert {entry["architecture"] for entry in found["families"]} >= {"SDARForCausalLM"}
    for patch in found["patches"]:
        # The others wait for a model of ours, which this process does not serve.
        assert patch["applied"] or patch["when"] == "served"
        assert {guard["state"] for guard in patch["guards"]} == {"ok"}


def test_options_are_those_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    table = {entry["server"]: entry for entry in report(capsys)[1]["options"]}
    assert set(table) == set(server_limits())
    assert table["threshold"] == {
        "server": "threshold",
        "request": "unmask_threshold",
        "default": "0.9 (threshold, klass, local_leap, hierarchy), 0.8 (cad), "
        "0.95 (dimple), 0.96 (learned)",
        "allowed": "a number from 0.0 to 1.0",
        "only_with": "threshold, klass, local_leap, hierarchy, cad, dimple, learned",
        "doc": server_limits()["threshold"].doc,
    }
    assert table["block_length"]["request"] is None


def test_text_says_what_json_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run() == 0
    text = capsys.readouterr().out
    _, found = report(capsys)
    for name, value in found["versions"].items():
        if value:
            assert f"{name:14}{value}\n" in text
    for patch in found["patches"]:
        later = " once one of our models is served" * (not patch["applied"])
        assert f"patch {patch['name']}: applied{later}\n" in text
    for option in found["options"]:
        assert f"  {option['server']} " in text
    for strategy in found["strategies"]:
        assert f"  {strategy['name']} (" in text
    assert text.endswith("nothing required is missing\n")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("VLLM_PLUGINS", "other", "VLLM_PLUGINS='other' keeps the plugin"),
        ("VLLM_PLUGINS", "", "VLLM_PLUGINS='' keeps the plugin"),
        ("UNMASK_DISABLE", "1", "UNMASK_DISABLE=1 switches the plugin off"),
        ("UNMASK_DISABLE", "x", "expected 0 or 1"),
    ],
)
def test_environment_that_keeps_us_out(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    expected: str,
) -> None:
    monkeypatch.setenv(name, value)
    code, found = report(capsys)
    assert code == 1
    assert [s for s in found["missing"] if expected in s]
    assert found["environment"] == {name: value}
    assert doctor.run() == 1
    assert f"MISSING: {found['missing'][0]}\n" in capsys.readouterr().out


def test_named_among_others_is_fine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,unmask")
    assert report(capsys)[0] == 0


def test_entry_point_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda **_: [])
    code, found = report(capsys)
    assert (code, found["entry_point"]) == (1, False)
    assert doctor.NOT_INSTALLED in found["missing"]


def test_unsupported_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.40.1")
    code, found = report(capsys)
    assert (code, found["supported"]) == (1, False)
    assert "found 0.40.1" in found["missing"][0]
    states = {g["state"] for patch in found["patches"] for g in patch["guards"]}
    assert states == {"unknown source"}


def test_vllm_that_does_not_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report must come out of the very installation that is broken."""
    real = builtins.__import__

    def broken(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.startswith("vllm."):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", broken)
    code, found = report(capsys)
    assert code == 1
    assert "operator torchvision::nms does not exist" in found["missing"][0]
    assert "remove torchvision" in found["missing"][0]
    assert found["device"] is None


def test_cpu_build_without_the_name_vllm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor._distribution
    monkeypatch.setattr(
        doctor, "_distribution", lambda name: None if name == "vllm" else real(name)
    )
    code, found = report(capsys)
    assert code == 1
    assert "no distribution `vllm` is installed" in found["missing"][0]


def checkpoint(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> tuple[int, dict[str, Any]]:
    code = cli.main(["doctor", "--json", "--model", str(folder)])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_checkpoint_that_is_served(
    family: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, REFERENCES[family.architecture].config(8))
    generation = {"eos_token_id": [EOS, 7]}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    code, found = checkpoint(capsys, tmp_path)
    assert (code, found["refused"]) == (0, None)
    kind = family.attention.replace("_", "-")
    assert found.pop("attention").startswith(kind)
    caches = {
        "full": ["none (exact)", "prefix (approximate)", "dual (approximate)"],
        "block_causal": ["none (exact)", "sub_block (approximate)"],
        "causal": ["exact"],
    }
    assert found.pop("cache") == caches[family.attention]
    assert found == {
        "folder": str(tmp_path),
        "refused": None,
        "architecture": family.architecture,
        "checkpoints": family.checkpoints,
        "exact": family.exact,
        "approximate": family.approximate,
        "recommended": list(family.presets),
        "command": f"vllm serve {tmp_path} --additional-config "
        f'\'{{"unmask": {{"strategy": "{family.presets[0]}"}}}}\'',
        "block_length": 8,
        "mask_token_id": MASK,
        "stop_token_ids": [7, EOS],
        "context": 1024,
        "quantization": None,
    }
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"folder          {tmp_path}"
    assert f"recommended     {', '.join(family.presets)}" in lines
    assert f"stop token ids  7, {EOS}" in lines
    assert "quantization    none" in lines


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (sdar_config(mask_token_id=500), "mask_token_id=500 is not allowed: expected"),
        (sdar_config(300), "block_length=300 is not allowed: expected an integer"),
        (sdar_config(architectures=["Qwen3ForCausalLM"]), "is none of this plugin's"),
        (sdar_config(architectures=...), "architectures=[] in config.json"),
        (sdar_config(model_type="sdar_veomni"), "expected 'sdar', by which vLLM"),
        (llada2_config(use_rmsnorm=False), "use_rmsnorm=False in config.json is not"),
        # Its ids are outside of this vocabulary.
        (llada2_config(mask_token_id=...), "mask_token_id=156895 is not allowed"),
    ],
)
def test_config_that_is_refused(
    config: dict[str, Any],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    code, found = checkpoint(capsys, tmp_path)
    assert code == 1
    assert reason in found["refused"]
    assert "\n" not in found["refused"] and "pydantic" not in found["refused"]
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert capsys.readouterr().out.endswith(f"REFUSED: {found['refused']}\n")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no config.json in this folder"),
        ({"config.json": "{"}, "config.json is no JSON"),
        ({"config.json": "[]"}, "config.json holds no JSON object"),
        ({"config.json": json.dumps(sdar_config())}, "no *.safetensors in this folder"),
        (
            {
                "config.json": json.dumps(sdar_config()),
                "a.safetensors": "",
                "model.safetensors.index.json": json.dumps(
                    {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
                ),
            },
            "no b.safetensors in this folder",
        ),
    ],
)
def test_folder_that_is_refused(
    files: dict[str, str],
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, found = checkpoint(capsys, tmp_path)
    assert code == 1
    assert reason in found["refused"]


def test_checkpoint_without_the_plugin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("UNMASK_DISABLE", "1")
    code, found = checkpoint(capsys, tmp_path)
    assert code == 1
    assert "UNMASK_DISABLE=1 switches the plugin off" in found["refused"]
