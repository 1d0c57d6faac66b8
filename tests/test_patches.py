# SPDX-License-Identifier: Apache-2.0
"""The patch framework on a made-up module, and each patch on the real vLLM."""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from vllm_unmask import patches, registration
from vllm_unmask.options import (
    DecodingOptions,
    ServerOptions,
    server_options_to_dict,
)
from vllm_unmask.patches import Guard, Patch, PatchError, Replacement, served

HOST = """
class Host:
    def method(self):
        return "method"

    @property
    def prop(self):
        return "prop"

    @staticmethod
    def static():
        return "static"

    def relied_on(self):
        return "relied on"
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "unmask_test_host.py").write_text(HOST)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield importlib.import_module("unmask_test_host")
    sys.modules.pop("unmask_test_host")


def louder(original: Callable[..., str]) -> Callable[..., str]:
    def replacement(*args: Any) -> str:
        return original(*args).upper()

    return replacement


def failing(original: Callable[..., str]) -> Callable[..., str]:
    raise KeyError("cannot build")


def make(
    *names: str, build: Any = louder, guards: tuple[Guard, ...] = (), name: str = "loud"
) -> Patch:
    replacements = tuple(
        Replacement(f"unmask_test_host:Host.{attribute}", build) for attribute in names
    )
    return Patch(name, "what", "why", "never", replacements, guards)


def guard(host: ModuleType, attribute: str, version: str = "1.0") -> Guard:
    raw = vars(host.Host)[attribute]
    function = getattr(raw, "fget", None) or getattr(raw, "__func__", raw)
    source = inspect.getsource(function)
    digest = patches.source_sha256(source)
    return Guard(f"unmask_test_host:Host.{attribute}", {version: digest})


def values(host: ModuleType) -> tuple[str, str, str]:
    return host.Host().method(), host.Host().prop, host.Host.static()


def test_apply_and_revert_every_kind_of_attribute(host: ModuleType) -> None:
    before = dict(vars(host.Host))
    patch = make("method", "prop", "static")
    patches.apply_all("1.0", patches=(patch,))
    assert values(host) == ("METHOD", "PROP", "STATIC")
    patches.apply_all("1.0", patches=(patch,))
    assert values(host) == ("METHOD", "PROP", "STATIC")
    patches.revert_all((patch,))
    assert values(host) == ("method", "prop", "static")
    assert host.Host.method is before["method"]
    patches.revert_all((patch,))
    assert values(host) == ("method", "prop", "static")


def test_applied_once_only(host: ModuleType) -> None:
    def count(original: Callable[..., str]) -> Callable[..., str]:
        return lambda self: original(self) + "+"

    patch = make("method", build=count)
    for _ in range(3):
        patches.apply_all("1.0", patches=(patch,))
    assert host.Host().method() == "method+"


def test_two_patches_of_one_target_stack(host: ModuleType) -> None:
    def suffix(original: Callable[..., str]) -> Callable[..., str]:
        return lambda self: original(self) + "!"

    both = make("method"), make("method", build=suffix, name="suffix")
    patches.apply_all("1.0", patches=both)
    assert host.Host().method() == "METHOD!"
    patches.revert_all(both)
    assert host.Host().method() == "method"


def test_unknown_source_changes_nothing(host: ModuleType) -> None:
    wrong = guard(host, "relied_on")._replace(sha256={"1.0": "0" * 64})
    both = make("method"), make("prop", guards=(wrong,), name="second")
    with pytest.raises(PatchError) as caught:
        patches.apply_all("1.0", patches=both)
    assert values(host) == ("method", "prop", "static")
    message = str(caught.value)
    found = guard(host, "relied_on").sha256["1.0"]
    assert "0" * 64 in message and found in message
    line = host.Host.relied_on.__code__.co_firstlineno
    assert f"{host.__file__}:{line}." in message
    assert "UNMASK_ALLOW_UNTESTED_VLLM=1" in message


def test_version_without_a_recorded_hash_is_refused(host: ModuleType) -> None:
    patch = make("method", guards=(guard(host, "method"),))
    patches.apply_all("1.0", patches=(patch,))
    patches.revert_all((patch,))
    with pytest.raises(PatchError, match="none recorded for vLLM 1.1"):
        patches.apply_all("1.1", patches=(patch,))
    assert host.Host().method() == "method"


def test_unknown_source_on_request(
    host: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    patch = make("method", guards=(guard(host, "relied_on"),))
    with caplog.at_level("WARNING", logger="vllm.vllm_unmask"):
        patches.apply_all("9.9", allow_untested=True, patches=(patch,))
    assert host.Host().method() == "METHOD"
    assert [r for r in caplog.records if "none recorded" in r.message]


@pytest.mark.parametrize(
    "target",
    [
        "unmask_test_host:Host.gone",
        "unmask_test_host:Gone.method",
        "unmask_gone:Host.method",
    ],
)
def test_missing_target_is_refused_even_on_request(
    host: ModuleType, target: str
) -> None:
    patch = make("method", guards=(Guard(target, {}),))
    with pytest.raises(PatchError, match=f"cannot read {target}"):
        patches.apply_all("1.0", allow_untested=True, patches=(patch,))
    assert host.Host().method() == "method"


def test_failure_rolls_back(host: ModuleType) -> None:
    before = dict(vars(host.Host))
    both = make("method", "prop"), make("static", build=failing, name="second")
    with pytest.raises(KeyError, match="cannot build"):
        patches.apply_all("1.0", patches=both)
    assert values(host) == ("method", "prop", "static")
    assert dict(vars(host.Host)) == before


def test_another_plugin_underneath_is_noticed(host: ModuleType) -> None:
    """Even one that imitates the function it replaces."""
    patch = make("method", guards=(guard(host, "method"),))
    original = host.Host.method

    @functools.wraps(original)
    def theirs(self: Any) -> str:
        return "theirs"

    host.Host.method = theirs
    with pytest.raises(PatchError, match="Another plugin may have replaced it"):
        patches.apply_all("1.0", patches=(patch,))
    assert host.Host.method is theirs


def test_another_plugin_on_top_is_kept(host: ModuleType) -> None:
    patch = make("method")
    patches.apply_all("1.0", patches=(patch,))
    ours = host.Host.method

    @functools.wraps(ours)
    def theirs(self: Any) -> str:
        return "<" + ours(self) + ">"

    host.Host.method = theirs
    patches.apply_all("1.0", patches=(patch,))
    assert host.Host().method() == "<METHOD>"
    patches.revert_all((patch,))
    assert host.Host.method is theirs


# The real patches


@pytest.fixture
def vllm_patched() -> Iterator[None]:
    registration.register()
    version = registration.supported_version()
    patches.apply_all(version)
    patches.apply_served(version)
    yield
    patches.apply_all(version)


@pytest.mark.usefixtures("vllm_patched")
def test_inventory_of_the_installed_vllm() -> None:
    states = patches.inventory(registration.supported_version())
    assert [s.patch.name for s in states] == [
        "diffusion_validation",
        "plugin_flag",
        "cpu_model_runner",
        "structured_outputs",
    ]
    for state in states:
        assert state.applied
        assert {g.state for g in state.guards} == {"ok"}
        assert state.patch.what and state.patch.why and state.patch.removal


def test_every_supported_version_has_hashes() -> None:
    for patch in patches.all_patches():
        assert patch.guards
        for entry in patch.guards:
            assert set(entry.sha256) == set(registration.SUPPORTED_VLLM)
            assert all(len(digest) == 64 for digest in entry.sha256.values())


@pytest.mark.usefixtures("vllm_patched")
def test_guards_hold_without_the_patches() -> None:
    patches.revert_all()
    states = patches.inventory(registration.supported_version())
    assert not any(state.applied for state in states)
    assert {g.state for state in states for g in state.guards} == {"ok"}


OURS = SimpleNamespace(
    is_diffusion=True,
    architectures=["SDARForCausalLM"],
    hf_config=SimpleNamespace(
        unmask_served={
            "verify_windows": 2,
            "server": server_options_to_dict(
                ServerOptions(decoding=DecodingOptions(steps=4))
            ),
            "attention": "block_causal",
            "synchronous": True,
            "block_length": 8,
            "mask_token_id": 3,
            "vocab_size": 100,
            "filter": None,
        }
    ),
)
AUTOREGRESSIVE = SimpleNamespace(
    is_diffusion=False, architectures=["X"], hf_config=SimpleNamespace()
)
OTHER_DIFFUSION = SimpleNamespace(
    is_diffusion=True, architectures=["X"], hf_config=SimpleNamespace()
)


@pytest.mark.usefixtures("vllm_patched")
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7},
        {"logit_bias": {5: 1.0}, "allowed_token_ids": [3, 5], "min_tokens": 2},
        {"stop": ["x"], "stop_token_ids": [9], "ignore_eos": True, "n": 2},
        {"logprobs": 3, "bad_words": ["no"]},
        {"extra_args": {"unmask_threshold": 0.5, "kv_transfer_params": None}},
        {"extra_args": {"unmask_steps": 8}},
    ],
    ids=str,
)
def test_honoured_parameters_are_admitted(arguments: dict[str, Any]) -> None:
    from vllm import SamplingParams

    SamplingParams(**arguments)._validate_diffusion(OURS)


@pytest.mark.usefixtures("vllm_patched")
@pytest.mark.parametrize(
    ("arguments", "parameter", "expected"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty", "expected 0"),
        ({"frequency_penalty": -0.5}, "frequency_penalty", "expected 0"),
        ({"repetition_penalty": 1.1}, "repetition_penalty", "expected 1"),
        ({"prompt_logprobs": 0}, "prompt_logprobs", "expected unset"),
        ({"prompt_logprobs": 2}, "prompt_logprobs", "expected unset"),
        (
            {"prompt_logprob_token_ids": [[1, 2]]},
            "prompt_logprob_token_ids",
            "expected unset",
        ),
        ({"logprob_token_ids": [1]}, "logprob_token_ids", "expected unset"),
        ({"thinking_token_budget": 5}, "thinking_token_budget", "expected unset"),
        ({"trace_decode_token_ids": [5]}, "trace_decode_token_ids", "expected unset"),
        (
            {"extra_args": {"diffusion_max_steps": 3}},
            "diffusion_max_steps",
            "start with 'unmask_'",
        ),
        (
            {"extra_args": {"unmask_treshold": 0.5}},
            "unmask_treshold",
            "unmask_threshold (nearest match)",
        ),
        ({"extra_args": {"unmask_steps": 9}}, "unmask_steps", "from 1 to 8"),
        ({"logit_bias": {3: 1.0}}, "logit_bias", "mask token"),
        ({"allowed_token_ids": [3, 3]}, "allowed_token_ids", "mask token"),
    ],
    ids=str,
)
def test_other_parameters_are_a_400(
    arguments: dict[str, Any], parameter: str, expected: str
) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError, VLLMValidationError

    params = SamplingParams(**arguments)
    with pytest.raises(VLLMValidationError) as caught:
        params._validate_diffusion(OURS)
    assert isinstance(caught.value, VLLMClientError)
    assert caught.value.parameter == parameter
    assert expected in str(caught.value)
    assert f"parameter={parameter}" in str(caught.value)


@pytest.mark.usefixtures("vllm_patched")
def test_other_models_take_vllms_own_check() -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    greedy = SamplingParams(temperature=0.0, extra_args={"other": 1})
    greedy._validate_diffusion(AUTOREGRESSIVE)
    with pytest.raises(VLLMValidationError, match="not yet supported with diffusion"):
        greedy._validate_diffusion(OTHER_DIFFUSION)


@pytest.mark.usefixtures("vllm_patched")
@pytest.mark.parametrize("model_config", [AUTOREGRESSIVE, OTHER_DIFFUSION])
def test_our_options_sent_to_another_model(model_config: Any) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    params = SamplingParams(extra_args={"unmask_steps": 3})
    with pytest.raises(VLLMValidationError, match="not a block-diffusion model") as e:
        params._validate_diffusion(model_config)
    assert e.value.parameter == "unmask_steps"


def runner(
    model_config: Any, unsupported: tuple[str, ...] = ()
) -> tuple[bool, Exception | None]:
    """What a config with this model says: V2 or not, and does V2 validate."""
    from vllm.config.vllm import VllmConfig

    config = SimpleNamespace(
        model_config=model_config,
        attention_config=SimpleNamespace(hisparse_config=None),
        watermark_config=None,
        _get_v2_model_runner_unsupported_features=lambda: list(unsupported),
    )
    use = vars(VllmConfig)["use_v2_model_runner"].fget(config)
    try:
        VllmConfig._validate_v2_model_runner(config)  # type: ignore[arg-type]
    except ValueError as error:
        return use, error
    return use, None


@pytest.fixture
def cpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)


@pytest.mark.usefixtures("vllm_patched", "cpu_without_triton")
def test_our_models_get_runner_v2_on_cpu() -> None:
    assert runner(OURS) == (True, None)
    by_architecture = SimpleNamespace(
        architectures=["SDARForCausalLM"], hf_config=SimpleNamespace()
    )
    assert runner(by_architecture) == (True, None)
    assert "SDARForCausalLM" in served.ARCHITECTURES


@pytest.mark.usefixtures("vllm_patched", "cpu_without_triton")
def test_other_models_keep_their_runner_on_cpu() -> None:
    for model_config in (AUTOREGRESSIVE, None):
        use, error = runner(model_config)
        assert not use
    patches.revert_all()
    assert runner(OURS)[0] is False


@pytest.mark.usefixtures("vllm_patched", "cpu_without_triton")
def test_gate_keeps_vllms_other_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    _, error = runner(OURS, unsupported=("dual batch overlap",))
    assert "does not yet support: dual batch overlap" in str(error)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="remove VLLM_USE_V2_MODEL_RUNNER=0"):
        runner(OURS)


@pytest.mark.usefixtures("vllm_patched", "cpu_without_triton")
def test_cpu_without_triton_needs_the_version_that_was_tested(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    with pytest.raises(ValueError, match="need vLLM 0.32; found 0.33.0"):
        runner(OURS)
    assert runner(AUTOREGRESSIVE)[0] is False


@pytest.mark.usefixtures("vllm_patched", "cpu_without_triton")
def test_gate_stays_shut_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU or with Triton vLLM's own code decides, for our models too."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    assert runner(OURS)[0] is False
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert runner(OURS)[0] is False
