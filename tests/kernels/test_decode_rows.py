"""Rows of a running batch become other sequences, padding, or one another's successors."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Tensor

from scission.kernels.decode_rows import CHANGE_FIELDS, DecodeRows, new_rows, reference

NUM_ROWS, MAX_BLOCKS = 6, 700


def change(**given: float) -> list[int]:
    """A changed row; floats as their bits."""
    values = dict.fromkeys(CHANGE_FIELDS, 0) | {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0}
    values |= {"presence": 0.0, "frequency": 0.0, "repetition": 1.0}
    return [
        int(np.float32(value).view(np.int32)) if isinstance(value, float) else int(value)
        for value in (values | given).values()
    ]


def columns(rows: DecodeRows) -> dict[str, Tensor]:
    own = {f.name: getattr(rows.next_tokens, f.name) for f in fields(rows.next_tokens)}
    return own | {"slots": rows.slots, "block_tables": rows.block_tables}


def test_changes_are_the_references(kernel_device: torch.device) -> None:
    from scission.kernels.decode_rows.write_rows import write_rows

    steps = [
        [
            change(row=4, token=7, position=11, slot=3, num_blocks=2, seed=-5, temperature=0.5),
            change(row=0, token=8, position=0, slot=1, first_block=2, num_blocks=600, top_p=0.9),
        ],
        # row 4 moves to row 2 with the token that the device has; row 0 gets a block
        [
            change(row=2, token=-5, position=12, slot=3, num_blocks=2, choice=1, count=9),
            change(row=4, token=-5, position=-1),
            change(
                row=0,
                token=-1,
                position=1,
                slot=1,
                num_blocks=601,
                top_k=3,
                min_p=0.25,
                repetition=1.5,
            ),
        ],
    ]
    block_ids = torch.arange(1, 702, device=kernel_device)
    rows = new_rows(NUM_ROWS, MAX_BLOCKS, 9, kernel_device)
    expected = new_rows(NUM_ROWS, MAX_BLOCKS, 9, kernel_device)
    for step in steps:
        changes = torch.tensor(step, device=kernel_device)
        write_rows(rows, changes, block_ids)
        reference.write_rows_(expected, changes, block_ids)
        for name, column in columns(rows).items():
            assert torch.equal(column, columns(expected)[name]), name
    assert expected.next_tokens.token_ids.tolist()[:5] == [8, 0, 7, 0, 7]
    assert expected.next_tokens.positions.tolist() == [1, -1, 12, -1, -1, -1]
    assert expected.block_tables[4].any() == 0


@pytest.mark.parametrize("shape", [(3,), (1, 3)])
def test_changes_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    from scission.kernels.decode_rows import write_rows_

    rows = new_rows(2, 2, 9, torch.device("cpu"))
    with pytest.raises(ValueError, match="changes must be"):
        write_rows_(rows, torch.zeros(shape, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
