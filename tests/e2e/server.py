# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in processes of its own, as a user starts it."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import openai
import requests

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # On a busy machine a pause passes for idleness, and the server hangs up in the
    # moment in which the client, which must not try again, sends its next request.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
    # Other tests run beside it, whose threads and its own would wait for each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def _end_with_parent() -> None:
    """Without this, a test run that is killed leaves its server behind."""
    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


class Server:
    """Serves `model` until closed; `client` is OpenAI's own."""

    NAME = "served"

    def __init__(
        self, model: Path, *arguments: str, log: Path, timeout: float = 600
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        with log.open("wb") as stream:
            # A session of its own: vLLM starts more processes, and all must end.
            self._process = subprocess.Popen(
                [
                    *(*VLLM, "serve", str(model), "--plugin", "unmask"),
                    *("--host", "127.0.0.1", "--port", str(port)),
                    *("--served-model-name", self.NAME, "--disable-uvicorn-access-log"),
                    # Compiling takes as long as all the tests.
                    "--enforce-eager",
                    *arguments,
                ],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | QUIET,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )
        try:
            self._wait(timeout)
        except BaseException:
            self.close()
            raise

    def _wait(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended:\n{self.log_tail()}")
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{self.url}/health", timeout=10).ok:
                    return
            time.sleep(0.2)
        raise RuntimeError(f"no server after {timeout} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 80) -> str:
        """The end of what the server wrote."""
        text = self.log.read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over the series that carry these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        total = None
        for line in requests.get(f"{self.url}/metrics", timeout=30).text.splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == name and all(w in series for w in wanted):
                total = (total or 0.0) + float(value)
        if total is None:
            raise KeyError(name)
        return total

    def post(self, path: str, body: str) -> requests.Response:
        """Send what OpenAI's client would refuse to send."""
        return requests.post(
            f"{self.url}{path}",
            data=body,
            headers={"Content-Type": "application/json"},
            timeout=120,
        )

    def close(self) -> None:
        """End every process of the server."""
        self.client.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The group outlives its leader while a worker does.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(20)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.close()
