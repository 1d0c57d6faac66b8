# SPDX-License-Identifier: Apache-2.0
"""The step that completes a prompt denoises the first block as well."""

import random
from collections.abc import Iterator

import engine_calls
import pytest
from checkpoints import EOS, sdar_config, write_checkpoint
from engine_process import EngineProcess

pytestmark = pytest.mark.e2e

BLOCK, PAGE = 8, 32


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    path = tmp_path_factory.mktemp("first_block")
    write_checkpoint(path, sdar_config(BLOCK))
    options = {"block_size": PAGE, "max_num_batched_tokens": 60}
    with EngineProcess(model=str(path), **options) as engine:
        yield engine


@pytest.mark.parametrize(
    ("length", "rows"),
    [
        # A tail, a prompt that ends with its block, and one shorter than a block:
        # prompt and canvas, up to the canvas block's end.
        (13, 16),
        (24, 32),
        (5, 8),
        # The last of two chunks.
        (100, 48),
        # The page ends with the prompt: the block waits for one of its own.
        (32, 8),
        # The budget ends inside the block.
        (58, 8),
    ],
)
def test_first_canvas_follows_its_prompt(
    engine: EngineProcess, length: int, rows: int
) -> None:
    rng = random.Random(length)
    prompt = [rng.randrange(EOS) for _ in range(length)]
    params = {
        "temperature": 0,
        "max_tokens": 1,
        "extra_args": {"unmask_strategy": "static", "unmask_steps": 1},
    }
    _, records = engine.run(engine_calls.generate_recorded, [prompt], params)
    assert [record["rows"] for record in records] == [rows]
    assert records[0]["prefix"] == prompt[: length // BLOCK * BLOCK]
