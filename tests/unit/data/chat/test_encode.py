import json
from pathlib import Path

import pytest
from support.data_runs import PACKINGS, build, config, rows_of, run, steps, write
from support.fake_text import ASSISTANT, EOS, FIRST, SYSTEM, USER, FakeTemplate, FakeTokenizer

from erniekit.data.chat.encode import Encoder
from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import load_tokenizer
from erniekit.data.loader import build_loader
from erniekit.data.packed_batch import IGNORE
from erniekit.data.records.formats import parse_record
from erniekit.utils.errors import DataError

# --- what the batches hold


def test_labels_are_the_next_token_of_each_answer_and_its_end(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"system": "s", "src": ["ab", "c"], "tgt": ["x", "yz"], "label": [1, 1]}])
    ((batch,),) = run(path)
    s, a, b, x, c, y, z = (FIRST + ord(char) for char in "sabxcyz")
    ids = [SYSTEM, s, USER, a, b, ASSISTANT, x, EOS, USER, c, ASSISTANT, y, z, EOS]
    targets = [IGNORE] * 5 + [x, EOS] + [IGNORE] * 3 + [y, z, EOS, IGNORE]
    assert batch.input_ids.tolist() == ids
    assert batch.labels.tolist() == targets
    assert batch.position_ids.tolist() == [*range(14)]
    assert batch.segment_ids.tolist() == [0] * 14


def test_an_answer_labelled_zero_is_shown_but_not_learnt(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"src": ["a", "c"], "tgt": ["x", "y"], "label": [0, 1]}])
    ((batch,),) = run(path)
    assert FIRST + ord("x") in batch.input_ids and FIRST + ord("x") not in batch.labels
    assert (batch.labels != IGNORE).sum() == 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_pretraining_documents_are_split_without_loss(tmp_path, packing):
    texts = ["a" * 3 + "b" * 15 + "c" * 4, "d" * 7, "e" * 16, "f" * 15]  # 23, 8, 17 (eos alone is left), 16 tokens
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    with build(path, stage="PT", max_seq_len=16, random_shuffle=False, **packing) as loader:
        rows = rows_of([batch for step in steps(loader) for batch in step])
        counts = loader.report()
    documents = []  # (ids, labels), the parts of a text joined again
    for ids, labels, positions, segments in rows:
        for segment in range(1, max(segments) + 1):
            here = [i for i, s in enumerate(segments) if s == segment]
            assert [positions[i] for i in here] == list(range(len(here)))
            documents.append(([ids[i] for i in here], [labels[i] for i in here]))
    tokens = FakeTokenizer()
    learnt = sorted(target for _, labels in documents for target in labels if target != IGNORE)
    wanted = [t for text in texts for t in [*tokens.encode_plain(text)[1:], EOS]]
    assert learnt == sorted(wanted)
    for ids, labels in documents:  # within a part, and across its end, the target is the next token of the text
        assert labels[:-1] == ids[1:]
    ends = {tuple(ids): labels[-1] for ids, labels in documents}
    assert ends[tuple(tokens.encode_plain("aaa" + "b" * 13))] == FIRST + ord("b")
    assert ends[tuple(tokens.encode_plain("e" * 16))] == EOS
    assert counts["samples"] == 4 and counts["dropped"] == counts["cut"] == 0


def test_special_tokens_in_pretraining_text_are_encoded_as_plain_text(tmp_path):
    class Marking(FakeTokenizer):
        def encode_plain(self, text):
            return [FIRST] * len(text)

    encoded = Encoder(Marking(), None, 16)("text", b'{"text": "</s>"}', "a:1")
    assert encoded.documents[0][0].tolist() == [FIRST] * 4 + [EOS]


# --- max_seq_len

CONVERSATION = {
    "system": "s",
    "src": ["aaaa", "bbbb", "c"],
    "tgt": ["xxxx", "yyyy", "z"],
    "label": [1, 0, 1],
}  # 33 tokens


def encode(record, max_seq_len, truncation="drop"):
    return Encoder(FakeTokenizer(), FakeTemplate(), max_seq_len, truncation)(
        "erniekit", json.dumps(record).encode(), "f.jsonl:3"
    )


def shown(encoded):
    return [FakeTokenizer().decode(ids.tolist()) for ids, *_ in encoded.documents]


@pytest.mark.parametrize(
    ("max_seq_len", "text"),
    [(29, "saaaaxxxxbbbbyyyycz"), (28, "sbbbbyyyycz"), (18, "sbbbbyyyycz"), (17, "scz"), (7, "scz")],
)
def test_the_earliest_whole_turns_go_first_and_the_system_text_stays(max_seq_len, text):
    encoded = encode(CONVERSATION, max_seq_len)
    assert shown(encoded) == [text]
    assert encoded.cut == (max_seq_len < 29) and not encoded.dropped
    learnt = [FIRST + ord("z"), EOS] if "x" not in text else [FIRST + ord("x")] * 4 + [EOS, FIRST + ord("z"), EOS]
    assert [i for i in encoded.documents[0][1].tolist() if i != IGNORE] == learnt  # label follows its answers


def test_a_last_turn_that_does_not_fit_alone():
    record = {"src": ["q", "b"], "tgt": ["a", "y" * 30]}
    dropped = encode(record, 16)
    assert not dropped.documents and "its last turn alone has 34 tokens, more than max_seq_len 16" in dropped.dropped
    cut = encode(record, 16, "cut")
    assert cut.cut and shown(cut) == ["b" + "y" * 13] and cut.documents[0][1][-1] == FIRST + ord("y")
    with pytest.raises(DataError, match=r"f.jsonl:3: its last turn alone .* Hint: raise max_seq_len"):
        encode(record, 16, "error")
    prompt_only = encode({"src": "q" * 20, "tgt": "a"}, 16, "cut")
    assert "no answer to learn is left" in prompt_only.dropped


def test_cut_and_dropped_are_counted(tmp_path):
    records = [
        CONVERSATION,
        {"src": "q", "tgt": "a" * 40},
        {"src": "q", "tgt": "a", "label": [0]},
        {"src": "q", "tgt": "a"},
    ]
    with build(write(tmp_path / "a.jsonl", records), max_seq_len=20) as loader:
        steps(loader)
        report = loader.report()
    assert {key: report[key] for key in ("samples", "cut", "dropped", "rows")} == {
        "samples": 2,
        "cut": 1,
        "dropped": 2,
        "rows": 2,
    }
    assert report["tokens"] == 18 + 5 and report["supervised_tokens"] == 2 + 2
    assert report["fill_rate"] == round(23 / 40, 4) and report["epoch"] == 1.0


def test_nothing_left_is_an_error_and_not_an_endless_search(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"src": "q", "tgt": "a" * 40}] * 3)
    with (
        build(path, max_seq_len=16, max_steps=5) as loader,
        pytest.raises(DataError, match=r"nothing is left to read: every sample was dropped \(3\)"),
    ):
        loader.next_step()
    with (
        build(path, max_seq_len=16) as loader,
        pytest.raises(DataError, match=r"none of 3 samples can be used \(3 dropped\)"),
    ):
        loader.rows_left()


# --- with the real tokenizer and template

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("given_template", [True, False])
def test_a_real_tokenizer_and_template(workers, given_template):
    tokenizer = load_tokenizer(EXAMPLES / "models" / "tiny-dense")
    template = load_template(tokenizer) if given_template else None
    path = EXAMPLES / "data" / "sft-train.jsonl"
    cfg = config(path, max_seq_len=512, dataloader_num_workers=workers, random_shuffle=False, max_estimate_samples=1)
    with build_loader(cfg, tokenizer, template=template) as loader:
        batch = loader.next_step()[0]
    record = parse_record(
        json.loads(path.read_text(encoding="utf-8").splitlines()[int(batch.sources[0].rsplit(":", 1)[1]) - 1]),
        "erniekit",
    )
    first = batch.segment_ids == 0
    shown = load_template(tokenizer).render(record.messages)
    assert tokenizer.decode(batch.input_ids[first]).replace("</s>", "<|end_of_sentence|>") == shown
    learnt = tokenizer.decode([i for i in batch.labels[first].tolist() if i != IGNORE])
    assert learnt == "".join(m["content"] + "</s>" for m in record.messages if m["role"] == "assistant")


def test_the_shipped_example_files_are_valid():
    for name, stage, kind in [("sft", "SFT", "erniekit"), ("pt", "PT", "erniekit"), ("sft_think", "SFT", "messages")]:
        for split in ("train", "eval"):
            keys = {"stage": stage, "train_dataset_type": kind, "eval_dataset_type": kind}
            files = {
                f"{part}_dataset_path": str(EXAMPLES / "data" / f"{name}-{part}.jsonl") for part in ("train", "eval")
            }
            tokenizer = load_tokenizer(EXAMPLES / "models" / "tiny-dense")
            build_loader(config(None, **{**keys, **files}), tokenizer, split, template=FakeTemplate()).close()
