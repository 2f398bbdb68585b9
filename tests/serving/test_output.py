"""An output's pieces, and how it ends."""

from pathlib import Path

import pytest

from ef_jax.sampling_options import SamplingOptions
from ef_jax.serving.output import Output
from ef_jax.text import Tokenizer

TEXT = "The quick fox — naïve — jumps over Ω and ends."


@pytest.fixture(scope="module")
def tokenizer(small_moe: Path) -> Tokenizer:
    loaded = Tokenizer.load(small_moe, 4096)
    assert loaded is not None
    return loaded


def fed(tokenizer: Tokenizer | None, ids: list[int], limit: int = 1000, **options) -> Output:
    output = Output(tokenizer, SamplingOptions(**options), eos=(0,), limit=limit)
    for token in ids:
        assert output.finish_reason is None
        output.push(token, -1.0)
    return output


def ids_of(tokenizer: Tokenizer) -> list[int]:
    return [int(token) for token in tokenizer.encode(TEXT)[1:]]


def test_pieces_join_to_the_text_without_empty_ones(tokenizer: Tokenizer):
    ids = ids_of(tokenizer)
    output = fed(tokenizer, [*ids, 0])
    assert output.finish_reason == "eos"
    assert "".join(output.pieces) == output.generation().text == TEXT
    assert all(output.pieces)
    assert output.generation().tokens == [*ids, 0]
    assert output.generation().logprobs == [-1.0] * (len(ids) + 1)


def test_a_stop_string_ends_it_also_where_it_straddles_tokens(tokenizer: Tokenizer):
    ids = ids_of(tokenizer)
    output = Output(tokenizer, SamplingOptions(stop=("jumps over",)), eos=(0,), limit=1000)
    for token in ids:
        output.push(token, -1.0)
        if output.finish_reason is not None:
            break
    assert output.finish_reason == "stop"
    assert output.generation().text == TEXT[: TEXT.index("jumps")]


def test_a_character_that_is_cut_off_reads_as_in_the_full_decoding(tokenizer: Tokenizer):
    ids = [int(token) for token in tokenizer.encode("so it is 🦄")[1:]]
    output = fed(tokenizer, ids[:-1], limit=len(ids) - 1)
    assert output.finish_reason == "length"
    assert output.generation().text == tokenizer.decode(ids[:-1])
    assert output.generation().text.endswith("\ufffd")


@pytest.mark.parametrize("reason", ["timeout", "cancelled"])
def test_closing_gives_out_what_was_held_back(tokenizer: Tokenizer, reason):
    ids = ids_of(tokenizer)
    output = fed(tokenizer, ids, stop=("ends.!",))
    assert "".join(output.pieces) == TEXT[: TEXT.index("ends.")]
    output.close(reason)
    assert (output.generation().text, output.finish_reason) == (TEXT, reason)


def test_without_a_tokenizer_there_is_no_text_but_the_same_ends():
    assert fed(None, [5, 6, 0]).finish_reason == "eos"
    assert fed(None, [5, 6], limit=2).finish_reason == "length"
    assert fed(None, [5, 0], limit=2, ignore_eos=True).finish_reason == "length"
    assert fed(None, [5, 0], limit=2).finish_reason == "eos"
    assert not fed(None, [5]).has_text
    assert fed(None, [5, 0]).generation().text is None
