# SPDX-License-Identifier: Apache-2.0
"""What one option accepts, and the error of a value it does not."""

import difflib
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple


class OptionError(ValueError):
    """An option that cannot be honoured.

    Args:
        message: names the parameter, its value and what is expected.
        parameter: the key as the user wrote it.
        value: the value that came with it.

    """

    def __init__(self, message: str, parameter: str, value: object) -> None:
        super().__init__(message, parameter, value)
        self.parameter = parameter
        self.value = value

    def __str__(self) -> str:
        return str(self.args[0])


def refused(
    parameter: str, value: object, expected: str, reason: str = "is not allowed"
) -> OptionError:
    """The error that says `parameter=value` is refused, why, and what is expected."""
    message = f"{parameter}={value!r} {reason}: expected {expected}"
    return OptionError(message, parameter, value)


class Limits(NamedTuple):
    """What one option accepts.

    `low` and `high` are inclusive, of a text in bytes of UTF-8. `applies` says with
    which other options the option has an effect, `condition` says the same in words;
    an option without an effect is refused, not ignored.
    """

    kind: Literal["choice", "int", "float", "bool", "strategy", "path", "text"]
    doc: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    optional: bool = False
    applies: Callable[[Any], bool] | None = None
    condition: str = ""

    @property
    def allowed(self) -> str:
        """The accepted values in words."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "bool":
            return "true or false (1 or 0)"
        if self.kind == "path":
            return "a path"
        if self.kind == "text":
            return f"a text of {self.low} to {self.high} bytes"
        if self.kind == "strategy":
            return "names of strategies joined by '+'"
        noun = "an integer" if self.kind == "int" else "a number"
        if self.high is None:
            return f"{noun}, at least {self.low}"
        return f"{noun} from {self.low} to {self.high}"


def unknown_option(
    key: str, value: object, known: Iterable[str], prefix: str = ""
) -> OptionError:
    """The error of a key that is not known; names the nearest known one.

    `prefix` is what all known keys start with, and does not count as likeness.
    """
    names = [name.removeprefix(prefix) for name in known]
    nearest = difflib.get_close_matches(key[len(prefix) :].lower(), names, n=1)
    hint = (
        f"{prefix}{nearest[0]} (nearest match) or another of " if nearest else "one of "
    )
    listing = ", ".join(prefix + name for name in names)
    return refused(key, value, hint + listing, "is no known option")


def check_value(parameter: str, value: Any, limits: Limits) -> Any:
    """Return `value` as the option's own type.

    An integer written as a float (4.0) and a number written as a string ("4") are
    refused: both come from a client that does not know the type, and the next
    value from it would be 4.5 or "four". HTTP turns JSON's true and false into 1
    and 0, so a boolean accepts these.

    Raises:
        OptionError: wrong type, not finite, or out of range.

    """
    if value is None and limits.optional:
        return None
    if limits.kind == "choice":
        if isinstance(value, str) and value in limits.choices:
            return value
        nearest = difflib.get_close_matches(str(value), limits.choices, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise _refusal(parameter, value, limits, hint)
    if limits.kind == "bool":
        if isinstance(value, int) and value in (0, 1):
            return bool(value)
        raise _refusal(parameter, value, limits)
    if limits.kind == "path":
        if isinstance(value, str) and value:
            return value
        raise _refusal(parameter, value, limits)
    if limits.kind == "text":
        low, high = limits.low or 0, limits.high or math.inf
        if isinstance(value, str) and low <= len(_encoded(value)) <= high:
            return value
        raise _refusal(parameter, value, limits)
    accepted = (int,) if limits.kind == "int" else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise _refusal(parameter, value, limits, f", got {type(value).__name__}")
    # Of a float only: an integer too large for one would raise here.
    if isinstance(value, float) and not math.isfinite(value):
        raise _refusal(parameter, value, limits)
    if (limits.low is not None and value < limits.low) or (
        limits.high is not None and value > limits.high
    ):
        raise _refusal(parameter, value, limits)
    return value if limits.kind == "int" else float(value)


def _encoded(text: str) -> bytes:
    """UTF-8; nothing of a text that has none."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return b""


def _refusal(
    parameter: str, value: object, limits: Limits, hint: str = ""
) -> OptionError:
    return refused(parameter, value, limits.allowed + hint)
