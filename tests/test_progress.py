import io

from ef_jax.progress import Progress


def test_a_bar_is_drawn_and_erased() -> None:
    stream = io.StringIO()
    with Progress(4_000_000_000, "B", "loading", stream, enabled=True) as progress:
        progress.update(1_000_000_000)
    assert "loading" in stream.getvalue()
    assert " 25% 1.00 GB/4.00 GB" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_nothing_is_drawn_off_a_terminal() -> None:
    stream = io.StringIO()
    with Progress(0, "layers", "converting", stream) as progress:
        progress.update()
    assert stream.getvalue() == ""


def test_a_note_says_how_it_goes() -> None:
    stream = io.StringIO()
    with Progress(2, "steps", "training", stream, enabled=True) as progress:
        progress.update(note="loss 0.25")
    assert ", loss 0.25\r" in stream.getvalue()
