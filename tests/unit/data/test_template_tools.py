"""Conversations with tools as training sequences: bytes of the built-in templates and a checkpoint's own, the loss."""

import shutil
from pathlib import Path

import pytest

from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.records.formats import parse_record
from erniekit.utils.errors import DataError

TINY = Path(__file__).parents[3] / "examples/models/tiny-dense"

RECORD = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "北京和上海的天气？"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "两个城市",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"城市": "北京"}'}},
                {"id": "2", "type": "function", "function": {"name": "weather", "arguments": {"城市": "上海"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "2", "content": [{"t": 8}]},
        {"role": "tool", "tool_call_id": "1", "content": '{"t": 3}'},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "差",
            "tool_calls": [
                {"id": "3", "type": "function", "function": {"name": "minus", "arguments": {"a": 8, "b": 3}}}
            ],
        },
        {"role": "tool", "tool_call_id": "3", "name": "minus", "content": "5"},
        {"role": "assistant", "content": "上海高5度。", "reasoning_content": "说结果"},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ],
    "tools": [
        {"type": "function", "function": {"name": "weather", "parameters": {"城市": "string"}}},
        {"type": "function", "function": {"name": "minus", "parameters": {}}},
    ],
}
TOOL_LIST = (
    '<tool_list>\n[{"type": "function", "function": {"name": "weather", "parameters": {"城市": "string"}}}, '
    '{"type": "function", "function": {"name": "minus", "parameters": {}}}]\n</tool_list>'
)


def call_text(arguments, name="weather"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'


BOTH, MINUS = call_text('{"城市": "北京"}') + call_text('{"城市": "上海"}'), call_text('{"a": 8, "b": 3}', "minus")

# (text, is trained) of each stretch, as the published layouts have it
TEXT_GOLDEN = [
    (f"<|begin_of_sentence|>Be short.\n{TOOL_LIST}\nUser: 北京和上海的天气？\nAssistant: ", False),
    (BOTH + "<|end_of_sentence|>", True),
    (
        'User: <tool_output>\n{"t": 3}\n</tool_output>\n<tool_output>\n[{"t": 8}]\n</tool_output>\n\nAssistant: ',
        False,
    ),
    (MINUS + "<|end_of_sentence|>", True),
    ("User: <tool_output>\n5\n</tool_output>\n\nAssistant: ", False),
    ("上海高5度。<|end_of_sentence|>", True),
    ("User: Thanks\nAssistant: ", False),
    ("Welcome.</s>", True),
]
THINK_HEAD = (
    "<|im_start|>system\n<system_setting>\nBe short.\n</system_setting>\n\n<global_setting>\nthink_mode=True\n"
    f"</global_setting>\n\n{TOOL_LIST}<|im_end|>\n\n<|im_start|>user\n北京和上海的天气？<|im_end|>\n\n"
)
THINK_ASK = "<|im_start|>assistant\n<think>\n"
THINK_GOLDEN = [  # of the first of its two sequences: the second question no longer sees the thoughts
    (THINK_HEAD + THINK_ASK, False),
    (
        "两个城市\n</think>\n\n\n" + BOTH.replace("l>\n<t", "l>\n\n<t") + "<|im_end|>",
        True,
    ),
    (
        '\n\n<|im_start|>user\n<tool_response>\n{"t": 3}\n</tool_response><|im_end|>\n\n'
        '<|im_start|>user\n<tool_response>\n[{"t": 8}]\n</tool_response><|im_end|>\n\n' + THINK_ASK,
        False,
    ),
    (f"差\n</think>\n\n\n{MINUS}<|im_end|>", True),
    ("\n\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n\n" + THINK_ASK, False),
    ("说结果\n</think>\n\n<response>\n上海高5度。\n</response>\n<|im_end|>", True),
]

# In the manner of a checkpoint's own template: shows ids and names, and asks for an answer whether told to or not.
OWN = """{%- if tools %}[TOOLS]{{ tools | tojson }}
{% endif %}
{%- for m in messages %}
{%- if m.role == "assistant" %}<|im_start|>assistant
{{ m.content }}
{%- for c in m.tool_calls or [] %}({{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson(indent=1) }})
{%- endfor %}<|im_end|>
{% elif m.role == "tool" %}<|im_start|>tool {{ m.tool_call_id }} {{ m.name or "-" }}
{{ m.content }}<|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}<|im_start|>assistant{{ "\\n" }}"""
OWN_GOLDEN = [
    ('(1 weather {\n "城市": "北京"\n})(2 weather {\n "城市": "上海"\n})<|im_end|>', True),
    (
        '\n<|im_start|>tool 1 -\n{"t": 3}<|im_end|>\n'
        '<|im_start|>tool 2 -\n[{"t": 8}]<|im_end|>\n<|im_start|>assistant\n',
        False,
    ),
    ('(3 minus {\n "a": 8,\n "b": 3\n})<|im_end|>', True),
    ("\n<|im_start|>tool 3 minus\n5<|im_end|>\n<|im_start|>assistant\n", False),
    ("上海高5度。<|im_end|>", True),
]

# In the manner of the published templates of the text models, which know no tools.
BLIND = """{{- "<|begin_of_sentence|>" -}}
{%- for m in messages -%}
    {%- if m["role"] == "user" -%}{{- "User: " + m["content"] + "\\n" -}}
    {%- elif m["role"] == "assistant" -%}{{- "Assistant: " + m["content"] + "<|end_of_sentence|>" -}}
    {%- elif m["role"] == "system" -%}{{- m["content"] + "\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "Assistant: " -}}{%- endif -%}"""


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


def own(directory, source):
    """The tiny tokenizer in a directory with a chat_template.jinja of its own."""
    for path in TINY.glob("*token*"):
        shutil.copy(path, directory)
    (directory / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(directory)


def sample(thoughts=True):
    found = parse_record(RECORD, "chatml")
    messages = [{k: v for k, v in m.items() if thoughts or k != "reasoning_content"} for m in found.messages]
    return messages, found.tools


def stretches(tokenizer, segments):
    return [(tokenizer.decode(segment.ids), segment.is_target) for segment in segments]


def test_text_rounds_byte_for_byte(tokenizer):
    template = load_template(tokenizer, "text")
    assert stretches(tokenizer, template.encode(*sample(thoughts=False))) == TEXT_GOLDEN
    with pytest.raises(DataError, match="no place for reasoning_content"):
        template.encode(*sample())


def test_thinking_rounds_byte_for_byte(tokenizer):
    template = load_template(tokenizer, "thinking")
    first, second = template.encode_all(*sample())
    assert stretches(tokenizer, first) == THINK_GOLDEN
    assert stretches(tokenizer, second)[1] == ("\n</think>\n\n<response>\nWelcome.\n</response>\n<|im_end|>", True)
    shown = stretches(tokenizer, second)[0][0]
    assert "两个城市" not in shown and "<tool_response>\n5\n" in shown and shown.count("<tool_call>") == 3


def test_thoughts_before_calls_may_be_inside_the_content(tokenizer):
    """As ERNIEKit's function-call files have them."""
    template = load_template(tokenizer, "thinking")
    messages, tools = sample()
    inside = []
    for message in messages:
        thought = message.get("reasoning_content")
        rest = {key: value for key, value in message.items() if key != "reasoning_content"}
        inside.append({**rest, "content": f"<think>{thought}\n</think>{rest['content']}"} if thought else rest)
    assert template.encode_all(inside, tools) == template.encode_all(messages, tools)


def test_the_checkpoints_own_template_wins(tmp_path):
    tokenizer = own(tmp_path, OWN)
    messages, tools = sample(thoughts=False)
    segments = load_template(tokenizer).encode(messages, tools)
    assert stretches(tokenizer, segments)[1:6] == OWN_GOLDEN
    assert stretches(tokenizer, segments)[0][0].startswith("[TOOLS][{")


@pytest.mark.parametrize("which", ["text", "thinking", "own"])
def test_transformers_renders_the_same(tokenizer, tmp_path, which):
    transformers = pytest.importorskip("transformers")
    tokenizer = own(tmp_path, OWN) if which == "own" else tokenizer
    template = load_template(tokenizer, None if which == "own" else which)
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.directory)
    source = None if which == "own" else template.source
    messages, tools = sample(thoughts=which == "thinking")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for end in [*answers, len(messages)]:
        for ask in (False, True):
            rendered = theirs.apply_chat_template(
                messages[:end], tools=tools, chat_template=source, tokenize=False, add_generation_prompt=ask
            )
            assert rendered == template.render(messages[:end], tools, add_generation_prompt=ask)
    for end in answers:  # and what is trained continues what generation gets
        prompt = theirs.apply_chat_template(
            messages[:end], tools=tools, chat_template=source, tokenize=False, add_generation_prompt=True
        )
        last = template.encode_all(messages[: end + 1], tools)[-1]
        assert tokenizer.decode([i for segment in last[:-1] for i in segment.ids]) == prompt


@pytest.mark.parametrize("name", ["text", "thinking"])
def test_loss_is_on_calls_and_their_end_only(tokenizer, name):
    template = load_template(tokenizer, name)
    messages, tools = sample(thoughts=name == "thinking")
    for segments in template.encode_all(messages, tools):
        ids, labels = template.labels(segments)
        at, position = [], 0
        for segment in segments:
            at += [segment.is_target] * len(segment.ids)
            position += len(segment.ids)
        assert [label != -100 for label in labels] == [*at[1:], False]
        trained = tokenizer.decode([label for label in labels if label != -100])
        assert trained.count("</s>") + trained.count("<|im_end|>") == sum(segment.is_target for segment in segments)
        for given in ("tool_list", "tool_output", "tool_response", '"t": 3', "Thanks", "User"):
            assert given not in trained and ids


def test_a_call_with_label_0_is_shown_but_not_learnt(tokenizer):
    template = load_template(tokenizer, "text")
    segments = template.encode(*sample(thoughts=False), label=[1, 0, 1, 0])
    assert [text for text, trained in stretches(tokenizer, segments) if trained] == [
        TEXT_GOLDEN[1][0],
        TEXT_GOLDEN[5][0],
    ]


@pytest.mark.parametrize(
    ("take", "tools", "part"),
    [
        (slice(1, 3), True, "tools"),
        (slice(1, 3), False, "tool_calls"),
        ([1, 4, 9], False, "results of tools"),
        ([1, 7], False, "reasoning_content"),
    ],
)
def test_a_template_that_would_lose_something_is_refused(tmp_path, take, tools, part):
    template = load_template(own(tmp_path, BLIND))
    every, described = sample(thoughts=part == "reasoning_content")
    messages = every[take] if isinstance(take, slice) else [every[i] for i in take]
    with pytest.raises(DataError, match=f"does not show {part}.*template: text"):
        template.encode_all(messages, described if tools else None)
    if part != "reasoning_content":
        with pytest.raises(DataError, match="does not show"):
            template.prompt_ids(messages[:2] if tools else messages, described if tools else None)


def test_a_template_without_tools_serves_plain_conversations(tmp_path):
    template = load_template(own(tmp_path, BLIND))
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert len(template.encode_all(messages, [])) == 1 and template.prompt_ids(messages[:1])


def test_the_file_and_line_are_named(tmp_path):
    tokenizer = own(tmp_path, BLIND)
    raw = {key: value for key, value in RECORD.items() if key != "tools"}
    with pytest.raises(DataError, match=r"^data.jsonl:3: .*does not show tool_calls"):
        Encoder(tokenizer, load_template(tokenizer), 4096)("messages", raw, "data.jsonl:3")
    dropped = Encoder(tokenizer, load_template(tokenizer), 4096, on_bad_line="skip")("messages", raw, "data.jsonl:3")
    assert not dropped.documents and "tool_calls" in dropped.dropped
