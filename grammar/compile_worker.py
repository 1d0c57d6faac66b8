# SPDX-License-Identifier: Apache-2.0
"""The process that compiles: forks once for every grammar, so that any may fail.

`python -m vllm_unmask.grammar.compile_worker` has a Unix socket as its standard
input. It reads `GrammarLimits` and the vocabulary, answers one byte when it is
ready, and then takes requests: a grammar, with a socket for the answer. A fork with
everything loaded takes milliseconds and compiles one grammar under limits that the
kernel enforces; whatever becomes of it, the next one starts from the same state.
The end of the standard input, and so the death of the parent, ends the process.
"""

import gc
import json
import os
import re
import resource
import signal
import socket
import time
from typing import Any

import xgrammar

from vllm_unmask.grammar.closing import Closer
from vllm_unmask.grammar.loading import compile_spec
from vllm_unmask.grammar.network import Unsupported
from vllm_unmask.grammar.spec import GrammarLimits, GrammarSpec
from vllm_unmask.grammar.vocabulary import Vocabulary

_HEADER = 8  # bytes of a frame's length
# Where in its source xgrammar found an error: of no use to a client.
_ORIGIN = re.compile(r"^\[[\d:]+\] \S+:\d+: (Check failed: \(.*?\) is false: )?")


def send_frame(sock: socket.socket, data: bytes, *fds: int) -> None:
    """Send bytes, with open files beside them."""
    header = len(data).to_bytes(_HEADER, "little")
    socket.send_fds(sock, [header], fds)
    sock.sendall(data)


def receive_frame(sock: socket.socket) -> tuple[bytes, list[int]]:
    """Receive what `send_frame` sent. Blocks.

    Raises:
        EOFError: the other end is closed.

    """
    header, fds, _, _ = socket.recv_fds(sock, _HEADER, 1)
    data = bytearray()
    if len(header) == _HEADER:
        size = int.from_bytes(header, "little")
        while len(data) < size and (part := sock.recv(min(size - len(data), 1 << 20))):
            data += part
        if len(data) == size:
            return bytes(data), fds
    raise EOFError


def answer(
    vocabulary: Vocabulary, spec: GrammarSpec, limits: GrammarLimits
) -> dict[str, Any]:
    """Compile one grammar and find its closing.

    Returns:
        `closing`, `num_bytes` and `seconds` as in `CompiledSpec`, or `reason` and
        `expected` as in `GrammarSpec.refused`.

    """
    started = time.perf_counter()
    vocabulary = vocabulary.of(spec.kind)
    compiler = xgrammar.GrammarCompiler(vocabulary.info, max_threads=1)
    try:
        grammar = compile_spec(compiler, spec)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "bad_alloc" in str(error):
            return _out_of_memory(limits)
        reason = f"cannot be compiled: {_message(error)}"
        return {"reason": reason, "expected": "a valid grammar"}
    try:
        closer = Closer(grammar, vocabulary)
        closing = closer.witness(closer.start())
    except MemoryError:
        return _out_of_memory(limits)
    except (Unsupported, RuntimeError) as error:
        reason = f"cannot be closed: {_message(error)}"
        return {"reason": reason, "expected": "a smaller grammar, of text"}
    if closing is None or not _completes(grammar, closing):
        expected = "a grammar that some text satisfies"
        return {"reason": "cannot be closed by any tokens", "expected": expected}
    if len(closing) > (limit := limits.closing_tokens):
        reason = f"cannot be closed within {limit} tokens"
        return {"reason": reason, "expected": "a grammar of shorter texts"}
    if (num_bytes := grammar.memory_size_bytes) > limits.compiled_bytes:
        expected = f"at most {limits.compiled_bytes}"
        return {"reason": f"compiles to {num_bytes} bytes", "expected": expected}
    seconds = time.perf_counter() - started
    return {"closing": list(closing), "num_bytes": num_bytes, "seconds": seconds}


def _message(error: Exception) -> str:
    """What xgrammar says, without where in its sources, unless that is all."""
    text = str(error).strip()
    return (_ORIGIN.sub("", text).strip() or text)[:500]


def _completes(grammar: xgrammar.CompiledGrammar, tokens: tuple[int, ...]) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return all(map(matcher.accept_token, tokens)) and matcher.is_completed()


def _out_of_memory(limits: GrammarLimits) -> dict[str, Any]:
    """The refusal of a grammar that took too much memory."""
    reason = f"takes more than {limits.compile_memory} bytes to compile"
    return {"reason": reason, "expected": "a smaller grammar"}


def _confine(limits: GrammarLimits) -> None:
    """Put this process under the limits of one compilation."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limits.compile_seconds)
    # Address space is no measure: the libraries map far more than they use.
    with open("/proc/self/statm") as file:
        data = int(file.read().split()[5]) * resource.getpagesize()
    most = data + limits.compile_memory
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A compilation warns of every keyword that it relaxes.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def main() -> None:
    """Serve until the other end of the standard input is closed."""
    os.nice(10)
    requests = socket.socket(fileno=0)
    try:
        limits = GrammarLimits(*json.loads(receive_frame(requests)[0]))
        vocabulary = Vocabulary.loads(receive_frame(requests)[0])
        # Once here, so that what it leaves in memory is there in every fork.
        answer(vocabulary, GrammarSpec("regex", "a"), limits)
        answer(vocabulary, GrammarSpec("json_object", '{"type":"object"}'), limits)
        # Forks are not waited for, and share the pages of what is loaded.
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        gc.freeze()
        requests.sendall(b"+")
        while True:
            request, (fd,) = receive_frame(requests)
            if os.fork() == 0:
                requests.close()
                replies = socket.socket(fileno=fd)
                # Says that it is at work; a blank before JSON means nothing else.
                replies.sendall(b" ")
                _confine(limits)
                spec = GrammarSpec(*json.loads(request))
                reply = answer(vocabulary, spec, limits)
                replies.sendall(json.dumps(reply).encode())
                replies.close()
                os._exit(0)
            os.close(fd)
    except EOFError:
        return


if __name__ == "__main__":
    main()
