# SPDX-License-Identifier: Apache-2.0
"""What a strategy and its options ask of the model and of what lies beside it.

Imports neither torch nor vLLM.
"""

from vllm_unmask.limits import refused
from vllm_unmask.request_options import DecodingOptions

# Options of models with full attention alone.
_OF_FULL_ATTENTION = ("cache", "refresh", "window")
# Fillers that need a cache which no later token changes.
_OF_FINAL_CACHE = ("lookahead", "freedave", "s2d2")


def require_filter(
    options: DecodingOptions, path: str | None, prefix: str = ""
) -> None:
    """Check that the strategy `learned` has its filter.

    Raises:
        OptionError: it has none.

    """
    if "learned" in options.fillers and path is None:
        raise refused(
            prefix + "strategy",
            options.strategy,
            "a filter: the server option `filter`, or unmask/filter.safetensors beside "
            "the checkpoint (see the README on training one)",
            "asks a trained filter, which this server does not have",
        )


def require_attention_fit(
    options: DecodingOptions, attention: str, prefix: str = ""
) -> None:
    """Check that options and strategy go with what a model's positions see.

    Args:
        options: a request's or a server's.
        attention: "block_causal" or "full", the family's.
        prefix: of the request's keys.

    Raises:
        OptionError: they do not.

    """
    if attention == "full":
        for filler in _OF_FINAL_CACHE:
            if filler in options.fillers:
                raise refused(
                    prefix + "strategy",
                    options.strategy,
                    f"a strategy without {filler}",
                    "needs keys and values that later tokens leave as they are, and "
                    "in this model every position sees every other one",
                )
        return
    for name in _OF_FULL_ATTENTION:
        if (value := getattr(options, name)) is not None:
            raise refused(
                prefix + name,
                value,
                "it for a model with full attention",
                "has no effect, as this model's cache is exact",
            )
