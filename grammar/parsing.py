# SPDX-License-Identifier: Apache-2.0
"""Following an output through a grammar's network, and how far its end is.

A generalised LL parse: every way to read the bytes is followed, ways that are in the
same rule since the same byte share its frame, so that ambiguous and left-recursive
grammars are followed too. The distance to the end is a sum along the open rules.
"""

from typing import NamedTuple, TypeAlias

import xgrammar

from vllm_unmask.grammar.network import UNREACHABLE, Network

# Calls followed for one byte. Only a grammar of optional parts in long repetition has
# more; its parse is then lost, and the output ends by the witness that it has.
_MAX_WORK = 5_000

# Parses and texts that one memo holds, at some 500 bytes each.
_MAX_MEMO = 50_000

# A node that reads a byte, and where its rule returns to.
Configuration: TypeAlias = "tuple[int, Frame]"


class Frame:
    """An open rule: the nodes that it returns to, in the frames of its callers."""

    __slots__ = ("cost", "nearest", "parents")

    def __init__(self) -> None:
        self.parents: dict[Configuration, None] = {}
        self.nearest: Configuration | None = None  # parent on the shortest way
        self.cost = UNREACHABLE  # fewest bytes from there to the output's end


class Parse:
    """Every way to read an output. Immutable but for its memo of what follows."""

    __slots__ = ("complete", "configurations", "distance", "following", "witness")

    def __init__(
        self, configurations: tuple[Configuration, ...], complete: bool, distance: int
    ) -> None:
        self.configurations = configurations  # empty if no byte may follow
        self.complete = complete  # the output may end here
        self.distance = distance  # fewest bytes to its end, or >= UNREACHABLE
        # By a byte, and by the text of a token: most are followed many times.
        self.following: dict[int | bytes, Parse | None] = {}
        self.witness: tuple[int, ...] | None = None  # see `Closer.witness`


class _Closure(NamedTuple):
    """What is reached from a node within its rule without reading a byte."""

    readers: tuple[int, ...]  # nodes that read a byte
    calls: tuple[tuple[int, int], ...]  # first node of a rule, node to return to
    ends: bool  # the rule may end


class Parser:
    """Parses outputs of one grammar. Not to be used by two threads at a time.

    Raises:
        Unsupported: see `Network`.

    """

    def __init__(self, grammar: xgrammar.Grammar) -> None:
        self._network = Network(grammar)
        self._closures: dict[int, _Closure] = {}
        self._targets: dict[tuple[int, int], tuple[int, ...]] = {}
        self._inner: dict[tuple[int, int], int] = {}
        self._root: Parse | None = None
        self._memo_size = 0

    @property
    def shortest_bytes(self) -> set[int]:
        """Bytes that any of the shortest completions may hold."""
        hops = (hop for hop in self._network.shortest if hop is not None)
        return {hop.byte for hop in hops if hop.byte is not None}

    def start(self) -> Parse:
        """The parse of the empty output.

        Outputs share it, and by its memo all that they have in common, until the
        memo is full; the next ones then begin a new one.
        """
        if self._root is None or self._memo_size > _MAX_MEMO:
            whole = Frame()
            whole.cost = 0
            self._root = self._expand([(self._network.root, whole)])
            self._memo_size = 0
        return self._root

    def advance(self, parse: Parse, text: bytes) -> Parse | None:
        """The parse after more bytes, None if they cannot follow."""
        if text in parse.following:
            return parse.following[text]
        current: Parse | None = parse
        for byte in text:
            if current is None:
                break
            if byte not in current.following:
                current.following[byte] = self._read(current, byte)
            current = current.following[byte]
        parse.following[text] = current
        self._memo_size += 1
        return current

    def shortest(self, parse: Parse) -> bytes:
        """The fewest bytes that complete an output; `distance` must be finite."""
        text = bytearray()
        if parse.complete:
            return b""
        network = self._network
        distance = network.distance
        node, frame = min(
            parse.configurations, key=lambda c: distance[c[0]] + c[1].cost
        )
        returns: list[int] = []
        while True:
            hop = network.shortest[node]
            if hop is not None:
                if hop.byte is not None:
                    text.append(hop.byte)
                if hop.inner is not None:
                    returns.append(hop.target)
                node = hop.target if hop.inner is None else hop.inner
            elif returns:
                node = returns.pop()
            elif frame.nearest is not None:
                node, frame = frame.nearest
            else:
                return bytes(text)

    def _read(self, parse: Parse, byte: int) -> Parse | None:
        reached = [
            (target, frame)
            for node, frame in parse.configurations
            for target in self._scan(node, byte)
        ]
        if not reached:
            return None
        self._memo_size += 1
        following = self._expand(reached)
        # Inside a string every byte leads back to the same parse: its memo serves.
        same = following.configurations == parse.configurations
        return parse if same and following.complete == parse.complete else following

    def _scan(self, node: int, byte: int) -> tuple[int, ...]:
        """Nodes that a byte leads to."""
        key = (node, byte)
        if key not in self._targets:
            edges = self._network.edges[node]
            targets = [to for low, high, to in edges.bytes if low <= byte <= high]
            for inner, target in edges.classes:
                for to in self._scan(inner, byte):
                    last = to in self._network.ends
                    targets.append(target if last else self._inner_node(to, target))
            self._targets[key] = tuple(targets)
        return self._targets[key]

    def _inner_node(self, inner: int, target: int) -> int:
        key = (inner, target)
        if key not in self._inner:
            self._inner[key] = self._network.inner_node(inner, target)
        return self._inner[key]

    def _closure(self, node: int) -> _Closure:
        known = self._closures.get(node)
        if known is not None:
            return known
        network = self._network
        seen = {node}
        pending = [node]
        readers, calls = [], []
        while pending:
            at = pending.pop()
            edges = network.edges[at]
            if edges.bytes or edges.classes:
                readers.append(at)
            following = list(edges.jumps)
            for first, back in edges.calls:
                # A rule called last returns to where its caller does, so right
                # recursion opens no frame.
                if network.is_last(back):
                    following.append(first)
                    continue
                calls.append((first, back))
                if network.distance[first] == 0:
                    following.append(back)
            pending += [to for to in following if to not in seen]
            seen.update(following)
        ends = not network.ends.isdisjoint(seen)
        closure = _Closure(tuple(readers), tuple(calls), ends)
        self._closures[node] = closure
        return closure

    def _expand(self, reached: list[Configuration]) -> Parse:
        """Open and close rules until every way stands before a byte."""
        distance = self._network.distance
        if len(reached) == 1:
            ((node, frame),) = reached
            closure = self._closure(node)
            # Nothing opens or closes within a word of the grammar.
            if len(closure.readers) == 1 and not closure.calls and not closure.ends:
                cost = distance[closure.readers[0]] + frame.cost
                return Parse(((closure.readers[0], frame),), False, cost)
        complete = False
        opened: dict[int, Frame] = {}
        readers: dict[Configuration, None] = {}
        seen = set(reached)
        work = 0
        while reached and work < _MAX_WORK:
            node, frame = reached.pop()
            closure = self._closure(node)
            for reader in closure.readers:
                readers[reader, frame] = None
            for first, back in closure.calls:
                callee = opened.get(first)
                if callee is None:
                    callee = opened[first] = Frame()
                    reached.append((first, callee))
                callee.parents[back, frame] = None
                work += 1
            # A rule opened just now has ended without a byte: its callers' closures
            # went past it already.
            if closure.ends and frame.cost < UNREACHABLE:
                complete |= frame.nearest is None
                reached += [parent for parent in frame.parents if parent not in seen]
                seen.update(frame.parents)
        if work >= _MAX_WORK:
            return Parse((), False, UNREACHABLE)
        improved = bool(opened)
        while improved:
            improved = False
            for frame in opened.values():
                for parent in frame.parents:
                    cost = distance[parent[0]] + parent[1].cost
                    if cost < frame.cost:
                        frame.cost, frame.nearest = cost, parent
                        improved = True
        costs = [0] * complete + [distance[n] + f.cost for n, f in readers]
        return Parse(tuple(readers), complete, min(costs, default=UNREACHABLE))
