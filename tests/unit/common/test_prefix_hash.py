from hypothesis import given
from hypothesis import strategies as st

from scission.common.prefix_hash import HASH_BYTES, block_hashes

tokens = st.lists(st.integers(0, 2**31 - 1), max_size=40)


@given(tokens, st.integers(1, 8))
def test_one_hash_per_full_block(token_ids: list[int], block_size: int) -> None:
    hashes = block_hashes(token_ids, block_size)
    assert len(hashes) == len(token_ids) // block_size
    assert all(len(digest) == HASH_BYTES for digest in hashes)
    assert len(set(hashes)) == len(hashes)


@given(tokens, tokens, st.integers(1, 8))
def test_hashes_agree_exactly_as_far_as_the_tokens_do(
    ours: list[int], theirs: list[int], block_size: int
) -> None:
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    for i, (a, b) in enumerate(
        zip(block_hashes(ours, block_size), block_hashes(theirs, block_size), strict=False)
    ):
        assert (a == b) == ((i + 1) * block_size <= shared)


def test_another_salt_shares_nothing() -> None:
    ours = block_hashes(range(16), 4, "tenant a")
    theirs = block_hashes(range(16), 4, "tenant b")
    assert not set(ours) & set(theirs)


def test_the_hash_is_the_same_in_every_process() -> None:
    # A change here makes gateways and workers of two releases disagree on prefixes.
    assert block_hashes(range(4), 4)[0].hex() == "2ccebc6720a23d61ae8b96344dd38b2a"
