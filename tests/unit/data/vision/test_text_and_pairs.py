"""Pairs of answers about pictures in OpenAI's content lists are the pairs of tags and `images`."""

import pytest
from support.pictures import write_picture

from erniekit.data.records.errors import BadLine
from erniekit.data.vision.formats import parse_vision_record
from erniekit.data.vision.media import MediaReader
from erniekit.data.vision.tags import FormatOptions

TAGGED = [{"role": "user", "content": "<image>Count the cups."}]
ANSWERS = {"chosen": "Three.", "rejected": "Two."}


@pytest.fixture
def options(tmp_path):
    write_picture(tmp_path / "a.png", 200, 100)
    return FormatOptions(MediaReader(tmp_path))


def parse(kind, record, options):
    return parse_vision_record(record, kind, "f.jsonl:7", options)


def text(words):
    return {"type": "text", "text": words}


def answer(words):
    return {"role": "assistant", "content": words}


def test_empty_fields_of_other_types_say_nothing(options):
    sample = parse("text", {"tgt": ["<image>", "a"], "images": ["a.png"], "src": [], "messages": None}, options)
    assert sample.kind == "text"
    with pytest.raises(BadLine, match="is of type erniekit, not text"):
        parse("text", {"tgt": ["a"], "src": ["q"]}, options)


class TestPairsInContentLists:
    """OpenAI's lists of parts in the prompt, the answers, or whole conversations: all the same pair."""

    URL = {"type": "image_url", "image_url": {"url": "a.png"}}  # noqa: RUF012
    QUESTION = {"role": "user", "content": [URL, text("Count the cups.")]}  # noqa: RUF012
    PLACE = {"role": "user", "content": [{"type": "image"}, text("Count the cups.")]}  # noqa: RUF012

    @staticmethod
    def side(words):
        return {"role": "assistant", "content": [text(words)]}

    def records(self):
        yield "messages", {"messages": [self.QUESTION], "chosen": "Three.", "rejected": "Two."}
        yield "messages", {"prompt": [self.PLACE], "images": ["a.png"], "chosen": "Three.", "rejected": "Two."}
        sides = {"chosen": self.side("Three."), "rejected": self.side("Two.")}
        yield "messages", {"messages": [self.QUESTION], **sides}
        yield "messages", {"messages": [self.QUESTION], **{key: [turn] for key, turn in sides.items()}}
        yield "messages", {key: [self.QUESTION, turn] for key, turn in sides.items()}
        yield "messages", {"images": "a.png", **{key: [self.PLACE, turn] for key, turn in sides.items()}}
        shared = {"from": "human", "value": self.QUESTION["content"]}
        yield "sharegpt", {"conversations": [shared], "chosen": "Three.", "rejected": "Two."}

    def test_all_are_the_same_pair(self, options):
        expected = parse("messages (DPO)", {"messages": TAGGED, "images": ["a.png"], **ANSWERS}, options)
        for kind, record in self.records():
            sample = parse(f"{kind} (DPO)", record, options)
            assert sample.answers == expected.answers
            parts = [dict(part) for part in sample.messages[0]["content"]]
            url = parts[0]["image"]
            parts[0]["image"] = url["url"] if isinstance(url, dict) else url
            assert parts == [{"type": "image", "image": "a.png"}, text("Count the cups.")]
            assert [turn["role"] for turn in sample.messages] == ["user"]

    def test_pictures_in_answers_are_refused(self, options):
        shown = {"role": "assistant", "content": [self.URL, text("This.")]}
        record = {"messages": [self.QUESTION], "chosen": shown, "rejected": "Two."}
        with pytest.raises(BadLine, match=r"chosen is the assistant's and has pictures"):
            parse("messages (DPO)", record, options)
        later = [answer("Which?"), self.QUESTION, answer("Three.")]
        record = {"messages": [self.QUESTION], "chosen": later, "rejected": "Two."}
        with pytest.raises(BadLine, match=r"the chosen answer has pictures.*prompt"):
            parse("messages (DPO)", record, options)

    def test_an_unknown_part_is_named(self, options):
        record = {
            "messages": [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}, text("?")]}],
            **ANSWERS,
        }
        with pytest.raises(BadLine, match=r"messages\[0\].content\[0\] is a part of type 'audio'.*image_url"):
            parse("messages (DPO)", record, options)

    def test_as_many_parts_without_a_source_as_pictures(self, options):
        record = {"prompt": [self.PLACE], "images": ["a.png", "b.png"], **ANSWERS}
        with pytest.raises(BadLine, match="1 <image> tag for 2 images"):
            parse("messages (DPO)", record, options)
