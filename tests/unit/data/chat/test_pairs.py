"""Preference data: formats, the layout of a pair, lengths, and that pairs obey the stream's laws."""

import json
from pathlib import Path

import numpy as np
import pytest
from support.data_runs import PACKINGS, build, rows_of, run, same, steps, write
from support.fake_text import ASSISTANT, EOS, FIRST, SYSTEM, USER, FakeTemplate, FakeTokenizer

from erniekit.config.methods import METHODS
from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.pairs import truncate_document
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.packed_batch import IGNORE, Document
from erniekit.data.records.dataset import read_specs
from erniekit.data.records.formats import parse_record
from erniekit.utils.errors import DataError

DPO = {"stage": "DPO", "max_prompt_len": 32, "random_shuffle": False}
GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
ASKED = [{"role": "user", "content": "q"}]


def erniekit(**changes):
    return {"src": ["q"], "tgt": [], "response": [["good"], ["bad"]], "sort": [1, 0]} | changes


def answer_of(side):
    return [message["content"] for message in side]


# --- formats


@pytest.mark.parametrize(
    ("type_name", "record"),
    [
        ("erniekit", erniekit()),
        ("erniekit", erniekit(response=["bad", "good"], sort=[0.5, 2.5])),
        ("messages", {"messages": ASKED, "chosen_response": GOOD, "rejected_response": BAD}),
        ("messages", {"prompt": "q", "chosen": "good", "rejected": "bad"}),
        ("messages", {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}),
        ("messages", {"messages": ASKED + GOOD, "rejected_response": "bad"}),  # ms-swift
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            },
        ),
        ("alpaca", {"question": "q", "chosen": "good", "rejected": "bad"}),
        ("alpaca", {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"}),
    ],
)
def test_every_format_gives_the_same_pair(type_name, record):
    sample = parse_record(record, f"{type_name} (DPO)")
    assert sample.kind == "pair" and sample.messages == ASKED
    assert [answer_of(side) for side in sample.answers] == [["good"], ["bad"]]


def test_several_turns_before_and_inside_the_answers():
    record = erniekit(src=["a", "b"], tgt=["x"], system="s", response=[["bad"], ["y", "why", "z"]], sort=[1, 4])
    sample = parse_record(record, "erniekit (DPO)")
    assert [(m["role"], m["content"]) for m in sample.messages] == [
        ("system", "s"), ("user", "a"), ("assistant", "x"), ("user", "b"),
    ]  # fmt: skip
    chosen, rejected = sample.answers
    assert [(m["role"], m["content"]) for m in chosen] == [("assistant", "y"), ("user", "why"), ("assistant", "z")]
    assert answer_of(rejected) == ["bad"] and sample.score_delta == 3.0


def test_whole_conversations_are_split_where_their_answers_differ():
    before = [*ASKED, {"role": "assistant", "content": "x"}, {"role": "user", "content": "r"}]
    sample = parse_record({"chosen": before + GOOD, "rejected": before + BAD}, "messages (DPO)")
    assert sample.messages == before and sample.answers == (GOOD, BAD)


@pytest.mark.parametrize(
    "beside",
    [
        {"prompt": "q"},
        {"prompt": "q", "messages": ASKED + GOOD},  # UltraFeedback binarized by HuggingFaceH4
        {"prompt": ASKED},
        {"messages": ASKED},
    ],
)
def test_what_whole_conversations_say_again_is_no_second_prompt(beside):
    record = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD, "score_chosen": 8.0, "score_rejected": 7.0, **beside}
    sample = parse_record(record, "messages (DPO)")
    assert sample.messages == ASKED and sample.answers == (GOOD, BAD)


@pytest.mark.parametrize(
    "beside",
    [{"prompt": "p"}, {"prompt": [{"role": "system", "content": "s"}, *ASKED]}, {"prompt": "q", "messages": BAD}],
)
def test_what_whole_conversations_do_not_say_is_refused(beside):
    with pytest.raises(DataError, match=r"whole conversations, and .* has turns that 'chosen' does not have"):
        parse_record({"chosen": ASKED + GOOD, "rejected": ASKED + BAD, **beside}, "messages (DPO)")


def test_the_margin_of_a_record_is_read():
    for value, expected in (
        (0.25, 0.25),
        ("0.5", 0.5),
        (0, 0.0),
        (-1, None),
        (True, None),
        ("much", None),
        (None, None),
    ):
        records = {
            "messages (DPO)": {"prompt": "q", "chosen": "good", "rejected": "bad"},
            "sharegpt (DPO)": {"conversations": [{"from": "human", "value": "q"}], "chosen": "good", "rejected": "bad"},
            "alpaca (DPO)": {"question": "q", "chosen": "good", "rejected": "bad"},
        }
        for kind, record in records.items():
            assert parse_record(record | {"margin": value}, kind).score_delta == expected


def test_a_key_that_needs_margins_refuses_records_without_them(tmp_path):
    keys = {"train_dataset_type": "messages", "random_shuffle": False, "max_prompt_len": 32}
    margins = (0.5, 0, None)
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad", "margin": m} for m in margins]
    )
    with pytest.raises(DataError, match=r"a.jsonl:3: reward_margin needs .* 'margin', a number of at least 0"):
        build(path, stage="RM", reward_margin=1.0, **keys)
    with pytest.raises(DataError, match=r"a.jsonl:2: offset_alpha needs .* 'margin', a number above 0"):
        build(path, stage="DPO", offset_alpha=1.0, **keys)
    batches = run(path, stage="RM", reward_margin=1.0, on_bad_line="skip", **keys)
    assert [delta for step in batches for batch in step for delta in batch.pairs.score_deltas] == [0.5, 0.0]
    batches = run(path, stage="RM", **keys)  # nothing reads them
    assert sum(len(batch.pairs) for step in batches for batch in step) == 3


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (erniekit(sort=[1, 1]), "neither response is better"),
        (erniekit(sort=[1]), "two numbers"),
        (erniekit(sort=[True, False]), "two numbers"),
        (erniekit(sort=[float("nan"), 1]), "NaN is not a JSON number"),
        (erniekit(sort=[10**400, 1]), "two numbers"),
        (erniekit(sort=[1e300, 1]), "two numbers"),
        (erniekit(sort=[1e-40, 0]), "neither response is better"),
        (erniekit(response=[["good"]]), "'response' has 1 entry"),
        (erniekit(response=[["a"], ["b"], ["c"]]), "'response' has 3 entries"),
        (erniekit(response=[["good"], []]), "response\\[1\\] has 0 turns"),
        (erniekit(response=[["good"], [" "]]), "response\\[1\\]\\[0\\] is empty"),
        (erniekit(response=[["good", "why"], ["bad"]]), "response\\[0\\] has 2 turns"),
        (erniekit(response=[["good"], ["good"]]), "both answers are the same"),
        (erniekit(tgt=["x"]), "'src' has 1 turn and 'tgt' has 1"),
        (erniekit(respons=1), "nearest known one is 'response'"),
        ({"src": ["q"], "tgt": [], "response": [["a"], ["b"]]}, "'sort' must be a list"),
    ],
)
def test_a_wrong_record_is_named_with_file_and_line(tmp_path, record, message):
    path = write(tmp_path / "a.jsonl", [erniekit(), record])
    with pytest.raises(DataError, match=f"a.jsonl:2: .*{message}"):
        build(path, **DPO)
    with build(path, on_bad_line="skip", **DPO) as loader:
        assert len(steps(loader)) == 1 and loader.report()["bad_lines"] == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": ASKED + GOOD, "chosen": GOOD, "rejected": BAD}, "role 'assistant' of turn 2"),
        ({"messages": ASKED, "chosen": GOOD}, "'rejected' must be a list"),
        ({"messages": ASKED, "chosen": "", "rejected": "b"}, "'chosen' is empty"),
        ({"messages": ASKED, "chosen": 5, "rejected": "b"}, "text or a list of messages, not a number"),
        ({"messages": ASKED, "chosen": GOOD, "chosen_response": GOOD, "rejected": BAD}, "both 'chosen'"),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD}, "both answers are the same"),
        ({"chosen": GOOD, "rejected": BAD}, "do not share a question"),
    ],
)
def test_wrong_messages_are_refused(record, message):
    with pytest.raises(DataError, match=message):
        parse_record(record, "messages (DPO)", "a:1")


def test_the_stage_decides_what_a_type_means():
    assert read_specs(("a",), ("chatml",), (), "train", METHODS["DPO"])[0].type == "messages (DPO)"
    with pytest.raises(DataError, match="stage DPO"):
        parse_record(erniekit(), "erniekit")


# --- the layout


def test_a_row_holds_prompt_chosen_and_rejected(tmp_path):
    path = write(tmp_path / "a.jsonl", [erniekit(src=["ab"], response=[["x"], ["yz"]], sort=[0, 1], system="s")])
    ((batch,),) = run(path, **DPO)
    s, a, b, x, y, z = (FIRST + ord(char) for char in "sabxyz")
    prompt = [SYSTEM, s, USER, a, b]
    ids = [*prompt, ASSISTANT, y, z, EOS, ASSISTANT, x, EOS]
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == [IGNORE] * 5 + [y, z, EOS, IGNORE] + [x, EOS, IGNORE]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7]
    assert batch.segment_ids.tolist() == [0] * 5 + [1] * 4 + [2] * 3
    pairs = batch.pairs
    assert (pairs.prompts.tolist(), pairs.chosen.tolist(), pairs.rejected.tolist()) == ([0], [1], [2])
    assert pairs.score_deltas.tolist() == [1.0] and batch.num_samples == 1


def test_inner_questions_of_an_answer_carry_no_label():
    encode = Encoder(FakeTokenizer(), FakeTemplate(), 64, max_prompt_len=64)
    record = erniekit(response=[["y", "why", "z"], ["n"]])
    ((ids, labels, pair, *_),) = encode("erniekit (DPO)", json.dumps(record).encode(), "a:1").documents
    chosen = labels[pair.prompt :][: pair.chosen].tolist()
    y, z, n = (FIRST + ord(char) for char in "yzn")
    assert [i for i in chosen if i != IGNORE] == [y, EOS, z, EOS]
    assert [i for i in labels[pair.prompt + pair.chosen :] if i != IGNORE] == [n, EOS]
    assert ids[pair.prompt] == ids[pair.prompt + pair.chosen] == ASSISTANT


def records(count=30, seed=0):
    random = np.random.default_rng(seed)
    return [
        erniekit(
            src=["q" * int(random.integers(1, 12))],
            response=[["g" * int(random.integers(1, 9))], ["b" * int(random.integers(1, 9))]],
            sort=[int(x) for x in random.permutation(2)],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_rows_hold_every_pair_once(tmp_path, packing):
    path = write(tmp_path / "a.jsonl", records())
    found = []
    for step in run(path, **(DPO | packing)):
        for batch in step:
            assert max(batch.row_lengths) <= 64
            for segments in zip(batch.pairs.prompts, batch.pairs.chosen, batch.pairs.rejected, strict=True):
                texts = [FakeTokenizer().decode(batch.input_ids[batch.segment_ids == s].tolist()) for s in segments]
                found.append(tuple(texts))
    expected = []
    for record in records():
        good = record["sort"].index(1)
        expected.append((record["src"][0], record["response"][good][0], record["response"][1 - good][0]))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("packing", PACKINGS)
def test_order_is_global_and_resumes_where_it_stopped(tmp_path, packing):
    path = write(tmp_path / "a.jsonl", records(60))
    keys = {**DPO, "random_shuffle": True, "num_train_epochs": 2.0, **packing}
    whole = run(path, **keys)
    with build(path, **keys) as loader:
        first = steps(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
    with build(path, dataloader_num_workers=1, **keys) as loader:
        loader.load_state_dict(state)
        rest = steps(loader)
    assert same(first + rest, whole)
    assert [[b.pairs.chosen.tolist() for b in step] for step in first + rest] == [
        [b.pairs.chosen.tolist() for b in step] for step in whole
    ]
    parts = [run(path, batch_size=1, rank=rank, world=2, **keys) for rank in range(2)]
    for ours, theirs in zip(whole, zip(*parts, strict=True), strict=True):
        assert sorted(rows_of(ours)) == sorted(rows_of([batch for part in theirs for batch in part]))


def test_mixing_takes_both_kinds_of_pairs(tmp_path):
    a = write(tmp_path / "a.jsonl", records(20))
    b = write(tmp_path / "b.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}] * 10)
    keys = {**DPO, "train_dataset_type": "erniekit,messages", "train_dataset_prob": "0.5,0.5"}
    with build(f"{a},{b}", mix_strategy="interleave_over", **keys) as loader:
        names = {where.split(":")[0][-7:] for step in steps(loader) for batch in step for where in batch.sources}
    assert names == {"a.jsonl", "b.jsonl"}


# --- lengths


def encode(record, **limits):
    encoder = Encoder(FakeTokenizer(), FakeTemplate(), **limits)
    return encoder("erniekit (DPO)", json.dumps(record).encode(), "a:1")


LONG = erniekit(src=["aaaa", "bbbb"], tgt=["xxxx"], system="s", response=[["gg"], ["bb"]])  # prompt 2+5+6+5+1 = 19


def test_a_long_prompt_loses_its_earliest_turns_and_keeps_its_system_text():
    whole = encode(LONG, max_seq_len=64, max_prompt_len=19)
    assert not whole.cut and whole.documents[0].pair.prompt == 18
    for limits in ({"max_seq_len": 64, "max_prompt_len": 18}, {"max_seq_len": 20, "max_prompt_len": 64}):
        cut = encode(LONG, **limits)
        assert cut.cut and FakeTokenizer().decode(cut.documents[0].ids.tolist()) == "sbbbbggbb"


def test_what_does_not_fit_is_dropped_cut_or_refused():
    limits = {"max_seq_len": 14, "max_prompt_len": 64}  # the last turn alone: 2 + 5 + 4 + 4 = 15
    assert "its last turn alone has 15 tokens, more than max_seq_len 14" in encode(LONG, **limits).dropped
    cut = encode(LONG, truncation="cut", **limits)
    assert cut.cut and len(cut.documents[0].ids) == 14
    with pytest.raises(DataError, match="a:1: its last turn alone has 15 tokens"):
        encode(LONG, truncation="error", **limits)
    short = {"max_seq_len": 64, "max_prompt_len": 7}
    for truncation in ("drop", "cut"):
        assert (
            "its last question alone has 8 tokens, more than max_prompt_len 7"
            in encode(LONG, truncation=truncation, **short).dropped
        )
    with pytest.raises(DataError, match="raise max_prompt_len"):
        encode(LONG, truncation="error", **short)


def test_answers_that_the_cut_makes_equal_are_dropped_and_counted(tmp_path):
    record = erniekit(response=[["same good"], ["same bad"]])
    cut = encode(record, max_seq_len=12, max_prompt_len=64, truncation="cut")
    assert not cut.documents and cut.dropped == "cut to max_seq_len 12, both answers are the same"
    assert encode(record, max_seq_len=64, truncation="cut").documents
    path = write(tmp_path / "a.jsonl", [record, erniekit()])
    with build(path, **(DPO | {"max_seq_len": 12, "truncation": "cut"})) as loader:
        assert len(steps(loader)) == 1 and loader.report()["dropped"] == 1


class Stripping(FakeTemplate):
    """Shows the answers without the blanks around them, as some published templates do."""

    def encode_all(self, messages, tools, label):
        return super().encode_all([m | {"content": m["content"].strip()} for m in messages], tools, label)


def test_answers_that_the_template_makes_equal_are_a_bad_record():
    record = json.dumps(erniekit(response=[["good"], ["good\n"]])).encode()
    with pytest.raises(DataError, match=r"a:1: the chat template shows both answers alike.*on_bad_line: skip"):
        Encoder(FakeTokenizer(), Stripping(), 64)("erniekit (DPO)", record, "a:1")
    encoded = Encoder(FakeTokenizer(), Stripping(), 64, on_bad_line="skip")("erniekit (DPO)", record, "a:1")
    assert not encoded.documents and "both answers alike" in encoded.dropped


def test_results_in_another_order_make_no_pair():
    two = {"role": "assistant", "content": "", "tool_calls": [{"id": i, "name": "f"} for i in "xy"]}
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in "xy"]
    sides = {"chosen": [two, *results, *GOOD], "rejected": [two, *results[::-1], *GOOD]}
    with pytest.raises(DataError, match="both answers are the same"):
        parse_record({"prompt": "q", **sides}, "messages (DPO)")


@pytest.mark.parametrize("sizes", [(3, 10, 2), (3, 2, 10), (3, 7, 7), (0, 4, 5)])
def test_cutting_shortens_the_longer_answer_first(sizes):
    prompt, chosen, rejected = sizes
    total = sum(sizes)
    ids = np.arange(total, dtype=np.int32)
    document = Document(ids, ids + 1000, type(encode(LONG, max_seq_len=64).documents[0].pair)(*sizes, 1.0))
    for most in range(prompt + 2, total + 1):
        cut = truncate_document(document, most)
        p, c, r, _ = cut.pair
        assert p == prompt and p + c + r == len(cut.ids) == min(most, total)
        assert cut.ids.tolist() == [*range(p + c), *range(prompt + chosen, prompt + chosen + r)]
        assert cut.labels.tolist() == (cut.ids + 1000).tolist()
        if c < chosen and r < rejected:
            assert abs(c - r) <= 1
    assert (truncate_document(document, prompt + 1).labels == IGNORE).all()


def test_a_template_that_shows_the_answers_behind_different_prompts_is_refused():
    class Changing(FakeTemplate):
        def encode_all(self, messages, tools, label):
            return super().encode_all(
                [{"role": "system", "content": messages[-1]["content"]}, *messages], tools, [*label]
            )

    encoder = Encoder(FakeTokenizer(), Changing(), 64)
    with pytest.raises(DataError, match=r"a:1: .*behind different prompts"):
        encoder("erniekit (DPO)", json.dumps(erniekit()).encode(), "a:1")


@pytest.mark.parametrize("name", ["text", "thinking"])
def test_each_side_is_what_fine_tuning_on_that_answer_would_see(name):
    """With the real tokenizer and templates: prompt + answer, token for token and label for label."""
    directory = Path(__file__).resolve().parents[4] / "examples" / "models" / "tiny-dense"
    tokenizer = load_tokenizer(directory)
    encoder = Encoder(tokenizer, load_template(tokenizer, name), 512)
    thought = "<think>想</think>" if name == "thinking" else ""
    record = erniekit(src=["你好", "再见"], tgt=[thought + "好"], response=[[thought + "好的"], [thought + "不"]])
    ((ids, labels, pair, *_),) = encoder("erniekit (DPO)", json.dumps(record).encode(), "a:1").documents
    begins = (pair.prompt, pair.prompt + pair.chosen)
    for begin, length, (answer,) in zip(begins, pair[1:3], record["response"], strict=True):
        single = {"src": record["src"], "tgt": [*record["tgt"], answer], "label": [0, 1]}
        ((alone, alone_labels, *_),) = encoder("erniekit", json.dumps(single).encode(), "a:1").documents
        assert [*ids[: pair.prompt], *ids[begin : begin + length]] == alone.tolist()
        assert labels[begin : begin + length].tolist() == alone_labels[pair.prompt :].tolist()
