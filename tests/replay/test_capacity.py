import pytest

from ef_jax.errors import InputError
from ef_jax.replay.capacity import parse_capacity


@pytest.mark.parametrize(
    ("text", "share", "slots"),
    [
        ("0.125", 0.125, 208),
        ("12.5%", 0.125, 208),
        ("208", 0.125, 208),
        ("1", 1.0, 1664),
        ("1.0", 1.0, 1664),
        (" .33 ", 0.33, 549),
        ("1664", 1.0, 1664),
        ("20MB", 2 / 1664, 2),
    ],
)
def test_shares_slots_and_bytes(text: str, share: float, slots: int) -> None:
    assert parse_capacity(text, experts=1664, block_bytes=10_000_000) == (share, slots)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "'0' is no slot at all: give at least 1 of the 1664 experts"),
        ("0.0001", "no slot at all"),
        ("1665", "'1665' is more than all 1664 experts: give 1664 slots at most"),
        ("101%", "more than all 1664 experts"),
        ("2.5", "neither a share from 0 to 1 nor a whole number of slots"),
        ("-0.5", "is not a size: write a share"),
        ("nan", "is not a size"),
        ("", "is not a size"),
        ("many", "is not a size"),
        ("9MB", "less than one block of 10 MB"),
        ("9" * 400, "more than all 1664 experts"),
    ],
)
def test_what_is_no_capacity(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_capacity(text, experts=1664, block_bytes=10_000_000)


def test_bytes_need_the_size_of_a_block() -> None:
    with pytest.raises(InputError, match="give --block-bytes"):
        parse_capacity("4GiB", experts=1664)
