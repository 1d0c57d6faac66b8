# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in a process of its own, driven by a closed loop of requests.

Several such engines can be measured in turns: one that has nothing to do uses no
core once `SETTLE_SECONDS` have passed.
"""

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

# Twice the longest answer of the held-out set.
MAX_TOKENS = 128
MAX_CONCURRENCY = 16
# vLLM's processes poll for messages for a second after the last one.
SETTLE_SECONDS = 1.2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


class Output(NamedTuple):
    """One finished request."""

    text: str  # empty unless the model ended it
    tokens: int  # up to and including the stop token


class Measurement(NamedTuple):
    """One closed loop: every prompt once, at most ``concurrency`` at a time."""

    seconds: float
    engine_steps: int  # engine steps, one forward pass each
    forwards: int  # request-forwards that yield output; prompts not counted
    rows: int  # rows those forwards computed
    outputs: list[Output]  # in the order of the prompts


def settings(
    model: Path, eager: bool, max_num_seqs: int = MAX_CONCURRENCY
) -> dict[str, Any]:
    """What `LLM` is started with, the same for every model."""
    return {
        "model": str(model),
        "dtype": "bfloat16",
        "enforce_eager": eager,
        "max_model_len": 512,
        "max_num_seqs": max_num_seqs,
        "kv_cache_memory_bytes": 256 << 20,
        # Prompts come again; a second time must cost what the first did.
        "enable_prefix_caching": False,
        "disable_log_stats": False,
    }


class Loop:
    """Inside the engine's process."""

    def __init__(self, options: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(**options)
        self.is_diffusion = self.llm.model_config.is_diffusion
        self.tokenizer = self.llm.get_tokenizer()
        self.num_requests = 0

    def describe(self) -> dict[str, Any]:
        """What this engine really is."""
        config = self.llm.llm_engine.vllm_config
        return {
            "architecture": config.model_config.architecture,
            "unmask_disabled": os.environ.get("UNMASK_DISABLE") == "1",
            "model_runner": "v2" if config.use_v2_model_runner else "v1",
            "enforce_eager": config.model_config.enforce_eager,
            "processes": "vLLM's default" if multiprocessing_on() else "one",
            "device": config.device_config.device_type,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    def measure(
        self, prompts: list[str], concurrency: int, extra_args: dict[str, Any] | None
    ) -> Measurement:
        """Keep ``concurrency`` requests in flight until every prompt is answered."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind

        inputs = [tokens_input(self._encode(prompt)) for prompt in prompts]
        params = SamplingParams(
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_args=extra_args,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine = self.llm.llm_engine
        outputs: dict[int, Output] = {}
        index_of: dict[str, int] = {}
        waiting = iter(enumerate(inputs))
        before = self._counters()
        steps = 0
        start = time.perf_counter()
        while len(outputs) < len(inputs):
            while len(index_of) - len(outputs) < concurrency:
                index, prompt = next(waiting, (None, None))
                if index is None:
                    break
                self.num_requests += 1
                index_of[str(self.num_requests)] = index
                engine.add_request(str(self.num_requests), prompt, params)
            for result in engine.step():
                if result.finished:
                    answer = result.outputs[0]
                    outputs[index_of[result.request_id]] = Output(
                        answer.text if answer.finish_reason == "stop" else "",
                        len(answer.token_ids),
                    )
            # vLLM's own histogram leaves out steps that yield no token. With
            # statistics on, every step of the core is one step here.
            steps += 1
        seconds = time.perf_counter() - start
        after = self._counters()
        forwards, rows = (a - b for a, b in zip(after, before, strict=True))
        ordered = [outputs[index] for index in range(len(inputs))]
        if not self.is_diffusion:
            # One forward of one row for each token, the first one's being the
            # prompt's.
            forwards = rows = sum(output.tokens for output in ordered)
        return Measurement(seconds, steps, forwards, rows, ordered)

    def step_seconds(
        self, prompts: list[str], max_tokens: int, extra_args: dict[str, Any] | None
    ) -> list[float]:
        """Time of each step while all prompts run to ``max_tokens`` together."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args
        )
        engine = self.llm.llm_engine
        for prompt in prompts:
            self.num_requests += 1
            inputs = tokens_input(self._encode(prompt))
            engine.add_request(str(self.num_requests), inputs, params)
        seconds = []
        while engine.has_unfinished_requests():
            start = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _encode(self, prompt: str) -> list[int]:
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=False,
        )

    def _counters(self) -> tuple[int, int]:
        """Denoising steps and their rows so far, over all requests."""
        values = {
            metric.name: getattr(metric, "value", 0)
            for metric in self.llm.get_metrics()
        }
        return (
            values.get("vllm:diffusion_num_denoising_steps", 0),
            values.get("vllm:diffusion_num_canvas_positions", 0),
        )


def versions() -> dict[str, str]:
    """Of what is measured."""
    import platform
    from importlib.metadata import version

    import torch
    import vllm

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "vllm": vllm.__version__,
    }


def multiprocessing_on() -> bool:
    """Whether vLLM's front end, engine core and worker are separate processes."""
    import vllm.envs as envs

    return envs.VLLM_ENABLE_V1_MULTIPROCESSING


def _serve(
    connection: Any,
    loop_type: type,
    options: dict[str, Any],
    environment: dict[str, str],
    log: str,
) -> None:
    # A session of its own, so that `Engine.close` can end all of vLLM's processes.
    os.setsid()
    os.environ.update(environment)
    # vLLM and its libraries write to the descriptors, not to Python's streams.
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        loop = loop_type(options)
        connection.send((True, loop.describe()))
        while (call := connection.recv()) is not None:
            method, arguments = call
            connection.send((True, getattr(loop, method)(*arguments)))
    except EOFError:
        return
    except BaseException:
        connection.send((False, traceback.format_exc()))


class Engine:
    """The handle of the driving process.

    Args:
        options: as `settings` makes them.
        environment: of the process, besides `ENVIRONMENT`.
        log: where what the process prints goes.
        loop_type: `Loop`, or what has its methods.
    """

    def __init__(
        self,
        options: dict[str, Any],
        *,
        environment: dict[str, str],
        log: Path,
        loop_type: type = Loop,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(
                child,
                loop_type,
                options,
                ENVIRONMENT | environment,
                str(log),
            ),
        )
        self._process.start()
        child.close()
        try:
            self.facts: dict[str, Any] = self._receive()
        except BaseException:
            self.close()
            raise

    def _receive(self) -> Any:
        try:
            done, value = self._connection.recv()
        except EOFError:
            raise RuntimeError("the engine's process died") from None
        if not done:
            raise RuntimeError(value)
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the loop in the engine's process."""
        self._connection.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process and those that it started."""
        self._connection.close()
        self._process.join(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
