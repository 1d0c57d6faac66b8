# SPDX-License-Identifier: Apache-2.0
"""The automaton of a delimiter, against Python's search in the whole text."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_unmask.decoding.delimiter import follow, transitions

# Few letters, so that starts of the text overlap with its ends.
WORDS = st.text("ab<", max_size=5)


@given(st.data())
def test_last_state_is_that_the_text_was_there(data: st.DataObject) -> None:
    text = data.draw(st.text("ab<", min_size=1, max_size=6))
    vocabulary = data.draw(st.lists(WORDS, min_size=1, max_size=6))
    table = transitions([word.encode() for word in vocabulary], text.encode())
    assert table.shape == (len(vocabulary), len(text) + 1)
    outputs = data.draw(
        st.lists(
            st.lists(st.integers(0, len(vocabulary) - 1), max_size=9),
            min_size=1,
            max_size=4,
        )
    )
    width = data.draw(st.integers(1, 5))
    state = torch.zeros(len(outputs), dtype=torch.int64)
    for first in range(0, 9, width):
        steps = [output[first : first + width] for output in outputs]
        # What is beyond the count does not count, but is some token.
        rows = [step + [0] * (width - len(step)) for step in steps]
        count = torch.tensor([len(step) for step in steps])
        state = follow(state, torch.tensor(rows), count, table)
        for output, found in zip(outputs, state.tolist(), strict=True):
            said = "".join(vocabulary[token] for token in output[: first + width])
            assert (found == len(text)) == (text in said)
            if text not in said:
                assert said.endswith(text[:found])
                longer = range(found + 1, len(text))
                assert not any(said.endswith(text[:n]) for n in longer)


def test_text_of_bytes_and_empty_tokens() -> None:
    table = transitions([b"", "é".encode()[:1], "é".encode()[1:]], "é".encode())
    state = torch.zeros(1, dtype=torch.int64)
    state = follow(state, torch.tensor([[1, 0, 2]]), torch.tensor([2]), table)
    assert state.tolist() == [1]
    assert follow(state, torch.tensor([[2]]), torch.tensor([1]), table).tolist() == [2]
