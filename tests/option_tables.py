# SPDX-License-Identifier: Apache-2.0
"""The tables of the documentation, made from the code; run it to print them."""

import json
import sys
from collections.abc import Iterator

from vllm_unmask.options import (
    ServerOptions,
    decoding_limits,
    server_limits,
    server_options_to_dict,
)
from vllm_unmask.presets import FILLERS, PRESETS, SLOTS
from vllm_unmask.request_options import default_text


def server_options() -> Iterator[str]:
    """Options that only a server has."""
    yield "| option | default | allowed | meaning |\n|---|---|---|---|\n"
    defaults = server_options_to_dict(ServerOptions())
    for name, limits in server_limits().items():
        if name not in decoding_limits():
            yield (
                f"| `{name}` | `{json.dumps(defaults[name])}` | {limits.allowed} | "
                f"{limits.doc} |\n"
            )


def request_options() -> Iterator[str]:
    """Options of a request, which are a server's too."""
    yield "| option | default | allowed | meaning | only with |\n"
    yield "|---|---|---|---|---|\n"
    for name, limits in decoding_limits().items():
        yield (
            f"| `{name}` | {default_text(name)} | {limits.allowed} | {limits.doc} | "
            f"{limits.condition} |\n"
        )


def strategies() -> Iterator[str]:
    """Fillers by slot."""
    yield "| slot | name | what it does | options |\n|---|---|---|---|\n"
    for slot in SLOTS:
        for name, filler in FILLERS.items():
            if filler.slot == slot:
                options = ", ".join(f"`{option}`" for option in filler.defaults)
                yield f"| {slot} | `{name}` | {filler.doc} | {options} |\n"


def presets() -> Iterator[str]:
    """Published configurations."""
    yield "| preset | source | stands for |\n|---|---|---|\n"
    for name, preset in PRESETS.items():
        values = ", ".join(f"{k}={json.dumps(v)}" for k, v in preset.values.items())
        meaning = f"`{preset.strategy}`" + (f" with {values}" if values else "")
        yield f"| `{name}` | {preset.doc} | {meaning} |\n"


if __name__ == "__main__":
    for table in (server_options, request_options, strategies, presets):
        sys.stdout.write("".join(table()) + "\n")
