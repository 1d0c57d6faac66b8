# SPDX-License-Identifier: Apache-2.0
"""What a decoding step reads of its logits: best token, its lead, entropy, a sample.

Rows of different requests, each under its own parameters, in one pass over the logits
in their own type. One row at a time is widened to float32, never the batch.
"""

from typing import NamedTuple

import torch

from vllm_unmask.kernels.row_statistics import reference


class Sampling(NamedTuple):
    """Parameters of rows of which some are sampled; None leaves its option out."""

    temperature: torch.Tensor  # float32 [rows], at least 0; 0 is greedy
    draws: torch.Tensor  # float64 [rows] in [0, 1), multiples of 2**-53
    top_k: torch.Tensor | None = None  # int64 [rows], at least 1; vocab keeps all
    top_p: torch.Tensor | None = None  # float32 [rows] in [0, 1]; 1 keeps all
    min_p: torch.Tensor | None = None  # float32 [rows] in [0, 1]; 0 keeps all
    plain: torch.Tensor | None = None  # bool [rows], statistics before the transform


class Constraints(NamedTuple):
    """What is added to logits, and what is banned; all that is given applies.

    In a bitmask token ``i`` is bit ``i % 32`` of word ``i // 32``, 1 if allowed
    (xgrammar's order); it has at least ``ceil(vocab / 32)`` words.
    """

    mask_id: int = -1  # banned everywhere; -1 for none
    static_mask: torch.Tensor | None = None  # int32 [words], of all rows
    bitmasks: torch.Tensor | None = None  # int32 [bitmasks, words]
    bitmask_rows: torch.Tensor | None = None  # int64 [rows] -> bitmask, -1 for none
    # The biases of row r: bias_starts[r] to bias_starts[r + 1]; no token twice.
    bias_starts: torch.Tensor | None = None  # int64 [rows + 1]
    bias_tokens: torch.Tensor | None = None  # int64 [biases], in the vocabulary
    bias_values: torch.Tensor | None = None  # float32 [biases], finite


class RowStatistics(NamedTuple):
    """Statistics of each row's law, the softmax that its candidate comes from."""

    tokens: torch.Tensor  # int64 [rows], the most likely token, of equals the smallest
    probability: torch.Tensor  # float32 [rows], its probability
    second: torch.Tensor  # float32 [rows], that of the runner-up
    gap: torch.Tensor  # float32 [rows], logit of the first minus that of the second
    entropy: torch.Tensor  # float32 [rows], nats
    log_sum_exp: torch.Tensor  # float32 [rows], nats
    candidates: torch.Tensor  # int64 [rows], the sample, or `tokens` where greedy
    confidence: torch.Tensor  # float32 [rows], probability of the candidate


NO_CONSTRAINTS = Constraints()


def has_kernel(device: torch.device) -> bool:
    """Whether `row_statistics` reads logits once there, rather than by torch."""
    return device.type in ("cpu", "cuda")


def row_statistics(
    logits: torch.Tensor,
    sampling: Sampling | None = None,
    constraints: Constraints = NO_CONSTRAINTS,
) -> RowStatistics:
    """Statistics, and a sample, of each row under its own parameters.

    Biases, then bans; the sample comes from what temperature, min-p, top-k and top-p
    make of that, in vLLM's order, as `decoding.sampling.transform` and `sample` do
    with the same draws. Statistics are those of the same law, but of the plain softmax
    where ``temperature`` is 0 or ``plain`` is set. A row's result depends on no other
    row, nor on how many there are.

    NaN counts as -inf. A row without a finite logit takes token 0, one with +inf the
    first such token; both have probability, second and gap 0 and the largest entropy,
    ln(vocab), and are not sampled. A row with one finite logit has gap inf.

    Args:
        logits: bfloat16, float16 or float32 [rows, vocab], vocab at least 1, the last
            dimension contiguous. Left as they are.
        sampling: None if every row is greedy.
        constraints: see there.

    Returns:
        ``RowStatistics``. With ``error = 1e-5 + 2**-23 * max|logit| / temperature``,
        the second part of which is the rounding of that quotient, a probability has a
        relative error of at most ``error``, the entropy an absolute one of ``error *
        ln(vocab)``, and a draw closer than that to the border between two tokens may
        take either.

    Raises:
        ValueError: another type of logits, or tensors that do not fit.
    """
    _check(logits, sampling, constraints)
    if logits.device.type == "cpu":
        from vllm_unmask.kernels.row_statistics import cpu

        found = cpu.row_statistics(logits, sampling, constraints)
    elif logits.device.type == "cuda":
        from vllm_unmask.kernels.row_statistics import triton

        found = triton.row_statistics(logits, sampling, constraints)
    else:
        found = reference.row_statistics(logits, sampling, constraints)
    return RowStatistics(*found)


def _check(
    logits: torch.Tensor, sampling: Sampling | None, constraints: Constraints
) -> None:
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"logits are {logits.dtype}, not bfloat16, float16 or float32")
    rows, vocab = logits.shape
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}, expected (_, 1)")
    lengths = dict(sampling._asdict()) if sampling is not None else {}
    lengths["bitmask_rows"] = constraints.bitmask_rows
    for name, tensor in lengths.items():
        if tensor is not None and tensor.shape != (rows,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, expected ({rows},)")
    if (constraints.bitmasks is None) != (constraints.bitmask_rows is None):
        raise ValueError("bitmasks and bitmask_rows need each other")
    for name in ("static_mask", "bitmasks"):
        mask = getattr(constraints, name)
        if mask is not None and (
            mask.dtype != torch.int32 or mask.shape[-1] * 32 < vocab
        ):
            raise ValueError(
                f"{name} is {mask.dtype} {tuple(mask.shape)}, expected int32 words "
                f"for {vocab} tokens"
            )
    starts = constraints.bias_starts
    if starts is not None and starts.shape != (rows + 1,):
        raise ValueError(
            f"bias_starts is {tuple(starts.shape)}, expected ({rows + 1},)"
        )
