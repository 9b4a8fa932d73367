"""The random numbers against published vectors, the filters against their definitions."""

import math

import pytest
import torch

from scission.kernels import sampling
from scission.kernels.sampling import reference
from scission.kernels.sampling.reference import Allowed, Bias, Draws, Penalties, Random


def random_rows(
    count: int, *, temperature: float = 1.0, seeds: list[int] | None = None, position: int = 0
) -> Random:
    return Random(
        temperatures=torch.full((count,), temperature),
        seeds=torch.tensor(seeds if seeds is not None else list(range(count))),
        choices=torch.zeros(count, dtype=torch.int64),
        positions=torch.full((count,), position),
    )


# Random123's known answers (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_published_numbers(counter: str, key: str, answer: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    k0, k1 = (torch.tensor([int(word, 16)]) for word in key.split())
    drawn = reference.philox((c0, c1, c2, c3), (k0, k1))[0].tolist()
    assert [f"{word:08x}" for word in drawn] == answer.split()


def test_negative_seed_uses_all_64_bits() -> None:
    seeds = torch.tensor([-1, 2**32 - 1, 2**63 - 1])
    zeros = torch.zeros(3, dtype=torch.int64)
    noise = reference.gumbel_noise(seeds, zeros, zeros, 64)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise[0], noise[2])


def test_gumbel_noise_is_finite_and_has_the_right_mean_and_spread() -> None:
    noise = reference.gumbel_noise(*(torch.arange(16),) * 3, vocab_size=20_001)
    assert noise.shape == (16, 20_001)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    count = 20_000
    drawn = sampling.sample(probabilities.log().repeat(count, 1), Draws(random_rows(count)))
    frequencies = drawn.bincount(minlength=5) / count
    torch.testing.assert_close(frequencies, probabilities, atol=0.012, rtol=0)


def test_temperature_sharpens_the_distribution() -> None:
    count = 20_000
    logits = torch.tensor([0.0, 1.0]).repeat(count, 1)
    drawn = sampling.sample(logits, Draws(random_rows(count, temperature=0.5)))
    assert drawn.float().mean().item() == pytest.approx(
        torch.sigmoid(torch.tensor(2.0)).item(), abs=0.01
    )


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-4])
def test_zero_and_tiny_temperatures_take_the_most_likely(temperature: float) -> None:
    logits = torch.tensor([[0.0, 3e38, -3e38, 1.0]])
    assert sampling.sample(logits, Draws(random_rows(1, temperature=temperature))).tolist() == [1]


def test_equal_logits_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, [700, 300, 999]] = 1.0
    assert sampling.greedy(logits).tolist() == [0, 300]
    assert sampling.sample(logits, Draws()).tolist() == [0, 300]


def test_a_row_alone_draws_what_it_draws_in_a_batch() -> None:
    logits = torch.randn(13, 1003, generator=torch.Generator().manual_seed(0))
    draws = Draws(
        Random(
            temperatures=torch.linspace(0, 2, 13),
            seeds=torch.arange(13) * 10**15,
            choices=torch.arange(13) % 3,
            positions=torch.arange(13) * 7,
        ),
        top_k=torch.arange(13) * 5,
        top_p=torch.linspace(0.1, 1, 13),
        min_p=torch.linspace(0, 0.2, 13),
    )
    together = sampling.sample(logits, draws).tolist()
    assert (
        draws.random
        and draws.top_k is not None
        and draws.top_p is not None
        and draws.min_p is not None
    )
    for row in range(13):
        only = slice(row, row + 1)
        alone = Draws(
            Random(
                draws.random.temperatures[only],
                draws.random.seeds[only],
                draws.random.choices[only],
                draws.random.positions[only],
            ),
            top_k=draws.top_k[only],
            top_p=draws.top_p[only],
            min_p=draws.min_p[only],
        )
        assert sampling.sample(logits[only].clone(), alone).tolist() == together[row : row + 1]


def kept(logits: list[float], **cuts: float) -> list[int]:
    rows = torch.tensor([logits]) - max(logits)
    draws = Draws(**{name: torch.tensor([value]) for name, value in cuts.items()})  # type: ignore[arg-type]
    return reference.keep_likely(rows, draws)[0].isfinite().nonzero()[:, 0].tolist()


LIKELY = [math.log(p) for p in (0.1, 0.4, 0.2, 0.2, 0.1)]


@pytest.mark.parametrize(
    ("cuts", "expected"),
    [
        ({"top_k": 0}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.55}, [1, 2]),
        ({"top_p": 0.75}, [1, 2, 3]),
        ({"min_p": 0.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.4}, [1, 2, 3]),
        ({"min_p": 1.0}, [1]),
        # of the two that top-k leaves (2/3 and 1/3) top-p keeps the first
        ({"top_k": 2, "top_p": 0.6}, [1]),
        ({"min_p": 0.4, "top_k": 2}, [1, 2]),
    ],
    ids=str,
)
def test_filters_keep_the_likely(cuts: dict[str, float], expected: list[int]) -> None:
    assert kept(LIKELY, **cuts) == expected


def test_filters_of_one_row_leave_the_others() -> None:
    logits = torch.tensor([LIKELY, LIKELY]) - max(LIKELY)
    left = reference.keep_likely(
        logits, Draws(top_k=torch.tensor([0, 1]), top_p=torch.tensor([1.0, 1.0]))
    )
    assert left[0].isfinite().all()
    assert left[1].isfinite().sum() == 1


def test_bias_allowed_and_penalties_change_only_what_they_name() -> None:
    logits = torch.tensor([[1.0, 2.0, -3.0, 4.0], [1.0, 2.0, -3.0, 4.0], [1.0, 2.0, -3.0, 4.0]])
    before = logits.clone()
    ints = torch.tensor
    adjusted = reference.adjust(
        logits,
        Draws(
            bias=Bias(ints([0, 0, 1]), ints([3, 0, 3]), torch.tensor([float("-inf"), 0.5, 1.0])),
            allowed=Allowed(ints([1, 1]), ints([0, 3])),
            penalties=Penalties(
                rows=ints([2, 2, 2]),
                token_ids=ints([1, 2, 3]),
                output_counts=torch.tensor([0.0, 1.0, 2.0]),
                presence=torch.full((3,), 0.25),
                frequency=torch.full((3,), 0.5),
                repetition=torch.full((3,), 2.0),
            ),
        ),
    )
    inf = float("inf")
    assert adjusted.tolist() == [
        [1.5, 2.0, -3.0, -inf],
        [1.0, -inf, -inf, 5.0],
        [1.0, 1.0, -6.75, 0.75],
    ]
    assert torch.equal(logits, before)


def test_logprobs_name_the_token_its_rank_and_the_best() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    own, ranks, top_ids, top = sampling.token_logprobs(logits, torch.tensor([2]), 3)
    expected = logits.log_softmax(-1)[0]
    assert own.tolist() == [expected[2].item()]
    assert ranks.tolist() == [3]
    assert sorted(top_ids[0, :2].tolist()) == [1, 3]
    assert top_ids[0, 2].item() == 2
    torch.testing.assert_close(top[0], expected[top_ids[0]], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits must be"):
        sampling.greedy(torch.zeros(shape))
