"""Judged answers for KTO: every form becomes a conversation with a judgement of its last answer."""

import json

import pytest
from support.pictures import DEMO_MODEL

from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.packed_batch import IGNORE
from erniekit.data.records.formats import FORMATS, JUDGED_FORMATS, parse_record
from erniekit.utils.errors import DataError

Q, A = {"role": "user", "content": "2+3="}, {"role": "assistant", "content": "5"}


@pytest.mark.parametrize("judgement", [True, False, 1, 0])
@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("erniekit", {"src": ["2+3="], "tgt": ["5"]}),
        ("alpaca", {"instruction": "2+3=", "output": "5"}),
        ("messages", {"messages": [Q, A]}),
        ("messages", {"prompt": "2+3=", "completion": "5"}),  # TRL
        ("messages", {"prompt": [Q], "completion": [A]}),  # TRL
        ("sharegpt", {"conversations": [{"from": "human", "value": "2+3="}, {"from": "gpt", "value": "5"}]}),
    ],
)
def test_every_form_becomes_the_same_judged_answer(kind, record, judgement):
    for name in ("label", "kto_tag"):  # TRL and ms-swift; LLaMA-Factory
        sample = parse_record(record | {name: judgement}, f"{kind} (KTO)")
        assert (sample.messages, sample.label, sample.is_good) == ([Q, A], [1], bool(judgement))


def test_only_the_last_answer_is_judged():
    sample = parse_record({"src": ["a", "b"], "tgt": ["x", "y"], "label": False}, "erniekit (KTO)")
    assert sample.label == [0, 1] and sample.is_good is False
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]}
    turns = [Q, A, Q, call, {"role": "tool", "content": "r"}, A]
    assert parse_record({"messages": turns, "label": True}, "messages (KTO)").label == [0, 1, 1]


@pytest.mark.parametrize(
    ("kind", "record", "reason"),
    [
        ("erniekit", {"src": ["a"], "tgt": ["x"]}, "field 'label' is missing"),
        ("erniekit", {"src": ["a"], "tgt": ["x"], "label": [1]}, "'label' must be true or false, not a list"),
        ("erniekit", {"src": ["a"], "tgt": ["x"], "label": "good"}, "'label' must be true or false, not a string"),
        ("erniekit", {"src": ["a"], "tgt": ["x"], "label": 2}, "'label' must be true or false"),
        ("erniekit", {"src": ["a"], "tgt": ["x"], "label": True, "kto_tag": True}, "is given twice"),
        ("messages", {"prompt": "a", "label": True}, "'completion' must be a string"),
        ("messages", {"messages": [Q, A], "completion": "5", "label": True}, "keep one form"),
        ("messages", {"messages": [Q], "label": True}, "ends with the role 'user'"),
        ("erniekit", {"src": ["a"], "chosen": "x", "rejected": "y", "label": True}, "'chosen' does not belong"),
    ],
)
def test_a_wrong_record_is_placed_with_a_hint(kind, record, reason):
    with pytest.raises(DataError, match=reason) as error:
        parse_record(record, f"{kind} (KTO)", "train.jsonl:7")
    assert str(error.value).startswith("train.jsonl:7: ") and "Hint: " in str(error.value)


def test_every_type_of_conversations_has_one_of_judged_answers():
    assert {name.removesuffix(" (KTO)") for name in JUDGED_FORMATS} == set(FORMATS) - {"text"}


def test_the_document_carries_the_judgement_and_labels_of_the_last_answer():
    tokenizer = load_tokenizer(DEMO_MODEL)
    encoder = Encoder(tokenizer, load_template(tokenizer), 200)
    raw = json.dumps({"src": ["a", "b"], "tgt": ["xx", "y"], "label": False}).encode()
    [document] = encoder("erniekit (KTO)", raw, "a:1").documents
    whole = json.dumps({"src": ["a", "b"], "tgt": ["xx", "y"], "label": [0, 1]}).encode()
    [expected] = encoder("erniekit", whole, "a:1").documents
    assert document.is_good is False and expected.is_good is None
    assert document.ids.tolist() == expected.ids.tolist() and document.labels.tolist() == expected.labels.tolist()
    assert (document.labels != IGNORE).any()
