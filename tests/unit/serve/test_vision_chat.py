"""A conversation about pictures: what is typed, what the model is fed, and the tools that it calls."""

import functools
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pictures import blocks, write_picture
from support.tiny_directories import model_directory
from support.vision_directories import vision_model_directory

import erniekit
from erniekit.config import Config, load
from erniekit.data.vision.sequence import MediaTokens, expand
from erniekit.generation import choosing, generate
from erniekit.generation.load import ChatModel, open_model
from erniekit.generation.session import Session
from erniekit.serve.chat import chat
from erniekit.serve.conversation import Conversation
from erniekit.utils import log, streams
from erniekit.utils.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_model_directory(tmp_path_factory.mktemp("model") / "vl", weights=True, max_pixels=84 * 84)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a few pictures and a clip."""
    monkeypatch.chdir(tmp_path)
    write_picture(tmp_path / "cup.png", 84, 56, seed=1)
    write_picture(tmp_path / "my dog.png", 84, 56, seed=2)
    for number in range(4):
        write_picture(tmp_path / "clip" / f"{number}.png", 56, 56, seed=number)
    return tmp_path


def settings(model_dir: Path, **keys: object) -> Config:
    values: dict[str, object] = {"model_name_or_path": str(model_dir), "compute_type": "fp32", "max_new_tokens": 6}
    return load(None, values | {"temperature": 0} | keys, command="chat")


@functools.cache
def opened(model_dir: Path, chat_template: str | None) -> ChatModel:
    return open_model(settings(model_dir, chat_template=chat_template))


def conversation(model_dir: Path, **keys: object) -> Conversation:
    cfg = settings(model_dir, **keys)
    return Conversation(cfg, opened(model_dir, cfg.chat_template))


def say(talk: Conversation, question: str) -> str:
    return "".join(text for part, text in talk.ask(question) if part == "answer")


def notes(talk: Conversation, question: str) -> list[str]:
    return [text for part, text in talk.ask(question) if part == "note"]


def from_arrays(model_dir: Path, messages: list[dict[str, Any]]) -> str:
    """What the model answers to the processor's arrays."""
    model, processor = opened(model_dir, None).model, erniekit.load_processor(model_dir)
    arrays = processor(messages, add_generation_prompt=True)
    ends = [*processor.template.stop_ids, *model.end_ids]
    ids = generate.generate(model, **arrays, max_new_tokens=6, eos_token_id=ends).numpy()[
        0, arrays["input_ids"].shape[1] :
    ]
    return processor.tokenizer.decode([i for i in ids.tolist() if i not in ends])


class TestTyped:
    def test_a_conversation_with_pictures_is_what_the_processor_makes_of_it(self, model_dir: Path):
        talk = conversation(model_dir)
        first = say(talk, "<image>cup.png</image>What is this?")
        asked: list[dict[str, Any]] = [
            {"role": "user", "content": [{"type": "image", "image": "cup.png"}, "What is this?"]}
        ]
        assert first == from_arrays(model_dir, asked)
        second = say(talk, "And <image>my dog.png</image> beside <video>clip</video>?")
        parts = ["And ", {"type": "image", "image": "my dog.png"}, " beside ", {"type": "video", "video": "clip"}, "?"]
        asked += [{"role": "assistant", "content": first}, {"role": "user", "content": parts}]
        assert second == from_arrays(model_dir, asked)
        third = say(talk, "Why?")
        asked += [{"role": "assistant", "content": second}, {"role": "user", "content": "Why?"}]
        assert third == from_arrays(model_dir, asked)

    def test_a_line_before_the_question_is_the_same_as_a_tag(self, model_dir: Path):
        tagged, added = conversation(model_dir), conversation(model_dir)
        assert added.add("image", "my dog.png").endswith("my dog.png, 84 x 56 pixels, 6 tokens")
        assert say(added, "what?") == say(tagged, "<img>my dog.png</img>what?")
        assert "images" not in str(added.messages)
        assert say(added, "why?") == say(tagged, "why?"), "it is shown once"

    def test_pictures_are_numbered_over_the_whole_dialogue(self, model_dir: Path):
        talk = conversation(model_dir)
        assert [note.split(",")[0] for note in notes(talk, "<image>cup.png</image>a")] == ["Picture 1: cup.png"]
        found = notes(talk, "<video>clip</video><image>cup.png</image>b")
        assert [note.split(",")[0] for note in found] == ["Video 1: clip", "Picture 2: cup.png"]
        text = opened(model_dir, None).template.render(talk.messages)
        assert text.index("Picture 1:") < text.index("Video 1:") < text.index("Picture 2:")

    def test_a_doubt_about_a_clip_is_said_once(self, model_dir: Path):
        """It is opened when it is typed, and again when the prompt is encoded."""
        with log.captured() as lines:
            say(conversation(model_dir), "<video>clip</video>What happens?")
        assert sum("frames of a video come without times" in text for _, text in lines) == 1

    def test_what_the_model_has_seen_is_not_decoded_again(self, model_dir: Path, here: Path):
        talk, fresh = conversation(model_dir), conversation(model_dir)
        first = say(talk, "<image>cup.png</image>a")
        say(fresh, "<image>cup.png</image>a")
        fresh.session.clear()
        (here / "cup.png").unlink()
        assert say(talk, "b") == say(fresh, "b")
        assert talk.session.reused > len(first)

    def test_another_picture_of_the_same_size_is_not_taken_for_the_one_before(self, model_dir: Path):
        talk, fresh = conversation(model_dir), conversation(model_dir)
        say(talk, "<image>cup.png</image>a")
        talk.messages = []
        answer = say(talk, "<image>my dog.png</image>a")
        assert answer == say(fresh, "<image>my dog.png</image>a")
        arrays = erniekit.load_processor(model_dir)(talk.messages)
        assert talk.session.reused == int(arrays["mm_token_type_ids"][0].argmax()), "all before the picture"

    @pytest.mark.parametrize(
        ("path", "reason"),
        [
            ("none.png", r"none\.png: there is no file .* \(paths are relative to"),
            ("broken.png", "broken.png"),
            ("clip", "is a directory"),
            ("", "no path"),
            ("https://example.org/a.png", "downloading"),
        ],
    )
    def test_what_cannot_be_read_leaves_the_conversation_as_it_was(
        self, model_dir: Path, here: Path, path: str, reason: str
    ):
        (here / "broken.png").write_bytes((here / "cup.png").read_bytes()[:60])
        talk = conversation(model_dir)
        say(talk, "<image>cup.png</image>a")
        before = list(talk.messages)
        with pytest.raises(UserError, match=reason):
            say(talk, f"<image>{path}</image>b")
        with pytest.raises(UserError, match=reason):
            talk.add("image", path)
        assert talk.messages == before
        fresh = conversation(model_dir)
        say(fresh, "<image>cup.png</image>a")
        assert say(talk, "c") == say(fresh, "c")

    def test_a_text_model_is_not_shown_pictures(self, tmp_path: Path):
        talk = conversation(model_directory(tmp_path / "text"))
        with pytest.raises(UserError, match="text alone"):
            talk.add("image", "cup.png")
        say(talk, "<image>cup.png</image>")
        assert talk.messages[0]["content"] == "<image>cup.png</image>"


class TestPipe:
    @pytest.fixture
    def through_a_pipe(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[Config, str], None]:
        def run(cfg: Config, text: str) -> None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))
            streams.prepare()
            chat(cfg)

        return run

    def test_lines_with_pictures(
        self,
        model_dir: Path,
        through_a_pipe: Callable[[Config, str], None],
        capsys: pytest.CaptureFixture[str],
    ):
        talk = conversation(model_dir)
        answers = [say(talk, "<image>cup.png</image>a"), say(talk, "<image>my dog.png</image>b")]
        through_a_pipe(settings(model_dir), "<image>cup.png</image>a\n/image my dog.png\nb\n")
        captured = capsys.readouterr()
        assert captured.out == "".join(answer + "\n" for answer in answers)
        assert "[Picture 2: my dog.png, 84 x 56 pixels, 6 tokens]" in captured.err

    @pytest.mark.parametrize("line", ["/image none.png", "<image>none.png</image>a"])
    def test_a_missing_file_ends_a_script(
        self, model_dir: Path, through_a_pipe: Callable[[Config, str], None], line: str
    ):
        with pytest.raises(UserError, match="there is no file"):
            through_a_pipe(settings(model_dir), f"{line}\n")


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[int]]]:
    """Make the model say given texts, one a message; gives the prompts that it was fed."""

    def rig(talk: Conversation, *texts: str) -> list[list[int]]:
        template = talk._chat_model.template
        ids = [i for text in texts for i in (*template.tokenizer.encode(text), template.stop_ids[0])]
        said: Iterator[int] = iter(ids)
        monkeypatch.setattr(choosing, "_fill", lambda table, *_: table.fill(next(said)))
        fed: list[list[int]] = []
        answer = Session.answer

        def record(self: Session, prompt: Any, *rest: Any) -> Any:
            fed.append(list(getattr(prompt, "ids", prompt)))
            return answer(self, prompt, *rest)

        monkeypatch.setattr(Session, "answer", record)
        return fed

    return rig


def call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


ZOOM = "image_zoom_in_tool"


class TestTools:
    def thinking(self, model_dir: Path, **keys: object) -> Conversation:
        tools = {"chat_template": "vl_thinking", "chat_tools": ZOOM, "max_new_tokens": 400}
        return conversation(model_dir, **(tools | keys))

    def test_a_zoom_s_crop_is_the_next_picture(self, model_dir: Path, rigged: Callable[..., list[list[int]]]):
        talk = self.thinking(model_dir)
        fed = rigged(
            talk,
            "small\n</think>\n\n" + call(ZOOM, '{"bbox_2d": [0, 0, 500, 500], "label": "cup"}'),
            "now I see\n</think>\n\nred",
        )
        pieces = list(talk.ask("<image>cup.png</image>colour?"))
        assert "".join(text for part, text in pieces if part == "answer") == "red"
        assert "".join(text for part, text in pieces if part == "thought") == "smallnow I see"
        found = [text for part, text in pieces if part == "note"]
        assert found[1] == f'the model calls {ZOOM}(bbox_2d=[0, 0, 500, 500], label="cup")'
        assert found[2].startswith("Picture 2: cup of Picture 1, 42 x 28 pixels, enlarged to ")
        question, calls, result, answer = talk.messages
        assert question["role"] == "user" and calls["reasoning_content"] == "small"
        assert result["role"] == "tool" and result["content"][0]["image"].shape[:2] > (28, 42)
        assert (answer["content"], answer["reasoning_content"]) == ("red", "now I see")
        assert len(fed) == 2

    @pytest.mark.parametrize("rounds", [1, 2])
    def test_what_the_model_is_fed_is_the_training_row_of_the_dialogue(
        self, model_dir: Path, rigged: Callable[..., list[list[int]]], rounds: int
    ):
        talk = self.thinking(model_dir)
        zooms = [
            f"look {i}\n</think>\n\n" + call(ZOOM, f'{{"bbox_2d": [0, 0, {500 + i}, 500], "img_idx": {i}}}')
            for i in range(rounds)
        ]
        fed = rigged(talk, *zooms, "done\n</think>\n\nred", "once more\n</think>\n\nblue")
        say(talk, "<image>cup.png</image>colour?")
        say(talk, "and <image>my dog.png</image>?")
        template, tokenizer = talk._chat_model.template, talk._chat_model.tokenizer
        ids, _ = template.labels(template.encode(talk.messages, talk.tools))
        plans = [
            plan.geometry.tokens for plan in erniekit.load_processor(model_dir).plan(talk.messages, *reader_and_notes())
        ]
        row = expand(ids, [-100] * len(ids), plans, MediaTokens.of(tokenizer)).ids.tolist()
        for prompt in fed:
            assert row[: len(prompt)] == prompt
        assert row[len(fed[-1]) :] == [
            *tokenizer.encode("once more\n</think>\n\nblue"),
            tokenizer.token_id("<|end_of_sentence|>"),
        ]

    def test_search(self, model_dir: Path, here: Path, rigged: Callable[..., list[list[int]]]):
        for number in (1, 2, 3, 4):
            write_picture(here / "store" / f"{number}.png", 84, 56, seed=number)
        talk = self.thinking(model_dir, chat_tools="image_search", image_search_dir=str(here / "store"))
        rigged(talk, "who?\n</think>\n\n" + call("image_search", '{"img_idx": 0}'), "ok\n</think>\n\na cup")
        found = notes(talk, "<image>cup.png</image>what?")
        assert found[2].startswith("Pictures 2 to 4: similar to Picture 1: 1.png, ")
        content = talk.messages[2]["content"]
        assert content[0]["text"] == "1.png (similarity 1.00)\n"
        np.testing.assert_array_equal(content[1]["image"], blocks(84, 56, seed=1))

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            (call("paint", "{}"), "there is no tool 'paint'; the tools are image_zoom_in_tool"),
            (call(ZOOM, "{}"), "bbox_2d is missing"),
            (call(ZOOM, '{"bbox_2d": [0, 0, 1001, 5]}'), "outside the picture"),
            (call(ZOOM, '{"bbox_2d": [9, 0, 1, 5]}'), "corners swapped"),
            (call(ZOOM, '{"bbox_2d": [0, 0, 1, 5], "img_idx": 1}'), "img_idx is 1, but the pictures have the numbers"),
            ('<tool_call>{"name": }</tool_call>', "the call cannot be read"),
        ],
    )
    def test_a_wrong_call_is_answered_with_what_is_wrong(
        self, model_dir: Path, rigged: Callable[..., list[list[int]]], text: str, error: str
    ):
        talk = self.thinking(model_dir)
        rigged(talk, f"x\n</think>\n\n{text}", "y\n</think>\n\nsorry")
        assert say(talk, "<image>cup.png</image>a") == "sorry"
        assert talk.messages[2]["role"] == "tool"
        assert talk.messages[2]["content"].startswith("Error: ") and error in talk.messages[2]["content"]

    def test_rounds_are_bounded(self, model_dir: Path, rigged: Callable[..., list[list[int]]]):
        talk = self.thinking(model_dir, max_tool_rounds=2)
        again = "x\n</think>\n\n" + call(ZOOM, '{"bbox_2d": [0, 0, 500, 500]}')
        fed = rigged(talk, again, again, again, again)
        found = notes(talk, "<image>cup.png</image>a")
        assert len(fed) == 4
        results = [message["content"] for message in talk.messages if message["role"] == "tool"]
        assert [isinstance(content, list) for content in results] == [True, True, False]
        assert "no more calls are allowed" in results[2]
        assert "max_tool_rounds: 2" in found[-1]

    def test_stopping_within_the_calls_leaves_the_conversation_as_it_was(
        self, model_dir: Path, rigged: Callable[..., list[list[int]]]
    ):
        talk = self.thinking(model_dir)
        rigged(talk, "x\n</think>\n\n" + call(ZOOM, '{"bbox_2d": [0, 0, 500, 500]}'), "y\n</think>\n\nred")
        pieces = talk.ask("<image>cup.png</image>a")
        while not next(pieces)[1].startswith("Picture 2"):
            pass
        pieces.close()
        assert talk.messages == []

    def test_only_a_model_with_pictures_has_them(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"chat_tools: .* text alone"):
            conversation(model_directory(tmp_path / "text"), chat_tools=ZOOM)

    def test_search_needs_a_directory_of_pictures(self, model_dir: Path, tmp_path: Path):
        with pytest.raises(ConfigError, match="image_search_dir: needed"):
            settings(model_dir, chat_tools="image_search")
        with pytest.raises(ConfigError, match="image_search_dir: there is no directory"):
            self.thinking(model_dir, chat_tools="image_search", image_search_dir=str(tmp_path / "none"))
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigError, match="holds no picture"):
            self.thinking(model_dir, chat_tools="image_search", image_search_dir=str(tmp_path / "empty"))


def reader_and_notes() -> tuple[Any, Any]:
    from erniekit.data.records.fields import Notes
    from erniekit.data.vision.media import MediaReader

    return MediaReader(Path.cwd()), Notes()
