# SPDX-License-Identifier: Apache-2.0
"""`python -m vllm_unmask doctor | serve`."""

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_unmask import doctor
from vllm_unmask.registration import DISABLE, flag, supported_version

PLUGIN_NAME = "unmask"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_unmask",
        description="Serve block-diffusion language models with vLLM.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("doctor", help="show what is installed and what is not")
    check.add_argument("--json", action="store_true", help="print a JSON object")
    serve = commands.add_parser(
        "serve",
        help="check the installation, then run `vllm serve`",
        add_help=False,
    )
    # Everything after `serve` is vLLM's, --help included.
    serve.add_argument("arguments", nargs=argparse.REMAINDER)
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["serve"]:
        return _serve(arguments[1:])
    options = parser.parse_args(arguments)
    return doctor.run(as_json=options.json)


def plugins_with_ours(allowed: str | None) -> str | None:
    """VLLM_PLUGINS with this plugin added; None when it is unset, which loads all."""
    if allowed is None:
        return None
    names = [name for name in allowed.split(",") if name]
    return ",".join(names if PLUGIN_NAME in names else [*names, PLUGIN_NAME])


def _serve(arguments: list[str]) -> int:
    """Replace this process by `vllm serve`."""
    try:
        if flag(DISABLE):
            raise RuntimeError(
                f"{DISABLE}=1 switches the plugin off; unset it, or run `vllm serve`"
            )
        if not doctor.entry_point_visible():
            raise RuntimeError(doctor.NOT_INSTALLED)
        supported_version()
    except (ImportError, RuntimeError) as error:
        sys.stderr.write(f"vllm_unmask serve: {error}\n")
        return 1
    environment = dict(os.environ)
    plugins = plugins_with_ours(environment.get("VLLM_PLUGINS"))
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)
