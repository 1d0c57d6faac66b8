# SPDX-License-Identifier: Apache-2.0
"""The examples: their command lines, and what the benchmark makes of measurements.

The runs themselves need minutes; `make demo` and the README's commands are those.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ROW_KEYS = {
    "system",
    "strategy",
    "threshold",
    "concurrency",
    "tokens_per_second",
    "tokens_per_forward",
    "rows_per_token",
    "ms_per_forward",
    "exact_match",
}


@pytest.fixture(scope="module")
def throughput() -> ModuleType:
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location(
        "throughput", EXAMPLES / "benchmarks" / "throughput.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def samples(throughput, system, strategy, threshold, concurrency, seconds, forwards):
    """One sample for each of `seconds`: 10 requests of 48 tokens, 9 of them right."""
    variant = throughput.Variant(system, strategy, threshold)
    return [
        throughput.Sample(
            variant=variant,
            concurrency=concurrency,
            repeat=repeat,
            seconds=duration,
            engine_steps=forwards // concurrency + 10,
            forwards=forwards,
            rows=8 * forwards,
            tokens=480,
            requests=10,
            right=9,
        )
        for repeat, duration in enumerate(seconds)
    ]


def result(throughput, concurrencies=(1, 16)):
    # Prompts of the torch loop are answered one at a time, whatever is asked.
    measured = samples(
        throughput, "torch-loop", "threshold", 0.9, 1, (2.0, 2.0, 4.0), 80
    )
    for concurrency in concurrencies:
        for system, strategy, threshold, seconds, forwards in (
            ("vllm-ar", None, None, (4.0, 8.0, 4.0), 480),
            ("unmask", "threshold", 0.9, (1.0, 1.6, 1.0), 80),
            ("unmask", "static", None, (3.0, 3.0, 3.0), 500),
            ("unmask", "threshold", 0.7, (0.9, 0.8, 0.7), 60),
        ):
            measured += samples(
                throughput,
                system,
                strategy,
                threshold,
                concurrency,
                [second / concurrency for second in seconds],
                forwards,
            )
    return throughput.assemble(measured, {"cpu": "some"})


@pytest.mark.parametrize(
    "script",
    [
        "quickstart.py",
        "structured_json.py",
        "benchmarks/structured.py",
        "benchmarks/throughput.py",
    ],
)
def test_help_starts_nothing(script, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage:")
    assert not list(tmp_path.iterdir())


def test_every_row_has_what_the_benchmark_promises(throughput):
    rows = result(throughput)["rows"]
    assert len(rows) == 9
    for row in rows:
        assert row.keys() >= ROW_KEYS
        assert row["system"] in ("unmask", "vllm-ar", "torch-loop")
        assert row["tokens_per_second_min"] <= row["tokens_per_second"]
        assert row["tokens_per_second"] <= row["tokens_per_second_max"]


def test_row_values(throughput):
    row = next(
        row
        for row in result(throughput)["rows"]
        if (row["system"], row["threshold"], row["concurrency"]) == ("unmask", 0.9, 1)
    )
    assert row["tokens_per_second"] == pytest.approx(480)
    assert row["tokens_per_second_min"] == pytest.approx(300)
    assert row["tokens_per_forward"] == pytest.approx(6)
    assert row["rows_per_token"] == pytest.approx(8 / 6)
    assert row["ms_per_forward"] == pytest.approx(1000 / 90)
    assert row["exact_match"] == pytest.approx(0.9)
    assert (row["requests"], row["repeats"]) == (30, 3)


def test_ratios_pair_the_measurements_of_a_repeat(throughput):
    """The second repeat hit a busy machine, and both systems with it."""
    made = result(throughput)
    assert made["ratios"] == {"1": pytest.approx(4), "16": pytest.approx(4)}
    assert made["ratio_ranges"]["1"] == [pytest.approx(4), pytest.approx(5)]
    assert made["torch_ratios"] == {"1": pytest.approx(2), "16": pytest.approx(32)}
    assert made["torch_ratio_ranges"]["1"] == [pytest.approx(1.25), pytest.approx(4)]


def test_growth_compares_the_quarters_of_a_run(throughput):
    """The first tenth, with the prompts, does not count."""
    run = [9.0] * 10 + [1.0] * 22 + [3.0] * 23 + [5.0] * 22 + [2.0] * 23
    found = throughput.growth([run, [2 * x for x in run], run])
    assert [found[f"ms_quarter_{n}"] for n in (1, 2, 3, 4)] == [1e3, 3e3, 5e3, 2e3]
    assert found["last_over_first"] == pytest.approx(2)


def test_result_is_json(throughput):
    made = result(throughput)
    assert json.loads(json.dumps(made)) == made
    assert made["environment"] == {"cpu": "some"}


def test_table_shows_every_row_and_ratio(throughput):
    text = throughput.table(result(throughput))
    lines = text.splitlines()
    assert len(lines) == 2 + 9 + 4
    assert sum(line.startswith("unmask, threshold 0.9 ") for line in lines) == 2
    assert "4.00 times" in lines[-3]
    assert "32.00 times" in lines[-1]


def test_plot_is_a_picture(throughput, tmp_path):
    pytest.importorskip("matplotlib")
    throughput.plot(result(throughput), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("quick", [True, False])
def test_variants_hold_both_sides_of_the_ratio(throughput, quick):
    variants = throughput.variants(quick)
    assert throughput.Variant("vllm-ar") in variants
    assert throughput.Variant("unmask", "threshold", 0.9) in variants
    assert throughput.Variant("unmask", "static") in variants
    assert len(set(variants)) == len(variants)


def test_torch_loop_is_the_dense_loop(throughput, monkeypatch):
    """Tokens, and denoising forwards, of whole sequences without a cache."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "demo_model"))
    from batches import encode_example
    from checkpoint import load
    from decode import decode_blocks

    folder = EXAMPLES / "demo_model" / "sdar"
    lines = (EXAMPLES / "demo_model" / "held_out.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines[:80:8]]
    loop = throughput.TorchLoop({"model": str(folder), "dtype": "float32"})
    found = loop.measure(prompts, 1, {"unmask_threshold": 0.9})
    model, block = load(folder)
    encoded = [encode_example(loop.tokenizer, prompt, "")[0] for prompt in prompts]
    outputs, forwards = decode_blocks(
        model, encoded, loop.mask_id, loop.stop_id, 0.9, block
    )
    assert [one.text for one in found.outputs] == [
        loop.tokenizer.decode(output[:-1]) for output in outputs
    ]
    assert [one.tokens for one in found.outputs] == [len(one) for one in outputs]
    assert found.forwards == sum(forwards)


def test_request_options_are_the_plugins(throughput):
    from vllm_unmask.options import DecodingOptions, parse_request_options

    for variant in throughput.variants(quick=False):
        if variant.system == "vllm-ar":
            assert variant.extra_args is None
            continue
        options = parse_request_options(variant.extra_args, DecodingOptions(), 8)
        assert options.strategy == variant.strategy
        if variant.threshold is not None:
            assert options.threshold == variant.threshold
