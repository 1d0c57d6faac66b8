# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask doctor`: what is installed, missing, and would be served."""

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_unmask import __version__, options, patches, presets, registration
from vllm_unmask.families import FAMILIES
from vllm_unmask.families.inspection import inspect_checkpoint
from vllm_unmask.request_options import default_text

_GROUP = "vllm.general_plugins"
NOT_INSTALLED = (
    "vLLM cannot see the plugin: no entry point `unmask` in group "
    f"`{_GROUP}`; install it into this environment with pip"
)


def run(as_json: bool = False) -> int:
    """Print the report; return 1 if something required is missing, else 0."""
    report = collect()
    _write(report if as_json else _lines(report))
    return 1 if report["missing"] else 0


def run_model(folder: str, as_json: bool = False) -> int:
    """Print what would be done with a checkpoint; return 1 if it is refused, else 0."""
    report: dict[str, Any] = {"folder": folder, "refused": None}
    if missing := collect()["missing"]:
        report["refused"] = "; ".join(missing)
    else:
        report |= inspect_checkpoint(Path(folder))
    _write(report if as_json else _checkpoint_lines(report))
    return 1 if report["refused"] else 0


def _write(report: dict[str, Any] | list[str]) -> None:
    is_json = isinstance(report, dict)
    text = json.dumps(report, indent=2) if is_json else "\n".join(report)
    sys.stdout.write(text + "\n")


def entry_point_visible() -> bool:
    """Whether vLLM will find this package in the environment."""
    found = importlib.metadata.entry_points(group=_GROUP, name="unmask")
    return any(entry.value == "vllm_unmask:register" for entry in found)


def collect() -> dict[str, Any]:
    """Everything the report says, as a JSON-safe mapping.

    `missing` holds one sentence for each thing without which no model is served:
    what it is and what to do.
    """
    report: dict[str, Any] = {
        "versions": _versions(),
        "entry_point": entry_point_visible(),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name == "VLLM_PLUGINS" or name.startswith("UNMASK_")
        },
        "families": [
            {"architecture": family.architecture, "model_type": family.model_type}
            for family in FAMILIES
        ],
        "strategies": _strategies(),
        "options": _option_table(),
    }
    missing: list[str] = [] if report["entry_point"] else [NOT_INSTALLED]
    plugins = os.environ.get("VLLM_PLUGINS")
    if plugins is not None and "unmask" not in plugins.split(","):
        missing.append(
            f"VLLM_PLUGINS={plugins!r} keeps the plugin from loading; add `unmask`"
        )
    try:
        if registration.flag(registration.DISABLE):
            missing.append(
                f"{registration.DISABLE}=1 switches the plugin off; unset it"
            )
    except RuntimeError as error:
        missing.append(str(error))
    report |= _vllm_state(missing)
    report["missing"] = missing
    return report


def _versions() -> dict[str, str | None]:
    return {
        "vllm-unmask": __version__,
        "vllm": _attempt(registration.vllm_version),
        "torch": _distribution("torch"),
        "triton": _distribution("triton"),
        "transformers": _distribution("transformers"),
        "xgrammar": _distribution("xgrammar"),
        "python": platform.python_version(),
    }


def _distribution(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _attempt(read: Callable[[], str]) -> str | None:
    try:
        return read()
    except ImportError:
        return None


def _vllm_state(missing: list[str]) -> dict[str, Any]:
    """What only a process with vLLM can tell; adds to `missing`."""
    state: dict[str, Any] = {
        "supported": False,
        "patches": [],
        "device": None,
        "triton_usable": None,
        "runner": None,
    }
    try:
        from vllm.platforms import current_platform
        from vllm.triton_utils import HAS_TRITON
    except Exception as error:
        # Anything may go wrong in there: a torchvision that does not fit torch,
        # a missing library. The report is for exactly that case.
        missing.append(
            f"importing vllm fails ({type(error).__name__}: {error}); install "
            f"`vllm-unmask[vllm]`, or `vllm-unmask[cpu]` on a machine without a GPU, "
            f"and remove torchvision, torchaudio and torchcodec if the error names one"
        )
        return state
    try:
        version = registration.supported_version()
        state["supported"] = registration.is_supported(registration.vllm_version())
        registration.register()
    except RuntimeError as error:
        missing.append(str(error))
        version = registration.minor_version(registration.vllm_version())
    state["patches"] = [_patch_entry(entry) for entry in patches.inventory(version)]
    state["device"] = (
        current_platform.device_type or "none: vLLM found no platform to run on"
    )
    if not current_platform.device_type:
        missing.append(
            "vLLM found no device: on a machine without a GPU the CPU build needs a "
            "distribution `vllm` whose version ends in `+cpu` (`make setup` adds it)"
        )
    if _distribution("vllm") is None:
        missing.append(
            "no distribution `vllm` is installed (its CPU build has another name), so "
            "the `vllm` command fails; `make setup` adds the metadata of one"
        )
    if _distribution("xgrammar") is None:
        missing.append(
            "xgrammar, which comes with vLLM, is not installed: structured outputs fail"
        )
    state["triton_usable"] = HAS_TRITON
    kernels = "Triton" if HAS_TRITON else "CPU overrides"
    place = "the engine core's process"
    state["runner"] = (
        f"Model Runner V2 for our models, kernels: {kernels}, one worker: in {place}"
    )
    return state


def _patch_entry(entry: patches.PatchState) -> dict[str, Any]:
    return {
        "name": entry.patch.name,
        "applied": entry.applied,
        "when": entry.patch.when,
        "what": entry.patch.what,
        "why": entry.patch.why,
        "removal": entry.patch.removal,
        "guards": [
            {
                "target": guard.guard.target,
                "state": guard.state,
                "location": guard.location,
            }
            for guard in entry.guards
        ],
    }


def _option_table() -> list[dict[str, Any]]:
    own = options.server_options_to_dict(options.ServerOptions())
    of_request = options.decoding_limits()
    return [
        {
            "server": name,
            "request": options.REQUEST_PREFIX + name if name in of_request else None,
            "default": default_text(name)
            if name in of_request
            else json.dumps(own[name]),
            "allowed": limits.allowed,
            "only_with": limits.condition or None,
            "doc": limits.doc,
        }
        for name, limits in options.server_limits().items()
    ]


def _strategies() -> list[dict[str, Any]]:
    return [
        {"name": name, "slot": filler.slot, "doc": filler.doc}
        for name, filler in presets.FILLERS.items()
    ] + [
        {"name": name, "slot": None, "doc": f"{preset.doc}: {preset.strategy}"}
        for name, preset in presets.PRESETS.items()
    ]


def _lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{name:14}{value or 'not found'}" for name, value in report["versions"].items()
    ]
    lines += [
        f"{'supported':14}{'yes' if report['supported'] else 'no'}",
        f"{'entry point':14}{'found' if report['entry_point'] else 'not found'}",
        f"{'device':14}{report['device'] or 'unknown'}",
        f"{'runner':14}{report['runner'] or 'unknown'}",
        f"{'families':14}"
        + ", ".join(family["architecture"] for family in report["families"]),
    ]
    lines += [f"{name}={value}" for name, value in report["environment"].items()]
    for patch in report["patches"]:
        later = patch["when"] == "served"
        waiting = "applied once one of our models is served" if later else "not applied"
        state = "applied" if patch["applied"] else waiting
        lines += ["", f"patch {patch['name']}: {state}", f"  {patch['what']}"]
        lines += [f"  {guard['state']}: {guard['target']}" for guard in patch["guards"]]
    lines += ["", "strategies: what a slot may hold; presets"]
    lines += [
        f"  {entry['name']} ({entry['slot'] or 'preset'}): {entry['doc']}"
        for entry in report["strategies"]
    ]
    lines += ["", "options: server name (request name) = default; allowed; meaning"]
    for option in report["options"]:
        request = f" ({option['request']})" if option["request"] else ""
        condition = f" [{option['only_with']}]" if option["only_with"] else ""
        lines.append(
            f"  {option['server']}{request} = {option['default']}; "
            f"{option['allowed']}{condition}; {option['doc']}"
        )
    lines.append("")
    lines += [f"MISSING: {sentence}" for sentence in report["missing"]] or [
        "nothing required is missing"
    ]
    return lines


def _checkpoint_lines(report: dict[str, Any]) -> list[str]:
    lines = [
        f"{name.replace('_', ' '):16}{_text(value)}"
        for name, value in report.items()
        if name != "refused"
    ]
    return [*lines, f"REFUSED: {report['refused']}"] if report["refused"] else lines


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
