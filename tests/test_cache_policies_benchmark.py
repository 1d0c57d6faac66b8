# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cache policies: its model, what it asks, and what it writes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    import cache_policies

    yield cache_policies
    sys.path[:] = path


def test_model(bench: Any, tmp_path: Path) -> None:
    """Of the size that is promised, under names that LLaDA's class knows."""
    from vllm_unmask.families.llada import LLaDAConfig

    sizes = bench.shapes(bench.CONFIG).values()
    total = sum(a * b for a, b in (size for size in sizes if len(size) == 2))
    assert 49e6 < total < 51e6
    small = bench.CONFIG | {"d_model": 8, "mlp_hidden_size": 8, "n_layers": 1}
    bench.write_model(tmp_path, small)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(bench.shapes(small))
    config = LLaDAConfig(**json.loads((tmp_path / "config.json").read_text()))
    assert (config.hidden_size, config.mask_token_id) == (8, 8191)


def test_policies_are_options_that_a_server_knows(bench: Any) -> None:
    from vllm_unmask.options import DecodingOptions, parse_request_options
    from vllm_unmask.requirements import require_attention_fit

    assert bench.POLICIES[0] == bench.EXACT
    for policy in bench.POLICIES:
        options = parse_request_options(policy.extra_args, DecodingOptions(), 32)
        require_attention_fit(options, "full")


def test_result(bench: Any) -> None:
    outputs = [[1, 2, 3, 4], [5, 6, 7, 8]]
    other = [[1, 2, 9, 9], [5, 6, 7, 8]]
    policy = bench.Policy("dual", refresh=4)
    samples = [
        bench.Sample(bench.EXACT, 0, 2.0, 8, 64, outputs),
        bench.Sample(policy, 0, 1.0, 8, 16, other),
        bench.Sample(bench.EXACT, 1, 4.0, 8, 64, outputs),
        bench.Sample(policy, 1, 1.0, 8, 16, other),
    ]
    result = bench.assemble(samples, {"cpu": "any"})
    none, dual = result["rows"]
    assert (none["over_none"], none["agreement"]) == (1.0, 1.0)
    assert (dual["over_none"], dual["agreement"]) == (3.0, 0.75)
    assert (dual["cache"], dual["refresh"], dual["window"]) == ("dual", 4, 0)
    assert (dual["rows_per_token"], dual["tokens_per_second"]) == (2.0, 8.0)
    text = bench.table(result).splitlines()
    assert text[2].split()[:3] == ["dual,", "refresh", "4"]
    assert json.loads(json.dumps(result)) == result
