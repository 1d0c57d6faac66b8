# SPDX-License-Identifier: Apache-2.0
"""Add `--plugin NAME[,NAME...]` to `vllm serve`: are these plugins loaded?"""

import argparse
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Any

from vllm_unmask.patches import Guard, Patch, Replacement

_FLAG = "--plugin"
_GROUP = "vllm.general_plugins"


def loaded_plugins() -> list[str]:
    """The general plugins that vLLM has loaded in this process, by name.

    vLLM keeps no list, so this repeats its rule: every entry point of the group
    that VLLM_PLUGINS allows and whose import succeeds.
    """
    import vllm.envs as envs

    allowed = envs.VLLM_PLUGINS
    names = set()
    for entry_point in entry_points(group=_GROUP):
        if allowed is None or entry_point.name in allowed:
            try:
                entry_point.load()
            except Exception:  # noqa: S112 - vLLM has logged why, and went on
                continue
            names.add(entry_point.name)
    return sorted(names)


class RequirePlugins(argparse.Action):
    """Refuses names of plugins that are not loaded; stores nothing."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        loaded = loaded_plugins()
        for name in str(values).split(","):
            if name.strip() not in loaded:
                raise argparse.ArgumentError(
                    self,
                    f"plugin {name.strip()!r} is not loaded; loaded plugins: "
                    f"{', '.join(loaded) or 'none'}",
                )


def _build(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        if _FLAG not in parser._option_string_actions:
            parser.add_argument(
                _FLAG,
                action=RequirePlugins,
                # Nothing is stored: vLLM compares stored arguments with its own.
                dest=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                metavar="NAME[,NAME...]",
                help="Refuse to start unless these general plugins are loaded. "
                "Plugins load by being installed; VLLM_PLUGINS narrows them.",
            )
        return parser

    return add_cli_args


PATCH = Patch(
    name="plugin_flag",
    what="adds --plugin to the parsers that take engine arguments",
    why="vLLM loads plugins by their being installed, ignores an unknown name in "
    "VLLM_PLUGINS, and has no flag to insist on one",
    removal="vLLM refuses to start without a plugin that the user named",
    replacements=(
        Replacement("vllm.engine.arg_utils:EngineArgs.add_cli_args", _build),
    ),
    guards=(
        # Loads general plugins, and with them this patch, before it calls what is
        # replaced. Of the replaced function itself, a thousand lines of flags, only
        # this call matters.
        Guard(
            "vllm.engine.arg_utils:AsyncEngineArgs.add_cli_args",
            {
                "0.32": "e53011c53a8fbd0ac37699a813a8d977"
                "e910b05f86e0981b0472403e427cf9f2",
                "0.33": "d98a66fb87c11305378197376b54ad79"
                "273757ada3e08ffb66aa6cfafdce2383",
            },
        ),
    ),
)
