import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ef_jax
from ef_jax.cli import main
from ef_jax.cli.prompts import as_conversations
from ef_jax.text import Tokenizer
from tests.weights.synthetic import CONFIGS, random_tensors, write_checkpoint

PROMPTS = ["ROMEO:\nO, she doth teach", "oak, oak tree (noun):"]
SHORT = ["--max-new-tokens", "12", "--context", "64", "--chunk", "16"]


class Run:
    """One real run of the command: its one line of JSON, and the model that it loaded."""

    def __init__(self, *words: str) -> None:
        loaded = []
        load = ef_jax.load

        def remember(*args: Any, **settings: Any) -> ef_jax.LanguageModel:
            loaded.append(load(*args, **settings))
            return loaded[-1]

        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(ef_jax, "load", remember)
            self.code = main(["generate", *words, *SHORT, "--json"])
        self.out, self.err = out.getvalue(), err.getvalue()
        self.json = json.loads(self.out, parse_constant=pytest.fail)
        self.lm = loaded[0]


@pytest.fixture(scope="module")
def quarter() -> Run:
    return Run(*PROMPTS, "--expert-fraction", "0.25")


@pytest.fixture(scope="module")
def whole() -> Run:
    return Run(*PROMPTS, "--expert-fraction", "1.0")


@pytest.fixture
def reloaded(whole: Run, monkeypatch: pytest.MonkeyPatch) -> ef_jax.LanguageModel:
    """`ef_jax.load` gives a model that is loaded already."""

    def load(*args: Any, on_plan: Any, **settings: Any) -> ef_jax.LanguageModel:
        on_plan(whole.lm.plan)
        return whole.lm

    monkeypatch.setattr(ef_jax, "load", load)
    whole.lm.stats.reset()
    return whole.lm


def test_json_has_what_was_promised(quarter: Run) -> None:
    assert quarter.code == 0
    assert quarter.out.count("\n") == 1
    assert quarter.err == ""
    result = quarter.json
    for name in ("text", "tokens", "finish_reason", "logprobs"):
        assert len(result[name]) == 2
    assert [len(tokens) for tokens in result["tokens"]] == [12, 12]
    assert result["finish_reason"] == ["length", "length"]
    assert Path(result["model"]).name == "small_moe"
    assert result["plan"]["batch"] == 2
    names = "prefill_seconds decode_seconds tokens_per_second hits late_hits misses bytes_demand bytes_prefetch "
    names += "bytes_wasted stall_seconds peak_device_bytes slots experts"
    assert set(names.split()) <= result["stats"].keys()
    for name in ("hits", "misses", "late_hits"):
        assert sum(result["stats"][f"{name}_by_layer"]) == result["stats"][name]
        assert len(result["stats"][f"{name}_by_layer"]) == 8


def test_a_quarter_of_the_experts_is_really_offloaded(quarter: Run) -> None:
    stats, plan = quarter.json["stats"], quarter.json["plan"]
    assert plan["slots"] == stats["slots"] == 64 < stats["experts"] == 256
    assert stats["misses"] > 0
    assert stats["bytes_demand"] == stats["misses"] * plan["block_bytes"]
    assert 0 < stats["peak_device_bytes"] <= plan["total"] <= plan["budget"]


def test_the_text_does_not_depend_on_the_budget(quarter: Run, whole: Run) -> None:
    assert whole.json["stats"]["slots"] == 256
    for name in ("text", "tokens", "logprobs"):
        assert quarter.json[name] == whole.json[name]


def test_one_prompt_gives_its_text_alone(whole: Run, reloaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", PROMPTS[0], *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out == whole.json["text"][0] + "\n"
    assert captured.err == ""


def test_a_timeline_is_written_beside_the_text(
    whole: Run, reloaded: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", PROMPTS[0], *SHORT, "--timeline", str(tmp_path / "t.json")]
    assert main(words) == 0
    assert capsys.readouterr().out == whole.json["text"][0] + "\n"
    names = [event["name"] for event in json.loads((tmp_path / "t.json").read_text())["traceEvents"]]
    assert names.count("step") == 11
    assert main(words) == 2
    assert "exists: remove it or choose another name" in capsys.readouterr().err


def test_several_prompts_are_labelled_in_order(
    whole: Run, reloaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt.txt").write_text(PROMPTS[1] + "\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO((PROMPTS[0] + "\n").encode())))
    assert main(["generate", "-", *SHORT, "--prompt-file", str(tmp_path / "prompt.txt"), "--verbose"]) == 0
    captured = capsys.readouterr()
    first, second = whole.json["text"]
    assert captured.out == f"==> prompt 1 of 2 <==\n{first}\n==> prompt 2 of 2 <==\n{second}\n"
    assert captured.err.startswith("memory plan:")
    assert "decode" in captured.err


def test_a_terminal_gets_plan_and_stats_unless_quiet(
    reloaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, shown in ([[], True], [["--quiet"], False]):
        capsys.readouterr()
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert main(["generate", PROMPTS[0], *SHORT, *words]) == 0
        assert ("memory plan:" in capsys.readouterr().err) == shown


def test_sampling_options_reach_the_model(reloaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*words: str) -> list[int]:
        assert main(["generate", PROMPTS[0], *SHORT, "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["tokens"][0]

    greedy = tokens()
    ids = ",".join(map(str, reloaded.encode(PROMPTS[0]).tolist()))
    assert main(["generate", "--token-ids", ids, *SHORT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == [greedy]
    hot = tokens("--temperature", "1.5", "--seed", "1")
    assert hot != greedy
    assert hot == tokens("--temperature", "1.5", "--seed", "1")
    assert tokens("--temperature", "1.5", "--top-k", "1") == greedy
    assert tokens("--checkpoint-sampling", "--temperature", "0") == greedy
    as_checkpoint = ["--temperature", "0.8", "--top-p", "0.95"]
    assert tokens("--checkpoint-sampling", "--seed", "1") == tokens(*as_checkpoint, "--seed", "1")


def test_a_stop_string_ends_the_text(whole: Run, reloaded: Any, capsys: pytest.CaptureFixture[str]) -> None:
    text = whole.json["text"][0]
    stop = text[len(text) // 2 :][:3]
    assert main(["generate", PROMPTS[0], *SHORT, "--json", "--stop", "no such text", "--stop", stop]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["finish_reason"] == ["stop"]
    assert result["text"] == [text[: text.index(stop)]]


def test_what_json_lacks_becomes_null(
    reloaded: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = ef_jax.Generation(text="x", tokens=[1], finish_reason="length", logprobs=[float("nan")])
    monkeypatch.setattr(ef_jax.LanguageModel, "generate", lambda *args, **settings: [broken])
    assert main(["generate", PROMPTS[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["logprobs"] == [[None]]


def test_token_ids_work_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = CONFIGS["qwen2_moe"]
    model = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    (model / "tokenizer.json").unlink()
    words = ["generate", "--model", str(model), "--token-ids", "1, 2 3", "--max-new-tokens", "4", "--ignore-eos"]
    assert main(words) == 0
    ids = capsys.readouterr().out.strip().split(",")
    assert len(ids) == 4
    assert all(0 <= int(word) < config["vocab_size"] for word in ids)
    assert main([*words, "text"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_chat_uses_the_checkpoints_template(small_moe: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(small_moe / name, tmp_path)
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}[a]{% endif %}")
    conversations = as_conversations(["Hello", "Bye"], "Be brief.", tmp_path, 4096)
    tokenizer = Tokenizer.load(tmp_path, 4096)
    assert tokenizer is not None
    assert [tokenizer.decode(ids) for ids in conversations] == [
        f"[system] Be brief.\n[user] {said}\n[a]" for said in ("Hello", "Bye")
    ]
