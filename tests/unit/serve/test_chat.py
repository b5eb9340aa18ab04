"""`erniekit chat` through pipes and in a terminal."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.terminal import PATIENCE, Terminal
from support.tiny_directories import model_directory

from erniekit.config import Config, load
from erniekit.data.chat.tokenizer import StreamDecoder
from erniekit.generation import choosing
from erniekit.generation.load import open_model
from erniekit.serve.chat import Screen, chat
from erniekit.serve.conversation import Conversation
from erniekit.utils import streams
from erniekit.utils.errors import UserError

CLI = [sys.executable, "-m", "erniekit", "chat"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_directory(tmp_path_factory.mktemp("model"))


def settings(model_dir: Path, **keys: object) -> Config:
    values: dict[str, object] = {"model_name_or_path": str(model_dir), "compute_type": "fp32", "max_new_tokens": 8}
    return load(None, values | {"temperature": 0} | keys, command="chat")


def conversation(model_dir: Path, **keys: object) -> Conversation:
    cfg = settings(model_dir, **keys)
    return Conversation(cfg, open_model(cfg))


def say(talk: Conversation, question: str) -> str:
    return "".join(text for _, text in talk.ask(question))


class TestConversation:
    def test_the_answer_is_what_the_model_says_to_the_whole_conversation(self, model_dir: Path):
        talk = conversation(model_dir)
        opened = open_model(settings(model_dir))
        for question in ("1?", "2?", "3?"):
            asked = [*talk.messages, {"role": "user", "content": question}]
            answer = say(talk, question)
            ids = opened.template.prompt_ids(asked)
            for _ in range(8):
                ids.append(int(opened.model(np.array([ids])).numpy()[0, -1].argmax()))
            decoder = StreamDecoder(opened.tokenizer)
            assert answer == "".join([*map(decoder.push, ids[-8:]), decoder.flush()])
            assert talk.messages == [*asked, {"role": "assistant", "content": answer}]

    def test_what_was_said_is_not_computed_again(self, model_dir: Path):
        talk = conversation(model_dir)
        template = open_model(settings(model_dir)).template
        say(talk, "25加16等于几？")
        assert talk.session.reused == 0
        say(talk, "?")
        assert talk.session.reused >= len(template.prompt_ids([{"role": "user", "content": "25加16等于几？"}]))

    def test_history_that_reads_otherwise_is_fed_again(self, model_dir: Path):
        talk, fresh = conversation(model_dir), conversation(model_dir)
        say(talk, "abc")
        talk.messages = [{"role": "user", "content": "abd"}, {"role": "assistant", "content": "no"}]
        fresh.messages = list(talk.messages)
        assert say(talk, "why?") == say(fresh, "why?")
        assert 0 < talk.session.reused < 10

    def test_clear_forgets(self, model_dir: Path):
        talk = conversation(model_dir, temperature=1.5, top_p=1.0, seed=3)
        first = [say(talk, "a"), say(talk, "a")]
        talk.clear()
        assert talk.messages == []
        assert [say(talk, "a"), say(talk, "a")] == first

    def test_sampling_keys_decide(self, model_dir: Path):
        def answer(**keys: object) -> str:
            return say(conversation(model_dir, top_p=1.0, **keys), "a")

        greedy = answer(temperature=0)
        assert answer(temperature=1.5, top_k=1) == greedy
        assert answer(temperature=1.5, seed=1) == answer(temperature=1.5, seed=1) != greedy
        assert answer(temperature=1.5, seed=1) != answer(temperature=1.5, seed=2)
        long = answer(temperature=0, max_new_tokens=40)
        assert answer(temperature=0, max_new_tokens=40, repetition_penalty=30.0) != long

    def test_stopping_early_keeps_what_was_said(self, model_dir: Path):
        talk = conversation(model_dir, max_new_tokens=60)
        pieces = talk.ask("a")
        said = next(pieces)[1] + next(pieces)[1]
        pieces.close()
        assert talk.messages[-1] == {"role": "assistant", "content": said}
        fresh = conversation(model_dir, max_new_tokens=60)
        fresh.messages = list(talk.messages)
        assert say(talk, "b") == say(fresh, "b")

    def test_a_prompt_that_does_not_fit_leaves_the_conversation_as_it_was(self, tmp_path: Path):
        talk = conversation(model_directory(tmp_path / "small", max_position_embeddings=40))
        with pytest.raises(UserError, match="context is 40 tokens"):
            say(talk, "word " * 60)
        assert talk.messages == []
        assert say(talk, "a")

    def test_thought_and_answer_come_apart(self, model_dir: Path, monkeypatch: pytest.MonkeyPatch):
        keys = {"chat_template": "thinking", "max_new_tokens": 100}
        opened = open_model(settings(model_dir, **keys))
        said = opened.tokenizer.encode("why\n</think>\n\n<response>\nyes\n</response>\n")
        rigged = iter([*said, opened.template.stop_ids[0]])
        monkeypatch.setattr(choosing, "_fill", lambda table, *_: table.fill(next(rigged)))
        talk = conversation(model_dir, **keys)
        pieces = list(talk.ask("a"))
        assert "".join(text for part, text in pieces if part == "thought") == "why"
        assert "".join(text for part, text in pieces if part == "answer") == "yes"
        assert talk.messages[-1]["content"] == "yes"


def words(model_dir: Path, *keys: str) -> list[str]:
    settings = (f"model_name_or_path={model_dir}", "compute_type=fp32", "max_new_tokens=8", "temperature=0")
    return [*CLI, *settings, *keys]


def through_a_pipe(model_dir: Path, text: bytes, *keys: str) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(words(model_dir, *keys), input=text, capture_output=True, check=False, timeout=PATIENCE)


class TestPipe:
    def test_standard_output_has_the_answers_and_nothing_else(self, model_dir: Path):
        talk = conversation(model_dir)
        first, second = say(talk, "1?"), say(talk, "2?")
        done = subprocess.run(
            words(model_dir),
            input=b"1?\n\n2?\nclear\n1?\nexit\n3?\n",
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.decode() == f"{first}\n{second}\n{first}\n"
        assert b"User" not in done.stderr

    @pytest.mark.parametrize(
        "variables",
        [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
        ids=["locale", "streams"],
    )
    def test_chinese_in_an_ascii_terminal(self, model_dir: Path, variables: dict[str, str]):
        answer = say(conversation(model_dir), "1加1等于几？")
        done = subprocess.run(
            words(model_dir),
            input="1加1等于几？\n".encode(),
            capture_output=True,
            check=False,
            timeout=PATIENCE,
            env={**os.environ, **variables},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == answer.encode("ascii", "replace") + b"\n"

    @pytest.fixture
    def through_a_pipe(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, bytes], None]:
        def run(cfg: Config, text: bytes) -> None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
            streams.prepare()  # as the command does
            chat(cfg)

        return run

    def test_a_last_line_without_an_end_and_no_streaming(
        self,
        model_dir: Path,
        through_a_pipe: Callable[[Config, bytes], None],
        capsys: pytest.CaptureFixture[str],
    ):
        through_a_pipe(settings(model_dir, stream=False), "你好".encode())
        assert capsys.readouterr().out == say(conversation(model_dir), "你好") + "\n"

    def test_a_question_that_cannot_be_asked_is_an_error(
        self, model_dir: Path, through_a_pipe: Callable[[Config, bytes], None]
    ):
        with pytest.raises(UserError, match=r"is not text in .*PYTHONIOENCODING"):
            through_a_pipe(settings(model_dir), "你好\n".encode("gbk"))

    def test_an_interrupt_ends_the_command(
        self, model_dir: Path, through_a_pipe: Callable[[Config, bytes], None], monkeypatch: pytest.MonkeyPatch
    ):
        """The answers after one that was cut off would look as if all was well."""

        def answer(_: Conversation, question: str) -> Iterator[tuple[str, str]]:
            yield "answer", "so"
            raise KeyboardInterrupt

        monkeypatch.setattr(Conversation, "ask", answer)
        with pytest.raises(KeyboardInterrupt):
            through_a_pipe(settings(model_dir), b"1?\n2?\n")

    def test_calls_are_shown_readably_beside_the_answer(
        self,
        model_dir: Path,
        through_a_pipe: Callable[[Config, bytes], None],
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ):
        said = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "二"}}\n</tool_call>\n'

        def ask(talk: Conversation, question: str) -> Iterator[tuple[str, str]]:
            yield "answer", said if question == "1+2?" else "none"
            talk.messages = [*talk.messages, {"role": "assistant", "content": said if question == "1+2?" else "none"}]

        monkeypatch.setattr(Conversation, "ask", ask)
        through_a_pipe(settings(model_dir), b"1+2?\nhi\n")
        captured = capsys.readouterr()
        assert captured.out == f"{said}\nnone\n"
        assert captured.err.count("the model calls") == 1
        assert 'the model calls add(a=1, b="二"); tools are not run here' in captured.err

    def test_thoughts_are_not_on_standard_output(
        self,
        model_dir: Path,
        through_a_pipe: Callable[[Config, bytes], None],
        capsys: pytest.CaptureFixture[str],
    ):
        through_a_pipe(settings(model_dir, chat_template="thinking"), b"hi\n")
        captured = capsys.readouterr()
        assert captured.out == "\n"
        assert "thinking process:" in captured.err


@pytest.fixture
def terminal(model_dir: Path) -> Iterator[Callable[..., Terminal]]:
    begun: list[Terminal] = []

    def begin(*keys: str) -> Terminal:
        begun.append(Terminal(words(model_dir, *keys)))
        return begun[-1]

    yield begin
    for one in begun:
        one.kill()


class TestTerminal:
    def test_a_conversation(self, terminal: Callable[..., Terminal], model_dir: Path):
        shown = say(conversation(model_dir), "hi")[:3]
        screen = terminal()
        for line in ("hi\n", "clear\n", "hi\n"):
            screen.expect("User: ")
            screen.type(line)
            screen.expect("forgotten" if line == "clear\n" else f"Assistant: {shown}")
        screen.expect("User: ")
        screen.type("exit\n")
        assert screen.exit_code() == 0

    def test_an_interrupt_stops_a_labelled_answer(self, terminal: Callable[..., Terminal]):
        screen = terminal("max_new_tokens=4000", "min_tokens=4000", "chat_template=thinking")
        screen.expect("User: ")
        screen.type("hi\n")
        screen.expect("Assistant: ")
        screen.expect("thinking process:")
        screen.type("\x03")
        screen.expect("stopped")
        screen.expect("User: ")
        screen.type("exit\n")
        assert screen.exit_code() == 0

    @pytest.mark.parametrize(
        ("script", "left"),
        [
            (["^C", "^C"], []),
            (["^C", "hi", "^C", "^C"], []),
            (["^C", "clear", "^C", "exit", "hi"], ["hi"]),
            (["hi", None, "hi"], ["hi"]),
            (["hi, stopped", "^C", "hi"], ["hi"]),
        ],
    )
    def test_two_interrupts_in_a_row_leave(
        self, model_dir: Path, monkeypatch: pytest.MonkeyPatch, script: list[str | None], left: list[str]
    ):
        typed = iter(script)

        def ask(_: Screen) -> str | None:
            line = next(typed)
            if line == "^C":
                raise KeyboardInterrupt
            return line

        def answer(_: Conversation, question: str) -> Iterator[tuple[str, str]]:
            yield "answer", "so"
            if "stopped" in question:
                raise KeyboardInterrupt

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(Screen, "ask", ask)
        monkeypatch.setattr(Conversation, "ask", answer)
        chat(settings(model_dir))
        assert list(typed) == left
