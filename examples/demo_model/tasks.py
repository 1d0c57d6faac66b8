# SPDX-License-Identifier: Apache-2.0
"""Demo tasks: seeded examples, and a checker for each task.

``json`` and ``json_free`` turn a record into a JSON object, the first in the key
order the prompt names, the second in any order. ``copy``, ``reverse``, ``sort`` and
``replace`` work on lists, ``add`` on two numbers. ``shuffle``, ``json_free``,
``paraphrase`` and ``any`` have several right answers: their training answer is
drawn at random, so tokens committed together can contradict each other.

Standard library only. Run as a script to write the held-out set.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

from values import COLOURS, Values, assert_split

# Share of each task in training.
MIX = {
    "json": 0.71,
    "json_free": 0.05,
    "copy": 0.03,
    "reverse": 0.03,
    "sort": 0.03,
    "replace": 0.03,
    "add": 0.03,
    "shuffle": 0.03,
    "paraphrase": 0.03,
    "any": 0.03,
}

# schema -> ((key, method of Values, may be left out, phrasings), ...) in key order.
# A flag has one phrasing per value: (true, false).
SCHEMAS = {
    "order": (
        ("customer", "person", False, ("order by {}", "{} wants it")),
        ("item", "item", False, ("item {}", "one {}")),
        ("colour", "colour", True, ("in {}", "colour {}")),
        ("quantity", "integer", False, ("{} units", "count {}")),
        ("price", "price", True, ("at {} each", "for {}")),
        ("city", "city", True, ("send to {}", "city {}")),
        ("express", "flag", True, ("by express", "no express")),
    ),
    "booking": (
        ("guest", "person", False, ("booking by {}", "{} wants it")),
        ("city", "city", False, ("in {}", "city {}")),
        ("room", "room", False, ("{} room", "room {}")),
        ("nights", "integer", False, ("{} nights", "stay of {}")),
        ("price", "price", True, ("at {} each", "for {}")),
        ("breakfast", "flag", True, ("with breakfast", "no breakfast")),
    ),
    "invoice": (
        ("id", "code", False, ("invoice {}", "id {}")),
        ("customer", "person", False, ("sent to {}", "{} has it")),
        ("amount", "price", False, ("amount {}", "sum of {}")),
        ("city", "city", True, ("in {}", "city {}")),
        ("days", "integer", True, ("due in {} days", "open {} days")),
        ("paid", "flag", False, ("it is paid", "not paid")),
    ),
    "stock": (
        ("item", "item", False, ("stock of {}", "one {}")),
        ("colour", "colour", False, ("in {}", "colour {}")),
        ("code", "code", False, ("code {}", "with id {}")),
        ("quantity", "integer", False, ("{} units", "count {}")),
        ("price", "price", True, ("at {} each", "for {}")),
        ("city", "city", True, ("in {}", "city {}")),
    ),
    "parcel": (
        ("id", "code", False, ("parcel {}", "id {}")),
        ("sender", "name", False, ("from {}", "{} sent it")),
        ("receiver", "name", False, ("for {}", "{} wants it")),
        ("city", "city", False, ("send to {}", "city {}")),
        ("weight", "integer", True, ("{} kilos", "weight {}")),
        ("gift", "flag", True, ("as a gift", "no gift")),
    ),
}

ASKS = (
    "Extract {keys} as JSON{how}: {text}",
    "{text}. Return JSON with {keys}{how}.",
    "Turn this {schema} into JSON with {keys}{how}: {text}",
    "JSON of {keys}{how} from: {text}",
)

PARAPHRASES = (
    "{name} wants {count} of {item}.",
    "We send {count} of {item} to {name}.",
    "The order by {name}: {count} of {item}.",
    "{count} of {item} for {name}.",
)


@dataclass(frozen=True)
class Example:
    """One example; ``parts`` are the (kind, value) pairs the split decides on."""

    task: str
    prompt: str
    answer: str
    parts: tuple[tuple[str, str], ...]


def _record(values: Values):
    """Draw (schema name, record dict in key order, text describing it)."""
    rng = values.rng
    schema = rng.choice(list(SCHEMAS))
    fields = [f for f in SCHEMAS[schema] if not f[2] or rng.random() < 0.6]
    record, phrases, notes = {}, [], []
    for key, method, _, wordings in fields:
        value = getattr(values, method)()
        record[key] = value
        if method == "flag":
            phrases.append(wordings[0] if value else wordings[1])
            notes.append(f"{key}: {'yes' if value else 'no'}")
        else:
            phrases.append(rng.choice(wordings).format(value))
            notes.append(f"{key}: {value}")
    as_notes = rng.random() < 0.3
    pieces = notes if as_notes else phrases
    if rng.random() < 0.5:
        rng.shuffle(pieces)
    return schema, record, ("; " if as_notes else ", ").join(pieces)


def _json(values: Values, free: bool = False):
    schema, record, text = _record(values)
    how = " in any order" if free else ""
    prompt = values.rng.choice(ASKS).format(
        keys=", ".join(record), how=how, schema=schema, text=text
    )
    if free:
        keys = list(record)
        values.rng.shuffle(keys)
        record = {key: record[key] for key in keys}
    return prompt, json.dumps(record)


def _json_free(values: Values):
    return _json(values, free=True)


def _names(values: Values) -> list[str]:
    return values.names(values.rng.randint(3, 5))


def _copy(values: Values):
    text = ", ".join(_names(values))
    ask = values.rng.choice(("Copy: {}", "Repeat the list {}"))
    return ask.format(text), text


def _reverse(values: Values):
    names = _names(values)
    ask = values.rng.choice(("Reverse: {}", "List backwards {}"))
    return ask.format(", ".join(names)), ", ".join(reversed(names))


def _sort(values: Values):
    numbers = values.integers(values.rng.randint(3, 5))
    ask = values.rng.choice(("Sort: {}", "Put in order {}"))
    return ask.format(", ".join(map(str, numbers))), ", ".join(
        map(str, sorted(numbers))
    )


def _replace(values: Values):
    *names, new = values.names(values.rng.randint(4, 5))
    old = values.rng.choice(names)
    ask = values.rng.choice(("Replace {} with {}: {}", "Swap {} for {} in {}"))
    answer = ", ".join(new if name == old else name for name in names)
    return ask.format(old, new, ", ".join(names)), answer


def _add(values: Values):
    a, b = values.addends()
    ask = values.rng.choice(("What is {} + {}?", "Add {} and {}", "{} + {} ="))
    return ask.format(a, b), str(a + b)


def _shuffle(values: Values):
    names = _names(values)
    ask = values.rng.choice(("Shuffle: {}", "Mix up the list {}"))
    prompt = ask.format(", ".join(names))
    values.rng.shuffle(names)
    return prompt, ", ".join(names)


def _paraphrase(values: Values):
    record = {
        "name": values.name(),
        "count": values.integer(),
        "item": values.item(),
    }
    prompt = "Confirm the order: {name}, {count}, {item}".format(**record)
    return prompt, values.rng.choice(PARAPHRASES).format(**record)


def _any(values: Values):
    rng = values.rng
    wanted = rng.choice(COLOURS)
    colours = [wanted] * rng.randint(2, 3)
    colours += [rng.choice([c for c in COLOURS if c != wanted]) for _ in range(2)]
    rng.shuffle(colours)
    things = [f"{colour} {values.noun()}" for colour in colours]
    fitting = [thing for thing in things if thing.startswith(wanted + " ")]
    prompt = f"Box: {', '.join(things)}. Give any {wanted} item."
    return prompt, rng.choice(fitting)


_MAKERS = {
    "json": _json,
    "json_free": _json_free,
    "copy": _copy,
    "reverse": _reverse,
    "sort": _sort,
    "replace": _replace,
    "add": _add,
    "shuffle": _shuffle,
    "paraphrase": _paraphrase,
    "any": _any,
}
TASKS = tuple(_MAKERS)


def make_example(
    rng: random.Random, held_out: bool = False, task: str | None = None
) -> Example:
    """One example from one side of the split; the task is drawn from MIX if None."""
    if task is None:
        task = rng.choices(list(MIX), list(MIX.values()))[0]
    values = Values(rng, held_out)
    prompt, answer = _MAKERS[task](values)
    assert_split(values.parts, held_out)
    return Example(task, prompt, answer, tuple(values.parts))


def _parse_pairs(text: str):
    """Key/value pairs in text order, or None if this is no flat JSON object."""
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except ValueError:
        return None
    return pairs if isinstance(pairs, list) else None


def check(task: str, prompt: str, answer: str, output: str) -> bool:
    """Is ``output`` right? ``answer`` is one right answer, not always the only one."""
    if task in ("json", "json_free"):
        want, got = _parse_pairs(answer), _parse_pairs(output)
        if got is None:
            return False
        # repr tells 1 from 1.0 and from true, which == does not.
        want, got = [repr(p) for p in want], [repr(p) for p in got]
        return got == want if task == "json" else sorted(got) == sorted(want)
    if task == "shuffle":
        return sorted(output.split(", ")) == sorted(answer.split(", "))
    if task == "paraphrase":
        name, count, item = prompt.partition(": ")[2].split(", ")
        return output in [
            p.format(name=name, count=count, item=item) for p in PARAPHRASES
        ]
    if task == "any":
        things, _, ask = prompt.removeprefix("Box: ").partition(". ")
        colour = ask.removeprefix("Give any ").removesuffix(" item.")
        fitting = [t for t in things.split(", ") if t.startswith(colour + " ")]
        return output in fitting
    return output == answer


def held_out_set(seed: int, json_count: int, other_count: int) -> list[Example]:
    """The fixed evaluation set: no prompt twice, only held-out values."""
    rng = random.Random(seed)
    examples = []
    for task in TASKS:
        seen: set[str] = set()
        while len(seen) < (json_count if task == "json" else other_count):
            example = make_example(rng, held_out=True, task=task)
            if example.prompt not in seen:
                seen.add(example.prompt)
                examples.append(example)
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out set as JSONL.")
    parser.add_argument("--out", type=Path, default=Path("held_out.jsonl"))
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=int, default=400)
    parser.add_argument("--other", type=int, default=60)
    args = parser.parse_args()
    with args.out.open("w", encoding="utf-8") as file:
        for e in held_out_set(args.seed, args.json, args.other):
            line = {"task": e.task, "prompt": e.prompt, "answer": e.answer}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
