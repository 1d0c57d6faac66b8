# SPDX-License-Identifier: Apache-2.0
"""Block decoding as SDAR publishes it: a plain torch loop over transformers' model.

One prompt at a time. The prompt's whole blocks fill a KV cache; then each block is
denoised by forwards that leave the cache as it is, and forwarded once more when it is
complete, which stores its keys and values (`block_diffusion_generate` of SDAR's
`generate.py`). Greedy, with the dynamic threshold. The demo model has the layers and
the weight names of Qwen3, which is what transformers runs here.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch
from closed_loop import MAX_TOKENS, Measurement, Output, versions


class TorchLoop:
    """Inside a process of its own; the counterpart of `closed_loop.Loop`."""

    def __init__(self, options: dict[str, Any]) -> None:
        from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

        folder = Path(options["model"])
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.block = config["block_size"]
        self.mask_id = config["mask_token_id"]
        self.stop_id = config["eos_token_id"]
        config["model_type"] = "qwen3"
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen3ForCausalLM.from_pretrained(
            folder,
            config=Qwen3Config(**config),
            dtype=getattr(torch, options["dtype"]),
            attn_implementation="sdpa",
        ).eval()

    def describe(self) -> dict[str, Any]:
        """What this loop really is."""
        return {
            "architecture": type(self.model).__name__,
            "processes": "one",
            "device": self.model.device.type,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "versions": versions(),
        }

    def measure(
        self, prompts: list[str], concurrency: int, extra_args: dict[str, Any] | None
    ) -> Measurement:
        """Answer every prompt, one after the other whatever ``concurrency`` says."""
        threshold = (extra_args or {})["unmask_threshold"]
        encoded = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_dict=False,
            )
            for prompt in prompts
        ]
        steps = forwards = rows = 0
        outputs = []
        start = time.perf_counter()
        for ids in encoded:
            tokens, counted = self._answer(ids, threshold)
            steps += counted[0] + counted[1] + 1
            forwards += counted[0]
            rows += (counted[0] + counted[1]) * self.block
            stopped = tokens[-1] == self.stop_id
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            outputs.append(Output(text if stopped else "", len(tokens)))
        return Measurement(time.perf_counter() - start, steps, forwards, rows, outputs)

    @torch.inference_mode()
    def _answer(
        self, prompt: list[int], threshold: float
    ) -> tuple[list[int], tuple[int, int]]:
        """Output tokens; forwards that denoise, and that store a complete block."""
        from transformers import DynamicCache

        block, mask_id = self.block, self.mask_id
        end = -(-(len(prompt) + MAX_TOKENS) // block) * block
        ids = torch.full((1, end), mask_id)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        cache = DynamicCache(config=self.model.config)
        begin = len(prompt) // block * block
        if begin:
            of_block = torch.arange(begin) // block
            seen = of_block[:, None] >= of_block
            self._forward(ids[:, :begin], 0, cache, seen[None, None])
        denoised = stored = 0
        for start in range(begin, end, block):
            canvas = ids[:, start : start + block]
            while (masked := canvas == mask_id).any():
                logits = self._forward(canvas, start, cache, None).float()
                cache.crop(-block)
                logits[..., mask_id] = -torch.inf
                confidence, best = logits.softmax(-1).max(-1)
                confidence = confidence.masked_fill(~masked, -1.0)
                accepted = confidence > threshold
                accepted[0, confidence.argmax()] = True
                canvas.copy_(torch.where(accepted, best, canvas))
                denoised += 1
            new = canvas[0, max(len(prompt) - start, 0) :]
            if (new == self.stop_id).any():
                break
            self._forward(canvas, start, cache, None)
            stored += 1
        output = ids[0, len(prompt) : start + block].tolist()
        if self.stop_id in output:
            output = output[: output.index(self.stop_id) + 1]
        return output[:MAX_TOKENS], (denoised, stored)

    def _forward(
        self, ids: torch.Tensor, start: int, cache: Any, seen: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [1, rows, vocab]; ``seen`` None: rows see the cache and each other."""
        rows = ids.shape[1]
        if seen is None:
            seen = torch.ones(1, 1, rows, start + rows, dtype=torch.bool)
        return self.model(
            input_ids=ids,
            position_ids=torch.arange(start, start + rows)[None],
            attention_mask=seen,
            past_key_values=cache,
            use_cache=True,
        ).logits
