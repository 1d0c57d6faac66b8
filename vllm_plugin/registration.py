# SPDX-License-Identifier: Apache-2.0
"""The entry point: what a vLLM process knows of us once plugins are loaded.

Runs in the API server, the engine core, every worker and the process that
inspects model classes, so it imports no model, no CUDA and no Triton: families
are registered by name and imported when one of them is served.
"""

import importlib
import logging
import os
import re
from functools import partial

from vllm_unmask import patches
from vllm_unmask.families import CONFIG_HOOK, FAMILIES, ON_SERVED, Family

SUPPORTED_VLLM = ("0.32", "0.33")
DISABLE = "UNMASK_DISABLE"
ALLOW_UNTESTED = "UNMASK_ALLOW_UNTESTED_VLLM"

# A child of vLLM's logger: its handlers, its level, its VLLM_LOGGING_LEVEL.
logger = logging.getLogger("vllm.vllm_unmask")

_registered = False


def register() -> None:
    """Check vLLM's version, apply the patches, register the families.

    Does nothing when called again, or when UNMASK_DISABLE=1.

    Raises:
        RuntimeError: an unsupported vLLM, an environment variable that is neither
            0 nor 1, or vLLM code that a patch does not know (`PatchError`).

    """
    global _registered
    if _registered:
        return
    if flag(DISABLE):
        logger.info("vllm-unmask is switched off by %s=1", DISABLE)
        return
    version = supported_version()
    untested = flag(ALLOW_UNTESTED)
    patches.apply_all(version, allow_untested=untested)
    try:
        for family in FAMILIES:
            _register_family(family)
    except BaseException:
        patches.revert_all()
        raise
    ON_SERVED.append(partial(patches.apply_served, version, allow_untested=untested))
    _registered = True

    from vllm_unmask import __version__

    logger.info(
        "vllm-unmask %s on vLLM %s: families %s; patches %s",
        __version__,
        vllm_version(),
        ", ".join(family.architecture for family in FAMILIES) or "none",
        ", ".join(patch.name for patch in patches.all_patches()),
    )


def flag(name: str) -> bool:
    """Read an on/off environment variable; unset, empty and 0 are off.

    Raises:
        RuntimeError: any other value than these and 1.

    """
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise RuntimeError(f"{name}={value!r} is not allowed: expected 0 or 1")
    return value == "1"


def vllm_version() -> str:
    """vLLM's own version string.

    Not that of the distribution: the CPU build is a distribution of another name.
    """
    import vllm

    return vllm.__version__


def is_supported(version: str) -> bool:
    """Whether this vLLM version is one that we know."""
    return minor_version(version) in SUPPORTED_VLLM


def minor_version(version: str) -> str:
    """`0.32` of `0.32.0+cpu`; the whole string when it is no release number."""
    match = re.match(r"(\d+\.\d+)\b", version)
    return match[1] if match else version


def supported_version() -> str:
    """The installed vLLM's minor version, such as `0.32`.

    Raises:
        RuntimeError: it is not a supported one and UNMASK_ALLOW_UNTESTED_VLLM is
            not 1.

    """
    version = vllm_version()
    if not is_supported(version):
        message = (
            f"vllm-unmask supports vLLM {' and '.join(SUPPORTED_VLLM)}, found "
            f"{version}. Install a supported version, set {DISABLE}=1 to run vLLM "
            f"without this plugin, or {ALLOW_UNTESTED}=1 to try it anyway."
        )
        if not flag(ALLOW_UNTESTED):
            raise RuntimeError(message)
        logger.warning("%s Trying.", message)
    return minor_version(version)


def _register_family(family: Family) -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils import config, configs

    # vLLM looks a config class up by model type here before it reads `auto_map`,
    # and imports it from the module named there: no remote code, no early import.
    module, _, name = family.config_cls.partition(":")
    if configs._CLASS_TO_MODULE.setdefault(name, module) != module:
        raise RuntimeError(
            f"vLLM {vllm_version()} has a config class {name} of its own, in "
            f"{configs._CLASS_TO_MODULE[name]}; {module} cannot replace it. Set "
            f"{DISABLE}=1 to use vLLM's."
        )
    config._CONFIG_REGISTRY[family.model_type] = name
    ModelRegistry.register_model(family.architecture, family.model_cls)
    module, _, name = CONFIG_HOOK.partition(":")
    MODELS_CONFIG_MAP[family.architecture] = getattr(
        importlib.import_module(module), name
    )
    patches.served.ARCHITECTURES.add(family.architecture)
