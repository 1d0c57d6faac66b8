# SPDX-License-Identifier: Apache-2.0
"""Structured outputs of a few schemas from each source; conformance runs them all."""

from pathlib import Path

import pytest
from structured_sweep import MODELS, THRESHOLDS, Sweep, engine, load_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


@pytest.mark.parametrize("model", MODELS)
def test_outputs_are_valid(model: str, tmp_path: Path) -> None:
    corpus = load_corpus()
    schemas = corpus.corpus()
    schemas = schemas[:: len(schemas) // 12] + corpus.generated(6, seed=7)
    with engine(model, tmp_path) as running:
        sweep = Sweep(running, [(s.name, s.text) for s in schemas], seed=2)
        sweep.run(list(sweep.runs(THRESHOLDS[1::2])))
    assert len(sweep.closing) >= 12
    assert sweep.finished.total() == 8 * len(sweep.closing)
    assert {"stop", "length"} == set(sweep.finished)
    assert not sweep.failures, sweep.summary()
