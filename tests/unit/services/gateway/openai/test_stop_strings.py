from hypothesis import given
from hypothesis import strategies as st

from scission.services.gateway.openai.stop_strings import StopStrings

texts = st.text(alphabet="abc", max_size=30)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def run(pieces: list[str], stops: list[str], *, included: bool = False) -> tuple[str, str | None]:
    matcher = StopStrings(stops, is_included=included)
    shown = "".join(map(matcher.push, pieces))
    return shown + matcher.flush(), matcher.matched


def first_completed(text: str, stops: list[str]) -> tuple[int, int] | None:
    """Start and end of the stop string that ends first; of those that end there, the longest."""
    found = [
        (text.find(stop) + len(stop), text.find(stop)) for stop in stops if text.find(stop) >= 0
    ]
    return None if not found else (min(found)[1], min(found)[0])


@given(texts, stops, st.booleans(), st.data())
def test_any_split_cuts_at_the_stop_string_completed_first(
    text: str, stops: list[str], included: bool, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, matched = run(pieces, stops, included=included)
    expected = first_completed(text, stops)
    if expected is None:
        assert (shown, matched) == (text, None)
    else:
        start, end = expected
        assert (shown, matched) == (text[: end if included else start], text[start:end])


@given(texts, stops)
def test_what_was_shown_is_never_taken_back(text: str, stops: list[str]) -> None:
    whole, _ = run([text], stops)
    matcher = StopStrings(stops, is_included=False)
    shown = ""
    for char in text:
        shown += matcher.push(char)
        assert whole.startswith(shown)
