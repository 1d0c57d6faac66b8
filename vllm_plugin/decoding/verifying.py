# SPDX-License-Identifier: Apache-2.0
"""Slot *verify*: drafts of the diffusion mode, checked by the autoregressive mode.

Speculative sampling (Leviathan, Kalman, Matias 2023) with the same weights on both
sides (S2D2). Three draws meet at a position: the draft's (`CANDIDATE_STREAM`), the one
that accepts and the residual's. They need streams of their own: a residual that
shares the draft's draw, say, takes the tokens beside the draft, not those of its law.
"""

from typing import NamedTuple

import torch

from vllm_unmask.decoding.sampling import sample

# Arguments of `sampling.uniform`, besides those defined there.
ACCEPTANCE_STREAM = 3
RESIDUAL_STREAM = 4


class Verified(NamedTuple):
    """What is left of the drafts."""

    tokens: torch.Tensor  # int64 [requests, block], the drafts, one of them corrected
    accepted: torch.Tensor  # bool [requests, block], a prefix of the span
    num_accepted: torch.Tensor  # int64 [requests], positions accepted


def first_span(masked: torch.Tensor) -> torch.Tensor:
    """The leftmost masked position and all that follow without a gap.

    Args:
        masked: bool [requests, block].

    Returns:
        bool [requests, block], a subset of ``masked``.
    """
    begun = masked.long().cumsum(dim=1) > 0
    return masked & ~(begun & ~masked).long().cumsum(dim=1).bool()


def verify(
    drafts: torch.Tensor,
    span: torch.Tensor,
    draft_logits: torch.Tensor,
    verifier_logits: torch.Tensor,
    greedy: torch.Tensor,
    exponent: torch.Tensor,
    uniforms: torch.Tensor,
    residual_uniforms: torch.Tensor,
) -> Verified:
    """Accept drafts from the left; correct the first that fails, which ends it.

    With ``p`` and ``q`` the softmax of the draft's and the verifier's logits, draft
    ``t`` passes with probability ``min(1, (q[t] / p[t]) ** exponent)``. The first that
    fails is replaced by a draw from ``(q - p)+``, normalised, and accepted: every
    span makes progress. If drafts were drawn from ``p`` independently, exponent 1
    gives every accepted position the law ``q``, given what is accepted before it.
    Where greedy, the most likely token of ``q`` passes, and is the correction.

    A draft fails if ``q`` bans it, and if its own probability or ``q`` is undefined;
    then, as where ``(q - p)+`` has no mass, the correction comes from ``q``, in which
    NaN counts as -inf. If ``q`` has no token at all, the draft is kept.

    Args:
        drafts: int64 [requests, block], tokens of the vocabulary in the span.
        span: bool [requests, block], of each request one run or nothing.
        draft_logits: float32 [requests, block, vocab], after the request's transforms,
            banned tokens at -inf.
        verifier_logits: like ``draft_logits``; row ``i`` predicts position ``i``
            given the drafts left of it.
        greedy: bool [requests], which ignore ``draft_logits``, exponent and draws.
        exponent: float32 [requests], positive; below 1 accepts more (S2D2's
            tempering factor).
        uniforms: float [requests, block] in [0, 1), of `ACCEPTANCE_STREAM`.
        residual_uniforms: float [requests, block] in [0, 1), of `RESIDUAL_STREAM`.

    Returns:
        ``Verified``. One vocab-wide row of each request is copied; otherwise there is
        no temporary beyond those of one ``logsumexp`` at a time.
    """
    log_p = _log_probability(draft_logits, drafts)
    log_q = _log_probability(verifier_logits, drafts)
    # NaN passes neither comparison, so an undefined probability is a failure.
    log_ratio = log_q - log_p
    chance = (log_ratio * exponent.unsqueeze(1)).exp()
    defined = log_p.isfinite()
    drawn = defined & ((log_ratio >= 0) | (uniforms < chance))
    peak, best = verifier_logits.max(dim=2)
    # torch lets NaN win a maximum.
    agreed = (best == drafts) & (peak > -torch.inf)

    failed = span & ~torch.where(greedy.unsqueeze(1), agreed, drawn)
    num_failed = failed.long().cumsum(dim=1)
    first = failed & (num_failed == 1)
    accepted = span & ((num_failed == 0) | first)

    # Of a request without a failure any position will do: nothing is taken from it.
    place = (num_failed == 0).sum(dim=1).clamp(max=span.shape[1] - 1)
    row = torch.arange(len(place), device=place.device)
    correction = _correction(
        draft_logits[row, place],
        verifier_logits[row, place],
        defined[row, place] & ~log_q[row, place].isnan(),
        greedy,
        residual_uniforms[row, place],
    )
    correction = torch.where(correction < 0, drafts[row, place], correction)
    tokens = torch.where(first, correction.unsqueeze(1), drafts)
    return Verified(tokens, accepted, accepted.sum(dim=1))


def _log_probability(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of one token of each row, float32 [requests, block]."""
    at = logits.gather(2, tokens.unsqueeze(2)).squeeze(2)
    return at - logits.logsumexp(dim=2)


def _correction(
    draft_logits: torch.Tensor,
    verifier_logits: torch.Tensor,
    comparable: torch.Tensor,
    greedy: torch.Tensor,
    draws: torch.Tensor,
) -> torch.Tensor:
    """What replaces a draft that failed.

    Args:
        draft_logits: float32 [requests, vocab], of that position.
        verifier_logits: float32 [requests, vocab].
        comparable: bool [requests], the draft failed by its ratio.
        greedy: bool [requests].
        draws: float [requests] in [0, 1).

    Returns:
        int64 [requests], -1 where the verifier has no token.
    """
    # Largest floats for +inf, which has no softmax.
    top = torch.finfo(verifier_logits.dtype).max
    verifier_logits = verifier_logits.nan_to_num(-torch.inf, top, -torch.inf)
    q = verifier_logits.softmax(dim=1)
    residual = (q - draft_logits.softmax(dim=1)).clamp_(min=0)
    usable = comparable & (residual.sum(dim=1) > 0)
    law = torch.where(usable.unsqueeze(1), residual, q)
    # A draw of 1, which float32 rounds to, would be past the last token.
    drawn = sample(law, draws.double().clamp(max=1 - 2.0**-53))
    peak, best = verifier_logits.max(dim=1)
    return torch.where(greedy, best, drawn).masked_fill(peak == -torch.inf, -1)
