# SPDX-License-Identifier: Apache-2.0
"""Train the block-diffusion demo model, or with --ar its autoregressive twin.

The budget is process CPU time, so that a busy machine changes the wall time and not
the result. The learning rate follows the spent share of the budget: warm-up, plateau,
long linear decay. A run continues from its checkpoint with --resume. Workers are
processes that average their gradients once a step, which suits few busy cores better
than threads that meet in every operation.
"""

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from batches import (
    BLOCK_SHARES,
    COPIES,
    bucketed,
    causal_batch,
    diffusion_batch,
    pool_of_pairs,
)
from checkpoint import load
from model import DemoModel, ModelConfig
from torch.nn import functional as F
from transformers import AutoTokenizer

logger = logging.getLogger("train")

WARM_UP = 0.02
DECAY_FROM = 0.35


def rate(spent: float) -> float:
    """Learning-rate factor for the spent share of the budget, 0 to 1."""
    if spent < WARM_UP:
        return max(spent / WARM_UP, 0.05)
    if spent < DECAY_FROM:
        return 1.0
    return max((1.0 - spent) / (1.0 - DECAY_FROM), 0.0)


def make_optimizers(model: DemoModel, lr: float):
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    inner = [p for p in model.model.layers.parameters() if p.dim() == 2]
    inner_ids = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in inner_ids]
    muon = torch.optim.Muon(
        inner, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adam]


class Run:
    """A training run: model, optimizers and where the data stream stands."""

    def __init__(self, args: argparse.Namespace, rank: int = 0):
        self.args = args
        self.rank = rank
        self.tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        self.noise = torch.Generator().manual_seed(args.seed + 1000 * rank)
        torch.manual_seed(args.seed)
        config = ModelConfig(
            hidden_size=args.hidden,
            num_hidden_layers=args.layers,
            intermediate_size=args.ffn,
        )
        self.model = DemoModel(config)
        self.optimizers = make_optimizers(self.model, args.lr)
        self.step = self.sequences = self.pool = self.in_pool = 0
        self.before = 0.0  # CPU seconds of earlier sessions, all workers
        self.now = 0.0  # CPU seconds of this session, all workers, at the last step

    def cpu_seconds(self) -> float:
        return self.before + self.now

    def save(self, path: Path) -> None:
        state = {
            "config": self.model.config.to_dict(),
            "ar": self.args.ar,
            "block_size": self.args.block_size,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "noise": self.noise.get_state(),
            "step": self.step,
            "sequences": self.sequences,
            "pool": self.pool,
            "in_pool": self.in_pool,
            "cpu_seconds": self.cpu_seconds(),
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.rank == 0:
            self.noise.set_state(state["noise"])
        else:
            self.noise.manual_seed(1000 * self.rank + state["step"])
        self.step, self.sequences = state["step"], state["sequences"]
        self.pool, self.in_pool = state["pool"], state["in_pool"]
        self.before = state["cpu_seconds"]

    def batches(self):
        """Endless batches, continuing where the data stream stands."""
        args, tokenizer = self.args, self.tokenizer
        copies = 0 if args.ar else COPIES
        while True:
            index = self.pool * args.workers + self.rank
            pairs = pool_of_pairs(tokenizer, args.seed, index)
            groups = bucketed(pairs, args.rows, self.pool, copies)
            for group in groups[self.in_pool :]:
                self.in_pool += 1
                if args.ar:
                    yield causal_batch(group, tokenizer.eos_token_id)
                else:
                    yield diffusion_batch(
                        group,
                        tokenizer.eos_token_id,
                        tokenizer.mask_token_id,
                        self.noise,
                        args.block_size,
                    )
            self.pool, self.in_pool = self.pool + 1, 0

    def _share(self, loss: float, count: int) -> tuple[float, int]:
        """Average gradients and loss, add sequences and CPU time over the workers."""
        mine = torch.tensor([loss, float(count), time.process_time()])
        if self.args.workers > 1:
            parameters = list(self.model.parameters())
            flat = torch.cat([p.grad.flatten() for p in parameters] + [mine])
            dist.all_reduce(flat)
            flat /= self.args.workers
            start = 0
            for p in parameters:
                p.grad.copy_(flat[start : start + p.numel()].view_as(p))
                start += p.numel()
            mine = flat[-3:] * torch.tensor([1.0, *[self.args.workers] * 2])
        loss, total, self.now = mine.tolist()
        return loss, round(total)

    def train_step(self, batch, spent: float) -> float:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * rate(spent)
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(
                batch.tokens, batch.positions, batch.masks, rows=batch.rows
            )
        loss = F.cross_entropy(logits.float(), batch.targets)
        loss.backward()
        loss, count = self._share(loss.item(), batch.count)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.sequences += count
        return loss


def train(run: Run) -> None:
    args = run.args
    budget = args.minutes * 60
    checkpoint = args.out / "checkpoint.pt"
    losses: list[float] = []
    saved = run.cpu_seconds()
    for batch in run.batches():
        spent = run.cpu_seconds() / budget
        if spent >= 1.0:
            break
        losses.append(run.train_step(batch, spent))
        if run.rank != 0:
            continue
        if run.step % args.log_every == 0:
            line = {
                "cpu_seconds": round(run.cpu_seconds(), 1),
                "step": run.step,
                "sequences": run.sequences,
                "loss": round(sum(losses) / len(losses), 4),
                "rate": round(args.lr * rate(spent), 6),
            }
            losses.clear()
            with (args.out / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            logger.info("%s", line)
        if run.cpu_seconds() - saved > args.save_seconds:
            run.save(checkpoint)
            saved = run.cpu_seconds()
    if run.rank == 0:
        run.save(checkpoint)


def work(rank: int, args: argparse.Namespace, store: str) -> None:
    """Body of one worker."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    if args.workers > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=args.workers
        )
    run = Run(args, rank)
    if args.init:
        # A block-diffusion model learns faster from the twin's weights than from
        # noise: what to copy is the same, only the row that says it moves by one.
        run.model.load_state_dict(load(args.init)[0].state_dict())
    if args.resume:
        run.load(args.out / "checkpoint.pt")
    if rank == 0:
        count = sum(p.numel() for p in run.model.parameters())
        logger.info("%.2fM parameters", count / 1e6)
    train(run)
    if args.workers > 1:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--ar", action="store_true", help="train the twin")
    parser.add_argument(
        "--minutes",
        type=float,
        help="CPU minutes of all workers together; 9 with --ar, else 15",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--threads", type=int, default=1, help="of each worker")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--init", type=Path, help="exported model to take weights from")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SHARES, default=8, help="the largest"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--rows", type=int, default=3500, help="token rows a step")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=512)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--save-seconds", type=float, default=120)
    args = parser.parse_args()
    if args.minutes is None:
        args.minutes = 9.0 if args.ar else 15.0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.workers == 1:
        work(0, args, "")
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(work, args=(args, store), nprocs=args.workers)


if __name__ == "__main__":
    main()
