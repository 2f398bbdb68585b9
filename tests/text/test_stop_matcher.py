from hypothesis import given
from hypothesis import strategies as st

from ef_jax.text import StopMatcher

_ALPHABET = "ab\n"
_PIECES = st.lists(st.text(_ALPHABET, max_size=4), max_size=12)
_STOPS = st.lists(st.text(_ALPHABET, min_size=1, max_size=4), max_size=3)


def _until_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """By definition: the shortest beginning of `text` that ends with a stop string, less the longest such."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@given(_PIECES, _STOPS)
def test_agrees_with_naive_search_however_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    expected, stopped = _until_stop("".join(pieces), stop)
    matcher = StopMatcher(stop)
    out = "".join(matcher.push(piece) for piece in pieces)
    assert matcher.stopped == stopped
    assert out + matcher.flush() == expected


@given(_PIECES, _STOPS)
def test_never_shows_text_of_a_stop_string_and_holds_back_no_more_than_it_must(
    pieces: list[str], stop: list[str]
) -> None:
    matcher = StopMatcher(stop)
    text = out = ""
    for piece in pieces:
        text += piece
        out += matcher.push(piece)
        if matcher.stopped:
            break
        held = text[len(out) :]
        assert text.startswith(out)
        assert not held or any(s.startswith(held) and s != held for s in stop)


def test_stop_string_over_three_tokens() -> None:
    matcher = StopMatcher(("\n\nUser:",))
    assert [matcher.push(piece) for piece in ("Yes.", "\n", "\nUs", "er: no")] == ["Yes.", "", "", ""]
    assert matcher.stopped
    assert matcher.flush() == ""
    assert matcher.push("more") == ""


def test_a_beginning_that_comes_to_nothing_is_released() -> None:
    matcher = StopMatcher(("END",))
    assert [matcher.push(piece) for piece in ("an E", "N", "tity")] == ["an ", "", "ENtity"]
    assert matcher.push("EN") == ""
    assert matcher.flush() == "EN"
