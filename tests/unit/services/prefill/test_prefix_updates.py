from hypothesis import given
from hypothesis import strategies as st

from scission.services.prefill.prefix_updates import PrefixUpdates

CHANGES = st.dictionaries(st.sampled_from([b"a", b"b", b"c"]), st.booleans())


@given(st.lists(st.one_of(CHANGES, st.none())))
def test_who_follows_the_updates_knows_what_a_full_one_says(
    steps: list[dict[bytes, bool] | None],
) -> None:
    """None stands for a heartbeat, in which the changes so far are taken."""
    updates = PrefixUpdates()
    known: set[bytes] = set()
    for changes in [*steps, None]:
        if changes is not None:
            updates.record(changes)
            continue
        update = updates.take(full=False)
        assert not set(update.added) & set(update.evicted)
        known = (known - set(update.evicted)) | set(update.added)
        assert known == set(updates.take(full=True).added)
