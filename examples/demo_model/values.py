# SPDX-License-Identifier: Apache-2.0
"""Values that fill the demo tasks, and the split that keeps some of them unseen.

Names, nouns and cities are built from syllables, so a model cannot memorise them
and has to learn to copy. The split is decided by a stable hash of each value:
training draws only values outside the held-out fifth, held-out examples draw only
values inside it. Closed sets (colours, materials, rooms, true/false) are shared.
"""

import hashlib
import random

HELD_OUT_ONE_IN = 5


def _words(text: str) -> list[str]:
    return text.split()


ONSETS = _words("b bl br d dr fl h kr l m n r s st t th tr v w")
VOWELS = _words("a e i o u a e i o ai ea")
CODAS = ["", "", "", "n", "r", "l", "s", "m", "nd", "rt", "lk"]
CITY_ENDS = _words("ton berg ville ford holm dale port burg field mouth")

COLOURS = _words("red blue green black white brown grey pink")
MATERIALS = _words("oak tin wool clay glass steel")
ROOMS = ["single", "double", "twin", "suite"]
NOUNS = _words(
    "lantern kettle cup hat bell lamp chair table mug bowl clock basket blanket "
    "mirror brush candle ladder bucket hammer shovel pillow curtain drum flute "
    "violin guitar bottle plate spoon fork knife tray vase frame shelf desk stool "
    "bench rug carpet towel scarf glove coat jacket belt boot sandal wallet purse "
    "backpack tent rope torch compass map globe telescope camera tripod printer "
    "speaker radio whistle puzzle kite ball racket helmet saddle anchor paddle "
    "net hook reel jar lid pan pot oven grill toaster blender scale timer apron "
    "sponge broom mop hose rake spade planter trellis fence gate hinge bolt nut "
    "screw wrench pliers saw drill chisel file clamp vise level ruler easel quill "
    "ribbon button needle thimble spool loom thread zipper buckle badge medal ring"
)


def is_held_out(kind: str, value: str) -> bool:
    """True for the values training never sees. Stable across runs and machines."""
    digest = hashlib.sha256(f"{kind}:{value}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def assert_split(parts, held_out: bool) -> None:
    """Raise AssertionError unless every (kind, value) lies on one side."""
    wrong = [p for p in parts if is_held_out(*p) != held_out]
    if wrong:
        raise AssertionError(f"held_out={held_out} but the split says no: {wrong}")


class Values:
    """Draws values from one side of the split and notes each one in ``parts``."""

    def __init__(self, rng: random.Random, held_out: bool):
        self.rng = rng
        self.held_out = held_out
        self.parts: list[tuple[str, str]] = []

    def _draw(self, kind: str, make) -> str:
        while True:
            value = make()
            if is_held_out(kind, value) == self.held_out:
                self.parts.append((kind, value))
                return value

    def _word(self) -> str:
        rng = self.rng
        count = 3 if rng.random() < 0.2 else 2
        return "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(count)
        ) + rng.choice(CODAS)

    def name(self) -> str:
        """One capitalised word, used for first names, last names and lists."""
        return self._draw("name", lambda: self._word().capitalize())

    def names(self, count: int) -> list[str]:
        """``count`` different names."""
        found: list[str] = []
        while len(found) < count:
            name = self.name()
            if name not in found:
                found.append(name)
        return found

    def person(self) -> str:
        """A first name, in a third of the draws with a last name."""
        first = self.name()
        return f"{first} {self.name()}" if self.rng.random() < 1 / 3 else first

    def noun(self) -> str:
        """A listed noun or an invented one, half each."""
        if self.rng.random() < 0.5:
            return self._draw("noun", lambda: self.rng.choice(NOUNS))
        return self._draw("noun", self._word)

    def item(self) -> str:
        return f"{self.rng.choice(MATERIALS)} {self.noun()}"

    def city(self) -> str:
        rng = self.rng

        def make() -> str:
            stem = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            return (stem + rng.choice(CITY_ENDS)).capitalize()

        return self._draw("city", make)

    def _short(self) -> bool:
        """Training draws one-digit numbers more often: their length is what a block
        committed at once gets wrong. Held-out numbers stay uniform."""
        return not self.held_out and self.rng.random() < 0.25

    def integer(self, low: int = 1, high: int = 99) -> int:
        if low < 10 and self._short():
            high = 9
        return int(self._draw("int", lambda: str(self.rng.randint(low, high))))

    def integers(self, count: int) -> list[int]:
        """``count`` different two-digit numbers."""
        found: list[int] = []
        while len(found) < count:
            number = self.integer(10, 99)
            if number not in found:
                found.append(number)
        return found

    def price(self) -> float:
        """Two decimals, the last one not zero, so that JSON prints both."""
        rng = self.rng
        top = 9 if self._short() else 99

        def make() -> str:
            whole = rng.randint(1, top)
            return f"{whole}.{rng.randint(0, 9)}{rng.randint(1, 9)}"

        return float(self._draw("price", make))

    def code(self) -> str:
        rng = self.rng

        def make() -> str:
            return f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}-{rng.randint(1000, 9999)}"

        return self._draw("code", make)

    def addends(self) -> tuple[int, int]:
        """Two numbers to add; the unordered pair is what the split holds out."""
        rng = self.rng
        pair = [0, 0]

        def make() -> str:
            top = 9 if rng.random() < 0.2 else 99
            pair[:] = rng.randint(0, top), rng.randint(0, top)
            return f"{min(pair)}+{max(pair)}"

        self._draw("sum", make)
        return pair[0], pair[1]

    def flag(self) -> bool:
        return self.rng.random() < 0.5

    def colour(self) -> str:
        return self.rng.choice(COLOURS)

    def room(self) -> str:
        return self.rng.choice(ROOMS)
