"""Prompts for reinforcement learning: ids as generation has them, over-long and unanswered ones named and counted."""

import json

import numpy as np
import pytest
from support.pictures import DEMO_MODEL, vision_directory, write_picture

from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.prompts import PromptOptions, PromptSet
from erniekit.data.records.dataset import SourceSpec
from erniekit.data.vision.encode import VisionSpec
from erniekit.data.vision.processor import load_processor
from erniekit.utils.errors import DataError

RECORDS = [
    {"src": ["2+3="], "answer": "5", "difficulty": 0.5},
    {"src": ["1+1=", "and 3+4?"], "tgt": ["2"], "answer": "7"},
    {"src": ["one two three " * 40], "answer": "many"},
    {"src": ["Say hello."]},
]


def open_set(directory, records=RECORDS, kind="erniekit", **options):
    path = directory / "rl.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    template = load_template(load_tokenizer(DEMO_MODEL), options.pop("chat_template", None))
    options = PromptOptions(**({"template": template, "max_prompt_len": 60} | options))
    return PromptSet.open([SourceSpec(str(path), f"{kind} (RL)", 1.0)], "train", options, None)


def test_ids_are_those_that_generation_continues(tmp_path):
    prompts = open_set(tmp_path)
    template = load_template(load_tokenizer(DEMO_MODEL))
    assert len(prompts) == 3
    first, second, third = (prompts[i] for i in range(3))
    assert first.ids == template.prompt_ids([{"role": "user", "content": "2+3="}])
    talk = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    assert second.ids == template.prompt_ids([*talk, {"role": "user", "content": "and 3+4?"}])
    assert first.fields == {"answer": "5", "difficulty": 0.5} and third.fields == {}
    assert [prompt.place for prompt in (first, third)] == [f"{tmp_path / 'rl.jsonl'}:{n}" for n in (1, 4)]


def test_long_and_unanswered_prompts_are_counted_and_named(tmp_path, capsys):
    prompts = open_set(tmp_path)
    assert prompts.report() == {"prompts": 3, "too_long": 1, "bad_lines": 0, "without_answer": 1}
    printed = capsys.readouterr().err
    assert "left out: 1 of 4 prompts with more than 60 tokens (the smaller of max_prompt_len and" in printed
    assert "rl.jsonl:3 with" in printed and "1 of 3 prompts without an answer" in printed


def test_thinking_is_asked_for_and_is_part_of_the_identity(tmp_path):
    source = "{{ messages[0].content }}{% if add_generation_prompt %}{{ 'A' if enable_thinking else 'B' }}{% endif %}"
    own = tmp_path / "own.jinja"
    own.write_text(source, "utf-8")
    plain, thinking, again = (
        open_set(tmp_path, chat_template=str(own), enable_thinking=value) for value in (False, True, True)
    )
    assert plain[0].ids[:-1] == thinking[0].ids[:-1] and plain[0].ids != thinking[0].ids
    assert plain.identity != thinking.identity == again.identity


def test_tools_of_the_run_are_shown_where_a_record_has_none(tmp_path):
    tools = [{"type": "function", "function": {"name": "calculator"}}]
    own = [{"type": "function", "function": {"name": "f"}}]
    records = [{"messages": [{"role": "user", "content": "a"}]} | more for more in ({}, {"tools": own})]
    prompts = open_set(tmp_path, records, "messages", tools=tools, max_prompt_len=500)
    assert [prompt.tools for prompt in (prompts[0], prompts[1])] == [tools, own]


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no prompt can be used: 4 with more than 3 tokens.* raise max_prompt_len or "):
        open_set(tmp_path, max_prompt_len=3)


def test_what_the_template_refuses_is_placed_or_skipped(tmp_path):
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text("{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}q", "utf-8")
    records = [{"src": ["bad"]}, {"src": ["good"]}]
    with pytest.raises(DataError, match=r"rl\.jsonl:1: .*refuses the conversation.*on_bad_line: skip"):
        open_set(tmp_path, records, chat_template=str(refusing))
    skipped = open_set(tmp_path, records, chat_template=str(refusing), on_bad_line="skip")
    assert len(skipped) == 1 and skipped.report()["bad_lines"] == 1


def test_pictures_are_expanded_once_and_not_decoded(tmp_path):
    processor = load_processor(vision_directory(tmp_path / "model"))
    write_picture(tmp_path / "a.png", 84, 84)
    records = [
        {"prompt": "<image>Count.", "images": ["a.png"], "answer": "3"},
        {"prompt": "Say hello.", "answer": "hello"},
    ]
    vision = VisionSpec(processor.settings)
    prompts = open_set(tmp_path, records, "messages", template=processor.template, vision=vision, max_prompt_len=500)
    pictures = prompts[0].pictures
    assert pictures is not None and pictures.ids == prompts[0].ids
    assert len(prompts[0].ids) == len(pictures.modality) and pictures.positions.shape == (len(prompts[0].ids), 3)
    num_tokens = int(np.prod(pictures.plans[0].geometry.grid)) // 4
    assert int(pictures.ends[0] - pictures.first_tokens[0]) == num_tokens
    assert prompts[1].pictures is None and prompts[1].fields == {"answer": "hello"}
