"""Conversations with pictures as text and labels: byte for byte what ERNIE's training code and published model give."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
from support.pictures import DEMO_MODEL

from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.vision.template import VisionTemplate, load_vision_template
from erniekit.utils.errors import ConfigError, DataError

ROOT = Path(__file__).parents[4]
RENDERED = ROOT.parent / "shared/data/ernie45/rendered.json"

BOS, EOS, SEP = "<|begin_of_sentence|>", "</s>", "<|end_of_sentence|>"
IMAGE = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"
ZOOM = {
    "type": "function",
    "function": {
        "name": "image_zoom_in_tool",
        "description": "Crop a region of the picture.",
        "parameters": {
            "type": "object",
            "properties": {
                "bbox_2d": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
                "label": {"type": "string"},
            },
            "required": ["bbox_2d"],
        },
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def plain(tokenizer):
    return load_vision_template(tokenizer, "vl")


@pytest.fixture(scope="module")
def thinking(tokenizer):
    return load_vision_template(tokenizer, "vl_thinking")


def picture(text, kind="image"):
    return [{"type": kind, kind: "a.png"}, {"type": "text", "text": text}]


def user(content):
    return {"role": "user", "content": content}


def answer(content, **rest):
    return {"role": "assistant", "content": content, **rest}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


RIVER = "Which river runs through Prague?"
ZOOMED = [
    user(picture("What is written on the sign?")),
    answer(
        "",
        reasoning_content="Too small, I zoom.",
        tool_calls=[call("image_zoom_in_tool", bbox_2d=[120, 40, 480, 260], label="sign")],
    ),
    {"role": "tool", "content": [{"type": "image", "image": "crop.png"}]},
    answer("<think>\nNow readable.\n</think>\n\nIt says EXIT."),
]
# name of the published rendering -> template, messages, tools
CASES = {
    "thinking/plain": (
        "vl_thinking",
        [user(RIVER), answer("<think>\nCapital of Czechia, so the Vltava.\n</think>\n\nThe Vltava.")],
        None,
    ),
    "thinking/no_thought": ("vl_thinking", [user("2 + 2?"), answer("4")], None),
    "thinking/image": (
        "vl_thinking",
        [user(picture("What is this?")), answer("A square.", reasoning_content="A red square.")],
        None,
    ),
    "thinking/two_images_two_turns": (
        "vl_thinking",
        [
            user(picture("What is this?")),
            answer("A square.", reasoning_content="Red."),
            user(picture("And this?")),
            answer("A circle.", reasoning_content="Blue."),
        ],
        None,
    ),
    "thinking/tools": ("vl_thinking", ZOOMED, [ZOOM]),
    "non_thinking/system": (
        "vl",
        [{"role": "system", "content": "Answer in one word."}, user(RIVER), answer("Vltava")],
        None,
    ),
    "non_thinking/video": ("vl", [user(picture("What happens?", "video")), answer("A ball rolls.")], None),
}
# ours, from the rules of the released training code; the files of the published rendering are compared below
ZOOMED_TEXT = [
    (
        f"{BOS}\n<tool_list>\n[{json.dumps(ZOOM)}]\n</tool_list>\nUser: Picture 1:{IMAGE}What is written on the sign?\n"
        "Assistant: \n<think>\n",
        0,
    ),
    (
        'Too small, I zoom.\n</think>\n\n<tool_call>\n{"name": "image_zoom_in_tool", "arguments": '
        '{"bbox_2d": [120, 40, 480, 260], "label": "sign"}}\n</tool_call>\n',
        1,
    ),
    (SEP, 1),
    (f"User: \n<tool_output>\nPicture 2:{IMAGE}\n</tool_output>\n\nAssistant: \n<think>\n", 0),
    ("Now readable.\n</think>\n\nIt says EXIT.", 1),
    (SEP, 1),
]


def as_text(template, segments):
    """The segments as text with a 1 where they are trained; the token that ends an answer apart."""
    found = []
    for ids, is_target in segments:
        text = template.tokenizer.decode(ids)
        text = text.replace("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>")
        text = text.replace("<|VIDEO_PLACEHOLDER|>", "<|video@placeholder|>")
        if is_target:
            assert text.endswith(SEP)
            found += [(text.removesuffix(SEP), 1), (SEP, 1)]
        else:
            found.append((text, 0))
    return found


@pytest.mark.skipif(not RENDERED.is_file(), reason="the published renderings are not here")
@pytest.mark.parametrize("name", CASES)
def test_segments_are_those_of_the_training_code(tokenizer, name):
    kind, messages, tools = CASES[name]
    template = load_vision_template(tokenizer, kind)
    expected = json.loads(RENDERED.read_text("utf-8"))["by_rule"]["segments"]
    assert set(expected) == set(CASES)
    assert as_text(template, template.encode(messages, tools)) == [tuple(part) for part in expected[name]]


def test_a_tools_picture_is_the_next_picture(thinking):
    assert as_text(thinking, thinking.encode(ZOOMED, [ZOOM])) == ZOOMED_TEXT


# As far as one published rendering of the 28B Thinking model shows it.
PUBLISHED = """{{- '<|begin_of_sentence|>' -}}
{%- set seen = namespace(pictures=0) -%}
{%- if messages[0].role != 'system' -%}
{{- 'You are a multimodal AI assistant called ERNIE developed by Baidu based on the PaddlePaddle framework.\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- 'User: ' -}}
{%- for item in message.content -%}
{%- if item.type == 'image' or item.type == 'image_url' -%}
{%- set seen.pictures = seen.pictures + 1 -%}
{{- ' Picture ' ~ seen.pictures ~ ':<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>' -}}
{%- else -%}{{- item.text -}}{%- endif -%}
{%- endfor -%}
{{- '\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- 'Assistant: \\n<think>\\n' + message.content + '<|end_of_sentence|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: \\n<think>\\n' -}}{%- endif -%}
"""


@pytest.mark.skipif(not RENDERED.is_file(), reason="the published renderings are not here")
def test_the_checkpoints_own_template_is_used_byte_for_byte(tokenizer):
    published = json.loads(RENDERED.read_text("utf-8"))["real"]["vl-28b-thinking"]
    template = VisionTemplate("published", PUBLISHED, tokenizer)
    [message] = published["messages"]
    parts = [{"type": "image", "image": "photo.jpg"}, message["content"][1]]
    text = template.render([user(parts)], add_generation_prompt=True, enable_thinking=True)
    assert text == published["results"]["image"]["generation_prompt"]["text"]
    assert hashlib.sha256(text.encode()).hexdigest() == published["results"]["image"]["generation_prompt"]["sha256"]
    ids = template.prompt_ids([user(parts)])
    assert template.tokenizer.decode(ids).replace("<|IMAGE_PLACEHOLDER|>", "<|image@placeholder|>") == text


def test_labels_are_eos_where_the_input_keeps_the_separator(thinking):
    tokenizer = thinking.tokenizer
    ids, labels = thinking.labels(thinking.encode([user("q"), answer("a"), user("r"), answer("b")]))
    ends = [t for t, i in enumerate(ids) if i == tokenizer.sep_id]
    assert len(ends) == 2 and tokenizer.eos_id not in ids
    assert [labels[t - 1] for t in ends] == [tokenizer.eos_id] * 2
    assert tokenizer.sep_id not in labels


def test_without_thoughts_only_the_last_round_is_trained(plain):
    rounds = [user("q"), answer("one"), user("r"), answer("two")]
    assert [text for text, trained in as_text(plain, plain.encode(rounds)) if trained] == ["two", SEP]
    chosen = as_text(plain, plain.encode(rounds, label=[1, 1]))
    assert [text for text, trained in chosen if trained] == ["one", SEP, "two", SEP]
    tools = [user("q"), answer("", tool_calls=[call("f")]), {"role": "tool", "content": "r"}, answer("two")]
    trained = [text for text, is_trained in as_text(plain, plain.encode(tools)) if is_trained and text != SEP]
    assert trained == ['<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n', "two"]


def test_numbers_run_over_messages_and_kinds(plain):
    messages = [
        user([*picture(""), *picture("two"), *picture("and", "video")]),
        answer("yes"),
        user([{"type": "text", "text": "Now "}, *picture("?"), *picture("!", "video")]),
        answer("no"),
    ]
    text = plain.render(messages)
    assert f"User: Picture 1:{IMAGE}Picture 2:{IMAGE}twoVideo 1:{VIDEO}and\n" in text
    assert f"User: Now Picture 3:{IMAGE}?Video 2:{VIDEO}!\n" in text


def test_serving_continues_what_training_has(plain, thinking):
    """The prompt of generation is the beginning of the training sequence."""
    for template in (plain, thinking):
        messages = [user(picture("q")), answer("one"), user(picture("r")), answer("two")]
        [segments] = template.encode_all(messages)
        ids, _ = template.labels(segments)
        prompt = template.prompt_ids(messages[:3])
        assert ids[: len(prompt)] == prompt
        assert template.tokenizer.sep_id in prompt


def test_typed_placeholders_stay_text(plain):
    tokenizer = plain.tokenizer
    typed = f"{IMAGE}<|IMAGE_PLACEHOLDER|></s>"
    ids, _ = plain.labels(plain.encode([user(picture(typed)), answer(typed)]))
    assert ids.count(tokenizer.token_id("<|IMAGE_PLACEHOLDER|>")) == 1
    assert ids.count(tokenizer.token_id("<|IMAGE_START|>")) == 1
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids).count(typed) == 2


def test_a_template_that_leaves_pictures_out_is_refused(tokenizer):
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + (m.content if m.content is string else '') }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="shows 0 of 1 picture or video"):
        VisionTemplate("mute", source, tokenizer).encode([user(picture("q")), answer("a")])


def test_what_conversations_must_not_have(plain, thinking):
    with pytest.raises(DataError, match="the assistant's and has pictures"):
        plain.encode([user("q"), answer(picture("a"))])
    with pytest.raises(DataError, match="neither text, image nor video"):
        plain.encode([user([{"type": "audio", "audio": "a.wav"}]), answer("a")])
    with pytest.raises(DataError, match='use the template "vl_thinking"'):
        plain.encode([user("q"), answer("<think>\nt\n</think>\n\na")])
    with pytest.raises(DataError, match="a thought both there and in reasoning_content"):
        thinking.encode([user("q"), answer("<think>\nt\n</think>\n\na", reasoning_content="t")])


def test_a_text_model_has_no_tokens_for_pictures(tmp_path):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (DEMO_MODEL / file).read_text("utf-8").replace("<|VIDEO_START|>", "<|OTHER|>")
        (tmp_path / file).write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=r"no token <.VIDEO_START.>, so this is not a vision-language model"):
        load_vision_template(load_tokenizer(tmp_path))


def test_which_template_is_chosen(tokenizer, tmp_path):
    assert load_vision_template(tokenizer).name == "vl"
    assert load_vision_template(tokenizer, "ernie_vl_thinking").name == "vl_thinking"
    (tmp_path / "chat_template.jinja").write_text(PUBLISHED, "utf-8")
    assert load_vision_template(tokenizer, beside=tmp_path).source == PUBLISHED


def test_templates_travel_to_workers(plain):
    again = pickle.loads(pickle.dumps(plain))
    messages = [user(picture("q")), answer("a")]
    assert again.encode(messages) == plain.encode(messages) and isinstance(again, VisionTemplate)
