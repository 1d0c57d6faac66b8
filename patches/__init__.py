# SPDX-License-Identifier: Apache-2.0
"""Changes to vLLM: one file each, guarded, all or none, revertible.

A patch replaces attributes of vLLM and relies on the code it replaces or calls.
That code is guarded by the hash of its source, per supported vLLM version: on any
other source the patch is not applied, because nobody has read what it would
change. Models that are not ours take vLLM's own code.
"""

import hashlib
import importlib
import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vllm_unmask.patches import served

__all__ = [
    "Guard",
    "Patch",
    "PatchError",
    "Replacement",
    "all_patches",
    "apply_all",
    "apply_served",
    "inventory",
    "revert_all",
    "served",
]

logger = logging.getLogger("vllm.vllm_unmask.patches")

_SENTINEL = "__unmask_patch__"
_MODULES = (
    "diffusion_validation",
    "plugin_flag",
    "cpu_model_runner",
    "structured_outputs",
)


class PatchError(RuntimeError):
    """A patch cannot be applied to this vLLM."""


class Guard(NamedTuple):
    """vLLM code that a patch was written against.

    `target` is `module:Class.attribute`; `sha256` maps a minor vLLM version to the
    hash of the target's source.
    """

    target: str
    sha256: Mapping[str, str]


class Replacement(NamedTuple):
    """An attribute of vLLM and how to build ours.

    `build` gets the plain function found there (unwrapped from `property` or
    `staticmethod`) and returns another one, which is wrapped the same way.
    """

    target: str
    build: Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Patch:
    """One change to vLLM.

    Attributes:
        name: the name of its file.
        what: what it changes.
        why: what does not work without it.
        removal: when it can be deleted.
        replacements: what is replaced.
        guards: what must be as it was when the patch was written.
        when: "registration", or "served": once one of our models is configured.
            What such a patch replaces is imported by that process anyway, and by
            no other one.

    """

    name: str
    what: str
    why: str
    removal: str
    replacements: tuple[Replacement, ...]
    guards: tuple[Guard, ...]
    when: Literal["registration", "served"] = "registration"


class GuardState(NamedTuple):
    """What a guard found. `state`: ok, unknown source, or missing."""

    guard: Guard
    state: str
    found: str
    location: str


class PatchState(NamedTuple):
    """What `inventory` reports of a patch."""

    patch: Patch
    applied: bool
    guards: tuple[GuardState, ...]


class _Slot(NamedTuple):
    owner: Any
    attribute: str
    raw: Any


class _Mark(NamedTuple):
    """Sits on our replacement: makes application idempotent and revertible."""

    patch: str
    ours: Callable[..., Any]
    original: types.FunctionType


def all_patches() -> tuple[Patch, ...]:
    """Every patch, in the order of application."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in _MODULES)
    return tuple(module.PATCH for module in modules)


def apply_all(
    version: str,
    *,
    allow_untested: bool = False,
    patches: tuple[Patch, ...] | None = None,
) -> None:
    """Apply every patch, or none.

    Args:
        version: vLLM's minor version, such as `0.32`.
        allow_untested: warn about unknown source instead of refusing it.
        patches: these instead of those of registration.

    Raises:
        PatchError: a target is missing, or its source is unknown.

    """
    if patches is None:
        patches = tuple(p for p in all_patches() if p.when == "registration")
    refused = []
    for patch in patches:
        for state in _guard_states(patch, version):
            if state.state == "ok":
                continue
            problem = _problem(patch, state, version)
            if state.state == "unknown source" and allow_untested:
                logger.warning("%s", problem)
            else:
                refused.append(problem)
    if refused:
        raise PatchError("\n".join(refused))
    done: list[_Slot] = []
    try:
        for patch in patches:
            for replacement in patch.replacements:
                slot = _resolve(replacement.target)
                function = _function(slot.raw)
                if _mark(function) == patch.name:
                    continue
                ours = replacement.build(function)
                setattr(ours, _SENTINEL, _Mark(patch.name, ours, function))
                setattr(slot.owner, slot.attribute, _rewrap(slot.raw, ours))
                done.append(slot)
    except BaseException:
        for slot in reversed(done):
            setattr(slot.owner, slot.attribute, slot.raw)
        raise


def apply_served(version: str, *, allow_untested: bool = False) -> None:
    """Apply the patches for a process that serves one of our models.

    Raises:
        PatchError: as of `apply_all`.

    """
    patches = tuple(patch for patch in all_patches() if patch.when == "served")
    apply_all(version, allow_untested=allow_untested, patches=patches)


def revert_all(patches: tuple[Patch, ...] | None = None) -> None:
    """Put vLLM's own code back wherever a patch is still on top."""
    for patch in reversed(all_patches() if patches is None else patches):
        for replacement in reversed(patch.replacements):
            slot = _resolve(replacement.target)
            mark = getattr(_function(slot.raw), _SENTINEL, None)
            if mark and mark.patch == patch.name and mark.ours is _function(slot.raw):
                raw = _rewrap(slot.raw, mark.original)
                setattr(slot.owner, slot.attribute, raw)


def inventory(version: str) -> tuple[PatchState, ...]:
    """The state of every patch in this process, for `doctor`."""
    return tuple(
        PatchState(patch, _applied(patch), _guard_states(patch, version))
        for patch in all_patches()
    )


def source_sha256(source: str) -> str:
    """Hash the source text of a function as `inspect.getsource` returns it."""
    return hashlib.sha256(source.encode()).hexdigest()


def _applied(patch: Patch) -> bool:
    try:
        return all(
            _mark(_function(_resolve(replacement.target).raw)) == patch.name
            for replacement in patch.replacements
        )
    except (ImportError, AttributeError):
        return False


def _guard_states(patch: Patch, version: str) -> tuple[GuardState, ...]:
    return tuple(_guard_state(guard, version) for guard in patch.guards)


def _guard_state(guard: Guard, version: str) -> GuardState:
    try:
        code = _original(_function(_resolve(guard.target).raw)).__code__
        # Of the code object: of a function, getsource looks behind wrappers and
        # would not notice that another plugin has replaced it.
        source = inspect.getsource(code)
    except (ImportError, AttributeError, OSError, TypeError) as error:
        return GuardState(guard, "missing", f"{type(error).__name__}: {error}", "")
    location = f"{code.co_filename}:{code.co_firstlineno}"
    found = source_sha256(source)
    state = "ok" if guard.sha256.get(version) == found else "unknown source"
    return GuardState(guard, state, found, location)


def _problem(patch: Patch, state: GuardState, version: str) -> str:
    target = state.guard.target
    if state.state == "missing":
        return (
            f"patch {patch.name}: cannot read {target} of this vLLM ({state.found}). "
            f"Set UNMASK_DISABLE=1 to run it without vllm-unmask."
        )
    expected = state.guard.sha256.get(version, f"none recorded for vLLM {version}")
    return (
        f"patch {patch.name}: the source of {target} is not the one it was written "
        f"for. Expected sha256 {expected}, found {state.found}, at {state.location}. "
        f"Another plugin may have replaced it, or vLLM is a patched or newer build. "
        f"Set UNMASK_ALLOW_UNTESTED_VLLM=1 to apply the patch anyway, or "
        f"UNMASK_DISABLE=1 to run vLLM without vllm-unmask."
    )


def _resolve(target: str) -> _Slot:
    module_name, _, path = target.partition(":")
    owner: Any = importlib.import_module(module_name)
    *parents, attribute = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    # From the owner itself: a replacement set on a subclass would not be removed
    # by writing the base's attribute back.
    if attribute not in vars(owner):
        raise AttributeError(f"{owner.__name__} has no {attribute} of its own")
    return _Slot(owner, attribute, vars(owner)[attribute])


def _function(raw: Any) -> types.FunctionType:
    if isinstance(raw, property):
        raw = raw.fget
    elif isinstance(raw, (staticmethod, classmethod)):
        raw = raw.__func__
    if not inspect.isfunction(raw):
        raise TypeError(f"{raw!r} is not a function")
    return raw


def _mark(function: types.FunctionType) -> str | None:
    """The patch that a function, or one that `functools.wraps` it, comes from."""
    mark = getattr(function, _SENTINEL, None)
    return mark.patch if mark else None


def _original(function: types.FunctionType) -> types.FunctionType:
    """See through our own replacement, but not through another plugin's."""
    mark = getattr(function, _SENTINEL, None)
    return mark.original if mark and mark.ours is function else function


def _rewrap(raw: Any, function: Callable[..., Any]) -> Any:
    if isinstance(raw, property):
        return property(function, raw.fset, raw.fdel, raw.__doc__)
    if isinstance(raw, (staticmethod, classmethod)):
        return type(raw)(function)
    return function
