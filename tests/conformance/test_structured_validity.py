# SPDX-License-Identifier: Apache-2.0
"""Every structured output of a thousand real schemas is valid and complete.

Takes about half an hour; ``make conformance`` runs it. `structured_sweep` says what is
checked, and which keywords xgrammar relaxes.
"""

import sys
from collections.abc import Iterator

import pytest
from structured_sweep import MODELS, THRESHOLDS, Sweep, engine, load_corpus

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

NUM_GENERATED = 100


@pytest.fixture(scope="module", params=MODELS)
def sweep(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sweep]:
    corpus = load_corpus()
    schemas = corpus.corpus() + corpus.generated(NUM_GENERATED)
    folder = tmp_path_factory.mktemp(request.param)
    with engine(request.param, folder) as running:
        yield Sweep(running, [(s.name, s.text) for s in schemas], seed=1)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_every_output_is_valid(
    sweep: Sweep, threshold: float, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.clear()
    runs = list(sweep.runs([threshold]))
    sweep.run(runs)
    with capsys.disabled():
        sys.stdout.write(f"\nthreshold {threshold}: {sweep.summary()}\n")
    assert sweep.finished.total() == len(runs)
    assert not sweep.failures


def test_every_schema_is_served_or_refused_for_a_reason(sweep: Sweep) -> None:
    assert sweep.closing.keys() | sweep.refused.keys() == set(range(len(sweep.schemas)))
    assert not sweep.closing.keys() & sweep.refused.keys()
    assert len(sweep.closing) - NUM_GENERATED >= 300
    for index, why in sweep.refused.items():
        # A keyword must be in the schema; a limit is a sentence.
        assert " " in why or f'"{why}"' in sweep.schemas[index][1]
