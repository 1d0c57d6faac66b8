# SPDX-License-Identifier: Apache-2.0
"""Serve the demo model with vLLM and extract a few unseen records to JSON.

Starts `vllm serve` on a free local port and asks it through OpenAI's client at
temperature 0. Exit status 0 means that at most one record was wrong.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from openai import APIConnectionError, DefaultHttpxClient, OpenAI

DEMO = Path(__file__).resolve().parent / "demo_model"
SETTINGS = (
    "--dtype=bfloat16",
    "--max-model-len=512",
    f"--kv-cache-memory-bytes={128 << 20}",
    # Starts at once; otherwise vLLM compiles the forward pass first.
    "--enforce-eager",
    "--served-model-name=demo",
)


@contextlib.contextmanager
def serve(model: Path) -> Iterator[str]:
    """Run the server; yields its address when it is ready, and always stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm_unmask", "serve", str(model), *SETTINGS]
    command += ["--host=127.0.0.1", f"--port={port}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # The caller's own: a key would lock us out, a path could hide our packages.
    for name in ("VLLM_API_KEY", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    # `python -m` imports from the current folder first, so that is an empty one.
    with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile() as log:
        streams = {"stdout": log, "stderr": subprocess.STDOUT}
        # A group of its own: vLLM starts more processes, and all must end.
        server = subprocess.Popen(
            command, cwd=empty, env=environment, start_new_session=True, **streams
        )
        try:
            yield wait_until_ready(server, f"http://127.0.0.1:{port}")
        except Exception as error:
            log.seek(0)
            tail = log.read().decode(errors="replace").splitlines()[-60:]
            sys.exit("\n".join([*tail, "", f"quickstart: {error!r}; the log is above"]))
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(20)


def wait_until_ready(server: subprocess.Popen[bytes], address: str) -> str:
    for _ in range(1200):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with status {server.returncode}")
        # Refused until the server listens.
        with contextlib.suppress(APIConnectionError), connect(address) as client:
            client.models.list()
            return address
        time.sleep(0.5)
    raise RuntimeError("the server did not answer within 10 minutes")


def connect(address: str) -> OpenAI:
    """OpenAI's client of this server, past any proxy."""
    http = DefaultHttpxClient(trust_env=False, timeout=120)
    return OpenAI(
        base_url=f"{address}/v1", api_key="none", max_retries=0, http_client=http
    )


def extract(client: OpenAI, prompt: str) -> tuple[str, int]:
    """The model's answer and its length in tokens."""
    messages = [{"role": "user", "content": prompt}]
    answer = client.chat.completions.create(
        model="demo", messages=messages, temperature=0, max_tokens=128
    )
    return answer.choices[0].message.content, answer.usage.completion_tokens


def denoising_steps(address: str) -> float:
    """Forward passes of all requests so far, without those over their prompts."""
    with DefaultHttpxClient(trust_env=False) as client:
        lines = client.get(f"{address}/metrics").text.splitlines()
    name = "vllm:diffusion_num_denoising_steps_total{"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def show(address: str, records: list[dict[str, str]]) -> int:
    """Extract the records, all at once; returns how many are wrong."""
    prompts = [record["prompt"] for record in records]
    with connect(address) as client, ThreadPoolExecutor(len(records)) as pool:
        # The first request pays for what the engine prepares only once.
        extract(client, prompts[0])
        steps, start = denoising_steps(address), time.perf_counter()
        answers = list(pool.map(lambda prompt: extract(client, prompt), prompts))
        seconds = time.perf_counter() - start
        steps = denoising_steps(address) - steps
    right = 0
    for (text, _), record in zip(answers, records, strict=True):
        right += text == record["answer"]
        verdict = "right" if text == record["answer"] else f"not {record['answer']}"
        sys.stdout.write(f"\n{record['prompt']}\n  {text}\n  {verdict}\n")
    tokens = sum(count for _, count in answers)
    sys.stdout.write(
        f"\n{right} of {len(records)} right, {len(records)} requests at a time\n"
        f"{tokens / steps:.2f} tokens per forward pass ({tokens} / {steps:.0f})\n"
        f"{tokens / seconds:.0f} tokens per second\n"
    )
    return len(records) - right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO / "sdar32")
    parser.add_argument("--records", type=int, default=6, help="how many (default 6)")
    args = parser.parse_args()
    # So that ending this script ends the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with (DEMO / "held_out.jsonl").open(encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    # Training never saw their names, items and values.
    records = [e for e in examples if e["task"] == "json"][: args.records]
    sys.stdout.write("starting `vllm serve` with the demo model ...\n")
    sys.stdout.flush()
    with serve(args.model.resolve()) as address:
        wrong = show(address, records)
    return 0 if wrong <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
