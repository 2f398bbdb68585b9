import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ef_jax.errors import CheckpointError, InputError
from ef_jax.text import StreamDecoder, Tokenizer, require_tokenizer

_VOCAB = 4096
_CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(small_moe: Path) -> Tokenizer:
    loaded = Tokenizer.load(small_moe, _VOCAB)
    assert loaded is not None
    return loaded


@pytest.fixture
def copy(small_moe: Path, tmp_path: Path) -> Path:
    """The bundled model's tokenizer files, to be changed."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_moe / name, tmp_path)
    return tmp_path


def test_bundled_prompts_start_with_bos(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello")
    assert ids[0] == 0
    assert tokenizer.decode(ids) == "hello"
    assert tokenizer.encode("") == [0]


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_text_survives_encoding_whole_and_streamed(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"
    assert "".join(pieces) + stream.flush() == text


@given(ids=st.lists(st.integers(0, _VOCAB - 1) | st.integers(160, 260), max_size=200))
def test_any_ids_stream_to_the_full_decoding(tokenizer: Tokenizer, ids: list[int]) -> None:
    stream = tokenizer.stream()
    out = ""
    full = tokenizer.decode(ids)
    for token in ids:
        out += stream.push(token)
        assert full.startswith(out)
    assert out + stream.flush() == full


def test_endless_broken_bytes_are_shown_in_a_bounded_window(tokenizer: Tokenizer) -> None:
    continuation = tokenizer.encode("\N{GRINNING FACE}")[-1]  # the last byte alone
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return tokenizer.decode(ids)

    stream = StreamDecoder(decode)
    ids = [continuation] * 500
    pieces = [stream.push(token) for token in ids]
    assert len("".join(pieces)) >= 497
    assert longest <= 65
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_keeps_the_space_that_a_decoder_strips_at_the_front() -> None:
    words = ["▁a", "▁b", "c", "▁", "▁d"]

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    ids = [0, 1, 2, 3, 4, 1, 1]
    stream = StreamDecoder(decode)
    assert "".join(stream.push(i) for i in ids) + stream.flush() == decode(ids) == "a bc  d b b"


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), _VOCAB + 7, *tokenizer.encode("b")]
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in ids) + stream.flush() == tokenizer.decode(ids) == "ab"


def test_no_tokenizer_files_gives_none_and_text_prompts_name_the_way_out(tmp_path: Path) -> None:
    assert Tokenizer.load(tmp_path, _VOCAB) is None
    with pytest.raises(InputError, match="give token ids instead"):
        require_tokenizer(None)


def test_tokenizer_of_another_model_is_refused(small_moe: Path) -> None:
    with pytest.raises(CheckpointError, match="ids up to 4095 but the model's vocabulary ends at 999"):
        Tokenizer.load(small_moe, 1000)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "\x00\x01", "[]"])
def test_broken_tokenizer_is_one_clear_line(copy: Path, content: str) -> None:
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .* (cannot be loaded|has no tokens)") as error:
        Tokenizer.load(copy, _VOCAB)
    assert "\n" not in str(error.value)


def test_code_of_a_checkpoint_is_never_run(copy: Path) -> None:
    marker = copy / "ran"
    (copy / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(CheckpointError):
        Tokenizer.load(copy, _VOCAB)
    assert not marker.exists()


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="not valid text: surrogates not allowed at character 2"):
        tokenizer.encode("ab\udc80")


def test_chat_goes_through_the_template_without_a_second_bos(copy: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "<|endoftext|>" + _CHATML}))
    chatty = Tokenizer.load(copy, _VOCAB)
    assert chatty is not None
    ids = chatty.chat([{"role": "user", "content": "Hi"}])
    assert ids == tokenizer.encode("<user>Hi\n<assistant>")


def test_chat_mistakes_are_named(copy: Path, tokenizer: Tokenizer) -> None:
    pytest.importorskip("jinja2")
    with pytest.raises(InputError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "Hi"}])
    (copy / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    refusing = Tokenizer.load(copy, _VOCAB)
    assert refusing is not None
    with pytest.raises(InputError, match="refuses these messages: roles must alternate"):
        refusing.chat([{"role": "user", "content": "Hi"}])
    with pytest.raises(InputError, match="conversation is empty"):
        refusing.chat([])
    with pytest.raises(InputError, match="needs a 'role' and a 'content'"):
        refusing.chat([{"role": "user"}])
