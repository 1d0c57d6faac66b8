# SPDX-License-Identifier: Apache-2.0
"""A grammar as a recursive transition network over bytes, with distances to its end.

xgrammar says which bytes may come next, but not how far the end is. This module
reads the rules back from a compiled grammar and computes for every node the fewest
bytes that finish its rule. `parsing` follows an output through the nodes.

Character classes, regexes and tag dispatchers are translated by xgrammar itself,
each in a small grammar of its own whose automaton is read. The automaton of the
whole grammar is not: its serialised form is quadratic in the number of rules.
"""

import heapq
import json
import re
from functools import cache
from typing import Any, NamedTuple

import xgrammar

# Kinds of expressions in xgrammar's serialised rules.
_BYTES, _CLASS, _CLASS_STAR, _EMPTY, _RULE, _SEQUENCE, _CHOICES = range(7)
_TAG_DISPATCH, _REPEAT, _REGEX = 7, 8, 12
# Kinds of edges in its automata. Other edges begin with the lowest byte.
_TO_NODE, _TO_RULE, _TO_REPEAT = -1, -2, -4

# More optional repetitions are read as any number of them: the matcher counts.
_MAX_OPTIONAL = 4096
_MAX_NODES = 200_000
_ESCAPE = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|.)")
# What the shortest text takes from a class, best first: in most classes, legible.
_PREFERRED = b"0a" + bytes(range(32, 127))

UNREACHABLE = 1 << 40


class Unsupported(ValueError):
    """A grammar that is too large, or has elements that are no bytes."""


class Edges(NamedTuple):
    """What leaves a node."""

    bytes: list[tuple[int, int, int]]  # lowest byte, highest byte, target
    # First node of a class, target: one character. Read in place, without a call.
    classes: list[tuple[int, int]]
    calls: list[tuple[int, int]]  # first node of a rule, node to return to
    jumps: list[int]


class Hop(NamedTuple):
    """First hop of the shortest way to the end of a rule."""

    byte: int | None  # the byte it reads, None if it reads none
    inner: int | None  # first node of the class or rule to finish before `target`
    target: int


class Network:
    """Nodes and edges of a compiled grammar.

    `edges`, `distance` (fewest bytes to the end of the rule, `UNREACHABLE` if none)
    and `shortest` (the way there) are indexed by node. `ends` holds the last node of
    every rule, `root` is the first node of the whole. Limits that a rule may have
    beside its text (Lark's `max_tokens`, `lazy`) are left to the matcher.

    Raises:
        Unsupported: the grammar is too large, or has elements that are no bytes.

    """

    def __init__(self, grammar: xgrammar.Grammar) -> None:
        self.edges: list[Edges] = []
        self.ends: set[int] = set()
        self._fragments: dict[str, int] = {}
        # Printing leaves out the automata, and reading back does not build them.
        text = _ESCAPE.sub(_long_escape, str(grammar))
        source = json.loads(xgrammar.Grammar.from_ebnf(text).serialize_json())
        data: list[int] = source["grammar_expr_data"]
        self._expressions = [
            (data[i], data[i + 2 : i + 2 + data[i + 1]])
            for i in source["grammar_expr_indptr"]
        ]
        self._bodies: list[int] = [rule[1] for rule in source["rules"]]
        self._rules = [self._node() for _ in self._bodies]
        for first, body in zip(self._rules, self._bodies, strict=True):
            self._add(body, first, self._end())
        self.root = self._rules[source["root_rule_id"]]
        self.distance = [UNREACHABLE] * len(self.edges)
        self.shortest: list[Hop | None] = [None] * len(self.edges)
        self._measure()

    def is_last(self, node: int) -> bool:
        """Whether a rule is over at `node`, with nothing that could follow in it."""
        return node in self.ends and not any(self.edges[node])

    def inner_node(self, inner: int, target: int) -> int:
        """A new node, inside a character of a class that leads to `target`."""
        node = self._node()
        self.edges[node].classes.append((inner, target))
        self.distance.append(self.distance[inner] + self.distance[target])
        self.shortest.append(Hop(None, inner, target))
        return node

    def _node(self) -> int:
        if len(self.edges) == _MAX_NODES:
            raise Unsupported(f"the grammar has more than {_MAX_NODES} nodes")
        self.edges.append(Edges([], [], [], []))
        return len(self.edges) - 1

    def _end(self) -> int:
        node = self._node()
        self.ends.add(node)
        return node

    def _add(self, expression: int, node: int, target: int) -> None:
        """Add the ways from `node` to `target` that an expression allows."""
        kind, data = self._expressions[expression]
        edges = self.edges[node]
        if kind == _BYTES:
            for byte in data[:-1]:
                following = self._node()
                self.edges[node].bytes.append((byte, byte, following))
                node = following
            self.edges[node].bytes.append((data[-1], data[-1], target))
        elif kind == _CLASS:
            edges.classes.append((self._class(data), target))
        elif kind == _CLASS_STAR:
            loop = self._node()
            edges.jumps.append(loop)
            self.edges[loop].classes.append((self._class(data), loop))
            self.edges[loop].jumps.append(target)
        elif kind == _EMPTY:
            edges.jumps.append(target)
        elif kind == _RULE:
            edges.calls.append((self._rules[data[0]], target))
        elif kind == _SEQUENCE:
            parts = self._reorder(data)
            for part in parts[:-1]:
                following = self._node()
                self._add(part, node, following)
                node = following
            self._add(parts[-1], node, target)
        elif kind == _CHOICES:
            for choice in data:
                self._add(choice, node, target)
        elif kind == _REPEAT:
            rule, low, high = data
            self._repeat(self._rules[rule], low, high, node, target)
        elif kind == _REGEX:
            in_json, *pattern = data
            flag = ", json_string=true" if in_json else ""
            text = f"root ::= Regex({_quoted(bytes(pattern))}{flag})"
            edges.calls.append((self._fragment(text), target))
        elif kind == _TAG_DISPATCH:
            edges.calls.append((self._tag_dispatch(data), target))
        else:
            raise Unsupported(f"the grammar has an element of kind {kind}")

    def _repeat(self, rule: int, low: int, high: int, node: int, target: int) -> None:
        """`low` to `high` times a rule, -1 for any number."""
        for _ in range(low):
            following = self._node()
            self.edges[node].calls.append((rule, following))
            node = following
        loop = self._node()
        self.edges[node].jumps.append(loop)
        node = loop
        if high < 0 or high - low > _MAX_OPTIONAL:
            self.edges[node].calls.append((rule, node))
            high = low
        for _ in range(low, high):
            following = self._node()
            self.edges[node].calls.append((rule, following))
            self.edges[node].jumps.append(target)
            node = following
        self.edges[node].jumps.append(target)

    def _reorder(self, parts: list[int]) -> list[int]:
        """`x{0,m} x x ...` as `x x ... x{0,m}`, which is the same.

        xgrammar writes a long repetition the first way, and a parse then has as
        many readings as `x` has been read.
        """
        for i, part in enumerate(parts):
            kind, repeat = self._only(part)
            if kind == _RULE:
                kind, repeat = self._only(self._bodies[repeat[0]])
            if kind != _REPEAT:
                continue
            same = [(_RULE, repeat[:1]), self._only(self._bodies[repeat[0]])]
            last = i + 1
            while last < len(parts) and self._expressions[parts[last]] in same:
                last += 1
            return [*parts[:i], *parts[i + 1 : last], part, *parts[last:]]
        return parts

    def _only(self, expression: int) -> tuple[int, list[int]]:
        """An expression without the choices and sequences of one that wrap it."""
        kind, data = self._expressions[expression]
        while kind in (_SEQUENCE, _CHOICES) and len(data) == 1:
            kind, data = self._expressions[data[0]]
        return kind, data

    def _class(self, data: list[int]) -> int:
        """First node of a character class."""
        negated, *bounds = data
        low_high = zip(bounds[::2], bounds[1::2], strict=True)
        ranges = "".join(f"\\U{low:08x}-\\U{high:08x}" for low, high in low_high)
        return self._fragment(f"root ::= [{'^' if negated else ''}{ranges}]")

    def _tag_dispatch(self, data: list[int]) -> int:
        """First node of free text in which tags may begin."""
        *pairs, loop, excludes = data
        parts = []
        for tag, rule in zip(pairs[::2], pairs[1::2], strict=True):
            parts.append(f"({_quoted(bytes(self._expressions[tag][1]))}, rule{rule})")
        parts.append(f"loop_after_dispatch={'true' if loop else 'false'}")
        _, strings = self._expressions[excludes]
        texts = [_quoted(bytes(self._expressions[i][1])) for i in strings]
        parts.append(f"excludes=({', '.join(texts)})")
        called = sorted(set(pairs[1::2]))
        text = f"root ::= TagDispatch({', '.join(parts)})\n"
        text += "".join(f'rule{rule} ::= "x"\n' for rule in called)
        return self._fragment(text)

    def _fragment(self, text: str) -> int:
        """First node of a small grammar; its `rule<i>` are this grammar's rules."""
        if text not in self._fragments:
            self._fragments[text] = self._load(_automaton(text))
        return self._fragments[text]

    def _load(self, source: dict[str, Any]) -> int:
        """Copy an automaton of xgrammar; returns its root's first node."""
        automaton = source["complete_fsm"]
        pointers = automaton["edges"]["indptr_"]
        nodes = [self._node() for _ in pointers[1:]]
        rules = []
        for (name, *_), ((_, first, ends, *_), *_) in zip(
            source["rules"], source["per_rule_fsms"], strict=True
        ):
            known = name.startswith("rule")
            rules.append(self._rules[int(name[4:])] if known else nodes[first])
            self.ends.update(nodes[end] for end in ends)
        for node, start, stop in zip(nodes, pointers[:-1], pointers[1:], strict=True):
            edges = self.edges[node]
            for low, high, to in automaton["edges"]["data_"][start:stop]:
                target = nodes[to]
                if low >= 0:
                    edges.bytes.append((low, high, target))
                elif low == _TO_NODE:
                    edges.jumps.append(target)
                elif low == _TO_RULE:
                    edges.calls.append((rules[high], target))
                elif low == _TO_REPEAT:
                    rule, least, most = automaton["edge_aux_data"][high : high + 3]
                    self._repeat(rules[rule], least, most, node, target)
                else:
                    raise Unsupported(f"the grammar has an edge of kind {low}")
        return rules[source["root_rule_id"]]

    def _measure(self) -> None:
        """Distances and shortest ways, from the ends backwards (Knuth 1977)."""
        ways: list[list[tuple[int, int, Hop]]] = [[] for _ in self.edges]
        for node, edges in enumerate(self.edges):
            for byte, target in _preferred(edges.bytes):
                ways[target].append((node, 1, Hop(byte, None, target)))
            for inner, target in edges.classes + edges.calls:
                hop = Hop(None, inner, target)
                ways[target].append((node, 0, hop))
                ways[inner].append((node, 0, hop))
            for target in edges.jumps:
                ways[target].append((node, 0, Hop(None, None, target)))
        distance = self.distance
        queue = [(0, end) for end in sorted(self.ends)]
        for end in self.ends:
            distance[end] = 0
        done = [False] * len(self.edges)
        while queue:
            _, reached = heapq.heappop(queue)
            if done[reached]:
                continue
            done[reached] = True
            for node, cost, hop in ways[reached]:
                # Until both of its parts are measured, this sum is unreachable.
                inner = 0 if hop.inner is None else distance[hop.inner]
                total = cost + distance[hop.target] + inner
                if total < distance[node]:
                    distance[node] = total
                    self.shortest[node] = hop
                    heapq.heappush(queue, (total, node))


def _preferred(edges: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """One byte for every edge with its target, the preferred ones first."""
    ranked = []
    for low, high, target in edges:
        wide = low < high
        liked = (i for i, byte in enumerate(_PREFERRED) if wide and low <= byte <= high)
        rank = next(liked, len(_PREFERRED))
        byte = _PREFERRED[rank] if rank < len(_PREFERRED) else low
        ranked.append((rank, byte, target))
    return [(byte, target) for _, byte, target in sorted(ranked)]


def _long_escape(match: re.Match[str]) -> str:
    """An escape that a hexadecimal digit may follow: xgrammar prints shorter ones."""
    digits = match[1][1:]
    return f"\\U{int(digits, 16):08x}" if digits else match[0]


def _quoted(text: bytes) -> str:
    """A string of xgrammar's EBNF."""
    return '"' + "".join(f"\\U{ord(char):08x}" for char in text.decode()) + '"'


@cache
def _compiler() -> xgrammar.GrammarCompiler:
    # A vocabulary of one token: only the automaton is wanted, no token masks.
    kind = xgrammar.VocabType.RAW
    info = xgrammar.TokenizerInfo([b""], kind, vocab_size=1, stop_token_ids=[0])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def _automaton(text: str) -> dict[str, Any]:
    """The serialised automaton of a small grammar."""
    compiled = _compiler().compile_grammar(text)
    source: dict[str, Any] = json.loads(compiled.grammar.serialize_json())
    return source
