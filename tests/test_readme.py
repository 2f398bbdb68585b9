import contextlib
import io
import re
from pathlib import Path

_README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", _README, re.DOTALL)
    assert len(blocks) == 5
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec("\n".join(blocks), {})
    printed = out.getvalue()
    assert printed.startswith("memory plan:")
    assert "length 16" in printed
    assert "(3, 4096)" in printed
    assert "[16, 16, 16]" in printed
    assert "(20, 128)" in printed
    losses = [float(word) for word in re.search("losses (.*)", printed)[1].split()]
    assert losses[-1] < 0.5 * losses[0]
    assert "goes on alike: True\npinned_host" in printed


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", _README)
    assert links
    for link in links:
        assert (Path(__file__).parent.parent / link).exists(), link
