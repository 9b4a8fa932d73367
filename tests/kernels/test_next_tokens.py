"""The kernels that draw a running batch's next tokens against their reference, number by number."""

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from scission.kernels.sampling import OF_PROMPT, NextTokens, reference

VOCAB = 5003


def rows_of(
    count: int, device: torch.device, vocab: int = VOCAB, **given: list[float]
) -> NextTokens:
    """Greedy rows that stand at different positions, where nothing else is given."""
    positions = torch.arange(count) * 7 + 3
    columns = {
        "token_ids": torch.full((count,), 99),
        "positions": positions,
        "context_lens": (positions + 1).int(),
        "writer_ends": positions + 1,
        "temperatures": torch.zeros(count),
        "seeds": torch.arange(count) * 10**15 - 5,
        "choices": torch.arange(count) % 3,
        "counts": torch.arange(count) * 5,
        "top_k": torch.zeros(count, dtype=torch.int64),
        "top_p": torch.ones(count),
        "min_p": torch.zeros(count),
        "presence": torch.zeros(count),
        "frequency": torch.zeros(count),
        "repetition": torch.ones(count),
        "seen": torch.zeros(count, vocab, dtype=torch.int32),
    }
    columns |= {
        name: torch.tensor(values, dtype=columns[name].dtype) for name, values in given.items()
    }
    return NextTokens(**{name: column.to(device) for name, column in columns.items()})


def copy_of(rows: NextTokens) -> NextTokens:
    return NextTokens(**{f.name: getattr(rows, f.name).clone() for f in fields(rows)})


def check(logits: Tensor, rows: NextTokens) -> None:
    """Every column equals what the reference makes of it."""
    from scission.kernels.sampling.next_tokens import draw_next

    expected = copy_of(rows)
    changed = logits.clone()
    reference.draw_next_(changed, expected)
    is_penalised = (rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1)
    is_greedy = not bool((rows.temperatures > 0).any() or is_penalised.any())
    draw_next(logits, rows, is_greedy=is_greedy)
    assert torch.equal(logits, changed)
    for field in fields(rows):
        assert torch.equal(getattr(rows, field.name), getattr(expected, field.name)), field.name


def random_logits(count: int, vocab: int, device: torch.device, spread: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(count, vocab, generator=generator) * spread).to(device)


CASES: dict[str, dict[str, list[float]]] = {
    "greedy": {},
    "random": {"temperatures": [0.3, 1.0, 2.0]},
    "mixed with padding": {"temperatures": [0.0, 1.0, 1.0], "positions": [4, -1, 0]},
    "tiny temperatures": {"temperatures": [1e-6, 1e-4, 1e-2]},
    "top-k": {"temperatures": [1.0, 1.0, 0.7], "top_k": [1, 20, 5002]},
    "top-k above the vocabulary": {"temperatures": [1.0, 1.0, 1.0], "top_k": [5003, 9999, 0]},
    "top-p": {"temperatures": [1.0, 0.6, 1.5], "top_p": [0.9, 0.1, 0.999]},
    "no top-p left": {"temperatures": [1.0, 1.0, 1.0], "top_p": [0.0, 1e-9, 0.5]},
    "min-p": {"temperatures": [1.0, 2.0, 1.0], "min_p": [0.1, 0.02, 1.0]},
    "all together": {
        "temperatures": [1.0, 2.0, 0.5],
        "top_k": [50, 0, 700],
        "top_p": [0.95, 0.8, 0.99],
        "min_p": [0.01, 0.001, 0.0],
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.usefixtures("poisoned")
def test_next_tokens_are_the_references(case: str, kernel_device: torch.device) -> None:
    logits = random_logits(3, VOCAB, kernel_device)
    check(logits, rows_of(3, kernel_device, **CASES[case]))


@pytest.mark.parametrize(
    "cut",
    [
        {"top_k": [7, 1, 300]},
        {"top_p": [0.25, 0.001, 0.9]},
        {"top_k": [7, 200, 300], "top_p": [0.5, 0.3, 0.9]},
    ],
    ids=str,
)
@pytest.mark.usefixtures("poisoned")
def test_equal_logits_are_cut_in_order_of_ids(
    cut: dict[str, list[float]], kernel_device: torch.device
) -> None:
    logits = torch.zeros(3, 997, device=kernel_device)
    logits[2, 500:] = -0.0
    rows = rows_of(3, kernel_device, 997, temperatures=[1.0, 1.0, 1.0], **cut)
    check(logits, rows)


@pytest.mark.parametrize("cut", [{"top_k": [9000, 30]}, {"top_p": [0.9, 0.3]}], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_likely_tokens_need_not_fit_the_list(
    cut: dict[str, list[float]], kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scission.kernels.sampling import likely

    monkeypatch.setattr(likely, "MAX_LISTED", 64)
    logits = random_logits(2, 12000, kernel_device, spread=0.01)
    check(logits, rows_of(2, kernel_device, 12000, temperatures=[1.0, 1.0], **cut))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.usefixtures("poisoned")
def test_penalties_look_at_what_a_row_has_seen(
    temperature: float, kernel_device: torch.device
) -> None:
    rows = rows_of(
        4,
        kernel_device,
        700,
        positions=[3, 5, -1, 8],
        temperatures=[temperature] * 4,
        presence=[0.7, 0.0, 0.5, 0.0],
        frequency=[0.3, 0.0, 0.5, 0.0],
        repetition=[1.0, 1.3, 1.5, 1.0],
    )
    generator = torch.Generator().manual_seed(5)
    seen = torch.randint(0, 4, (4, 700), generator=generator, dtype=torch.int32)
    seen[:, ::5] += OF_PROMPT
    rows.seen.copy_(seen)
    for step in range(3):
        check(random_logits(4, 700, kernel_device) + step - 1, rows)
    # one more of each token that was drawn, of penalised rows alone
    assert (rows.seen.cpu() - seen).sum(-1).tolist() == [3, 3, 0, 0]


@pytest.mark.usefixtures("poisoned")
def test_rows_draw_on_from_where_they_stand(kernel_device: torch.device) -> None:
    rows = rows_of(2, kernel_device, 700, temperatures=[1.0, 1.0], top_p=[0.9, 1.0])
    drawn = []
    for step in range(4):
        check(random_logits(2, 700, kernel_device) + step, rows)
        drawn.append(rows.token_ids.tolist())
    assert rows.positions.tolist() == [7, 14]
    assert len({tuple(tokens) for tokens in drawn}) > 1


def test_logits_that_are_no_numbers_give_a_token_of_the_vocabulary(
    kernel_device: torch.device,
) -> None:
    from scission.kernels.sampling.next_tokens import draw_next

    rows = rows_of(2, kernel_device, 100, temperatures=[0.0, 1.0])
    nothing = torch.full((2, 100), float("nan"), device=kernel_device)
    draw_next(nothing, rows, is_greedy=False)
    assert all(0 <= token < 100 for token in rows.token_ids.tolist())


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [129_280, 151_936])
@pytest.mark.parametrize("count", [1, 8, 128])
def test_vocabularies_of_models_draw_the_references_tokens(count: int, vocab: int) -> None:
    device = torch.device("cuda")
    logits = random_logits(count, vocab, device, spread=4.0)
    rows = rows_of(
        count,
        device,
        vocab,
        temperatures=[(i % 4) / 2 for i in range(count)],
        top_k=[(0, 50, 0)[i % 3] for i in range(count)],
        top_p=[(0.95, 1.0)[i % 2] for i in range(count)],
        min_p=[(0.0, 0.0, 0.0, 0.0, 0.05)[i % 5] for i in range(count)],
        frequency=[(0.3, 0.0)[i % 2] for i in range(count)],
        repetition=[(1.3, 1.0, 1.0)[i % 3] for i in range(count)],
    )
    rows.seen[:, ::3] = OF_PROMPT
    rows.seen[:, ::7] += 3
    check(logits, rows)
    check(logits.neg(), replace(rows))
