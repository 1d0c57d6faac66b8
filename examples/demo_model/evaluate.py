# SPDX-License-Identifier: Apache-2.0
"""Score an exported model on the held-out set.

Prints exact matches and tokens per forward by task. Tokens are the committed output
tokens up to and including the stop token; forwards are the denoising forwards of the
request (for the twin: one per token).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from batches import encode_example
from checkpoint import load
from decode import decode_blocks, decode_causal
from tasks import check
from transformers import AutoTokenizer


def evaluate(model, tokenizer, examples, threshold, block: int | None, batch: int):
    """Per example (task, right, tokens, forwards), in the order of ``examples``.

    ``block`` is None for the twin, which has no ``threshold``, either.
    """
    stop, mask = tokenizer.eos_token_id, tokenizer.mask_token_id
    encoded = [encode_example(tokenizer, e["prompt"], e["answer"])[0] for e in examples]
    results: list = [None] * len(examples)
    # Similar lengths together: the dense loop pays for padding.
    order = sorted(range(len(examples)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        prompts = [encoded[i] for i in picked]
        if block is None:
            outputs, forwards = decode_causal(model, prompts, stop)
        else:
            outputs, forwards = decode_blocks(
                model, prompts, mask, stop, threshold, block
            )
        for i, output, count in zip(picked, outputs, forwards, strict=True):
            e = examples[i]
            # An answer that never stops is wrong, whatever it starts with.
            text = tokenizer.decode(output[:-1]) if output[-1] == stop else ""
            right = check(e["task"], e["prompt"], e["answer"], text)
            results[i] = (e["task"], right, len(output), count, text)
    return results


def summarize(results) -> dict:
    """task -> (count, exact share, tokens per forward: mean over requests, pooled)."""
    table = {}
    for task in dict.fromkeys(r[0] for r in results):
        rows = [r for r in results if r[0] == task]
        count = len(rows)
        exact = sum(r[1] for r in rows) / count
        mean = sum(r[2] / r[3] for r in rows) / count
        pooled = sum(r[2] for r in rows) / sum(r[3] for r in rows)
        table[task] = (count, exact, mean, pooled)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    here = Path(__file__).resolve().parent
    parser.add_argument("folder", type=Path, help="exported model, e.g. sdar")
    parser.add_argument("--data", type=Path, default=here / "held_out.jsonl")
    parser.add_argument(
        "--rules",
        nargs="+",
        default=["static", "0.9"],
        help="static (one token a step) or confidence thresholds; not for the twin",
    )
    parser.add_argument("--block", type=int, help="block size; default: the config's")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--task", help="only this task")
    parser.add_argument("--limit", type=int, help="first N examples of every task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--errors", type=int, default=0, help="wrong answers to show")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, block = load(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    with args.data.open(encoding="utf-8") as file:
        examples = [json.loads(line) for line in file]
    if args.task:
        examples = [e for e in examples if e["task"] == args.task]
    if args.limit:
        taken: dict[str, int] = {}
        kept = []
        for e in examples:
            taken[e["task"]] = taken.get(e["task"], 0) + 1
            if taken[e["task"]] <= args.limit:
                kept.append(e)
        examples = kept
    rules = ["static"] if block is None else args.rules
    if block is not None:
        block = args.block or block
    for name in rules:
        threshold = None if name == "static" else float(name)
        results = evaluate(model, tokenizer, examples, threshold, block, args.batch)
        rule = "one token a step" if threshold is None else f"threshold {threshold}"
        sys.stdout.write(f"\n{args.folder.name}, block {block}, {rule}\n")
        sys.stdout.write("task         count  exact  tok/fwd  pooled\n")
        for task, row in summarize(results).items():
            sys.stdout.write("{:12} {:5d} {:6.3f} {:8.2f} {:7.2f}\n".format(task, *row))
        sys.stdout.flush()
        wrong = [(e, r) for e, r in zip(examples, results, strict=True) if not r[1]]
        for e, r in wrong[: args.errors]:
            sys.stdout.write(f"  {e['prompt']}\n    want {e['answer']}\n")
            sys.stdout.write(f"    got  {r[4]}\n")


if __name__ == "__main__":
    main()
