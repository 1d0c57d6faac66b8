# SPDX-License-Identifier: Apache-2.0
"""Serve block-diffusion language models with an unmodified vLLM.

vLLM imports this package in every process it starts, so importing it loads
neither torch nor vLLM.
"""

from vllm_unmask.options import (
    DecodingOptions,
    OptionError,
    ServerOptions,
)
from vllm_unmask.request_params import sampling_params

__version__ = "0.1.0"

__all__ = [
    "DecodingOptions",
    "OptionError",
    "ServerOptions",
    "__version__",
    "register",
    "sampling_params",
]


def register() -> None:
    """Register the model families and apply the patches in this process.

    The entry point `unmask` of the group `vllm.general_plugins`; may be called
    any number of times. See `vllm_unmask.registration.register`.

    Raises:
        RuntimeError: the installed vLLM is not supported, or its code is not
            what the patches were written for.

    """
    from vllm_unmask import registration

    registration.register()
