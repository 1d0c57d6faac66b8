# SPDX-License-Identifier: Apache-2.0
"""Answers as objects of a Pydantic model, through OpenAI's client.

Asks a running server, or starts `vllm serve` with the demo model itself. The second
question leaves the model far too few tokens, and its answer still is a `Booking`.
Exit status 0 means that every answer was one, and at most one of them wrong.
"""

import argparse
import json
import sys
from contextlib import nullcontext
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, ConfigDict
from quickstart import DEMO, connect, serve

# An answer has the keys in this order: the one in which the prompt names them.
KEYS = ["guest", "city", "room", "nights"]


class Booking(BaseModel):
    """What the demo model is asked to extract."""

    model_config = ConfigDict(extra="forbid")

    guest: str
    city: str
    room: Literal["single", "double", "twin", "suite"]
    nights: int


def ask(client: OpenAI, prompt: str, max_tokens: int) -> tuple[Booking, str, int]:
    """The answer, its finish reason and its length in tokens."""
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": prompt}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "booking", "schema": Booking.model_json_schema()},
        },
        temperature=0,
        max_tokens=max_tokens,
    )
    choice = answer.choices[0]
    # Raises if the text is not what the schema says.
    booking = Booking.model_validate_json(choice.message.content)
    return booking, choice.finish_reason, answer.usage.completion_tokens


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", help="a running server, http://127.0.0.1:8000")
    args = parser.parse_args()
    records = [json.loads(line) for line in (DEMO / "held_out.jsonl").open()]
    bookings = [
        (record["prompt"], Booking.model_validate_json(record["answer"]))
        for record in records
        if record["task"] == "json" and list(json.loads(record["answer"])) == KEYS
    ][:4]
    server = nullcontext(args.address) if args.address else serve(DEMO / "sdar")
    wrong = 0
    with server as address, connect(address) as client:
        for prompt, expected in bookings:
            booking, reason, tokens = ask(client, prompt, max_tokens=64)
            wrong += booking != expected
            sys.stdout.write(f"{prompt}\n  {booking!r}\n  {reason}, {tokens} tokens\n")
        prompt, _ = bookings[0]
        booking, reason, tokens = ask(client, prompt, max_tokens=30)
        sys.stdout.write(f"in 30 tokens:\n  {booking!r}\n  {reason}, {tokens} tokens\n")
    sys.stdout.write(f"{len(bookings) - wrong} of {len(bookings)} right\n")
    return 0 if wrong <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
