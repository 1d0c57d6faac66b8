# SPDX-License-Identifier: Apache-2.0
"""Train the filter of the strategy `learned` on the demo model's own traces.

Learn2PD: a small network reads the confidences of a whole block and says which
candidates are final. The target is what careful decoding, one position a step, ends
with; its steps are the inputs. The prompts are fresh ones from the training side of
the split, so none is held out.
"""

import argparse
import logging
import random
from pathlib import Path
from typing import NamedTuple

import torch
from batches import encode_example
from checkpoint import load
from decode import decode_blocks
from tasks import make_example
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoTokenizer

from vllm_unmask.decoding.learned import Filter, accept_learned, save_filter

logger = logging.getLogger("train_filter")

HIDDEN = 32
THRESHOLD = 0.96  # the strategy's default


class Traces(NamedTuple):
    """Denoising steps of blocks."""

    confidence: Tensor  # float32 [steps, block], probability of each candidate
    masked: Tensor  # bool [steps, block]
    final: Tensor  # bool [steps, block], the candidate is what the block ends with


class Recorder:
    """Stands for the model in `decode_blocks` of one prompt, keeps what it saw.

    Args:
        model: takes tokens, positions, masks and rows like `DemoModel`.
        mask: the mask token, never a candidate.
    """

    def __init__(self, model, mask: int):
        self.model = model
        self.mask = mask
        # Where a block starts -> confidence, tokens and candidates of its steps.
        self.steps: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}

    def __call__(self, tokens: Tensor, positions: Tensor, masks, rows: Tensor):
        logits = self.model(tokens, positions, masks, rows=rows)
        scores = logits.float().clone()
        scores[:, self.mask] = float("-inf")
        confidence, best = scores.softmax(-1).max(-1)
        block = self.steps.setdefault(int(positions[rows][0]), [])
        block.append((confidence, tokens[rows], best))
        return logits

    def traces(self) -> Traces:
        """All steps; the last one of each block completes it."""
        parts = []
        for block in self.steps.values():
            confidence, inside, best = map(torch.stack, zip(*block, strict=True))
            masked = inside == self.mask
            last = torch.where(masked[-1], best[-1], inside[-1])
            parts.append(Traces(confidence, masked, best == last))
        return joined(parts)


def joined(parts: list[Traces]) -> Traces:
    return Traces(*map(torch.cat, zip(*parts, strict=True)))


def collect(model, prompts: list[list[int]], mask: int, stop: int) -> Traces:
    """Traces of careful decoding of token prompts, blocks of 8."""
    parts = []
    # One at a time: dense steps cost what they compute, and nothing is padded.
    for prompt in prompts:
        recorder = Recorder(model, mask)
        decode_blocks(recorder, [prompt], mask, stop)
        parts.append(recorder.traces())
    return joined(parts)


def loss_of(network: nn.Module, traces: Traces) -> Tensor:
    """Binary cross entropy over the masked positions."""
    logits = network(traces.confidence)
    return F.binary_cross_entropy_with_logits(
        logits[traces.masked], traces.final[traces.masked].float()
    )


def fit(traces: Traces, hidden: int, epochs: int, seed: int, batch: int = 512):
    """A network of two layers, [steps, block] to logits [steps, block]."""
    torch.manual_seed(seed)
    block = traces.confidence.shape[1]
    network = nn.Sequential(
        nn.Linear(block, hidden), nn.ReLU(), nn.Linear(hidden, block)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    updates = epochs * -(-len(traces.masked) // batch)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(epochs):
        for index in torch.randperm(len(traces.masked)).split(batch):
            optimizer.zero_grad()
            loss_of(network, Traces(*(tensor[index] for tensor in traces))).backward()
            optimizer.step()
            decay.step()
    return network


def filter_of(network: nn.Sequential) -> Filter:
    """The network's weights under the names that the engine reads."""
    return Filter(*(parameter.detach() for parameter in network.parameters()))


def precision_and_recall(
    filter: Filter, traces: Traces, threshold: float
) -> tuple[float, float]:
    """Of the accepted positions those final, of the final ones those accepted."""
    thresholds = torch.full((len(traces.masked),), threshold)
    accepted = accept_learned(traces.confidence, traces.masked, filter, thresholds)
    hits = int((accepted & traces.final).sum())
    final = int((traces.masked & traces.final).sum())
    return hits / max(int(accepted.sum()), 1), hits / max(final, 1)


def main() -> None:
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="exported diffusion model")
    parser.add_argument(
        "--out", type=Path, default=here / "sdar" / "unmask" / "filter.safetensors"
    )
    parser.add_argument("--examples", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    model, _ = load(args.folder)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    rng = random.Random(f"filter/{args.seed}")
    examples = [make_example(rng) for _ in range(args.examples)]
    prompts = [encode_example(tokenizer, e.prompt, e.answer)[0] for e in examples]
    cut = args.examples * 4 // 5
    parts = [
        collect(model, part, tokenizer.mask_token_id, tokenizer.eos_token_id)
        for part in (prompts[:cut], prompts[cut:])
    ]
    for name, part in zip(("training", "validation"), parts, strict=True):
        count, share = int(part.masked.sum()), part.final[part.masked].float().mean()
        logger.info(
            "%s: %d steps, %d masked positions, %.3f of them final",
            *(name, len(part.masked), count, share),
        )
    network = fit(parts[0], args.hidden, args.epochs, args.seed)
    with torch.no_grad():
        losses = [float(loss_of(network, part)) for part in parts]
    logger.info("loss: training %.4f, validation %.4f", *losses)
    filter = filter_of(network)
    scores = precision_and_recall(filter, parts[1], THRESHOLD)
    logger.info("validation at %.2f: precision %.4f, recall %.4f", THRESHOLD, *scores)
    args.out.parent.mkdir(exist_ok=True)
    save_filter(args.out, filter)


if __name__ == "__main__":
    main()
