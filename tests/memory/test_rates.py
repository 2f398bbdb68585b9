import pytest

from ef_jax.errors import InputError
from ef_jax.memory.rates import format_bandwidth, format_seconds, parse_bandwidth, parse_seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10us", 1e-5), ("0.3ms", 3e-4), (" 2 s ", 2.0), ("500ns", 5e-7), (".5ms", 5e-4), ("0", 0.0), ("0ms", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "10", "us", "-1us", "1e-5", "10 m", "nan", "infs", "2h", "4000s", "1..2s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InputError, match="not a duration: write for example 10us"):
        parse_seconds(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    [("25GB/s", 25e9), ("800 MB/s", 8e8), ("1.5GiB/s", 1.5 * 2**30), (" 25 gb / s ", 25e9), ("1000000B/s", 1e6)],
)
def test_bandwidths(text: str, rate: float) -> None:
    assert parse_bandwidth(text) == rate


@pytest.mark.parametrize("text", ["", "25", "25GB", "/s", "0GB/s", "-1GB/s", "25GB/h", "25Gbit/s", "infGB/s", "GB/s"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(InputError, match="not a bandwidth: write for example 25GB/s"):
        parse_bandwidth(text)


def test_formats() -> None:
    assert [format_seconds(value) for value in (2.0, 3e-4, 1e-5, 5e-8, 0.0)] == [
        "2 s",
        "300 us",
        "10 us",
        "50 ns",
        "0 s",
    ]
    assert format_bandwidth(25e9) == "25 GB/s"
