# SPDX-License-Identifier: Apache-2.0
"""Temperature scaling of an exported diffusion model (Guo et al. 2017).

The confidence threshold selects the positions where the model is surest, and among
those it is surer than it is right. One temperature, chosen on fresh examples from
the training side of the split, mends that; it is folded into the last norm, so the
most likely token of a position stays what it was.
"""

import argparse
import logging
import random
from pathlib import Path

import torch
from checkpoint import load
from evaluate import evaluate, summarize
from safetensors.torch import load_file, save_file
from tasks import make_example
from transformers import AutoTokenizer

logger = logging.getLogger("calibrate")

TEMPERATURES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
NORM = "model.norm.weight"


def exact(
    model, tokenizer, examples, threshold: float | None, block: int
) -> tuple[float, float]:
    """Exact match and tokens per forward."""
    results = evaluate(model, tokenizer, examples, threshold, block, 32)
    _, right, _, pooled = summarize(results)["json"]
    return right, pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="exported model, changed in place")
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument(
        "--loss", type=float, default=0.005, help="exact match given up at most"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    model, block = load(args.folder)
    if block is None:
        parser.error(f"{args.folder} is the twin: a threshold is not for it")
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    rng = random.Random("calibrate")
    examples = [
        {"task": e.task, "prompt": e.prompt, "answer": e.answer}
        for e in (make_example(rng, task="json") for _ in range(args.examples))
    ]
    careful, _ = exact(model, tokenizer, examples, None, block)
    logger.info("one token a step: %.3f", careful)
    norm = model.model.norm.weight
    original = norm.detach().clone()
    for temperature in TEMPERATURES:
        with torch.no_grad():
            norm.copy_(original / temperature)
        right, per_forward = exact(model, tokenizer, examples, args.threshold, block)
        logger.info("temperature %.2f: %.3f, %.2f", temperature, right, per_forward)
        if right >= careful - args.loss:
            break
    path = args.folder / "model.safetensors"
    weights = load_file(path)
    weights[NORM] = (original / temperature).to(weights[NORM].dtype)
    save_file(weights, path, metadata={"format": "pt"})
    logger.info("wrote temperature %.2f", temperature)


if __name__ == "__main__":
    main()
