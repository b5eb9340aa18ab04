"""The tokenizer: every text survives, both files agree, special tokens cannot be typed, transformers agrees."""

import io
import json
import os
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.chat.tokenizer import StreamDecoder, check_fits, load_tokenizer
from erniekit.utils import log
from erniekit.utils.errors import CheckpointError, DataError, UserError

ROOT = Path(__file__).parents[4]
TINY = ROOT / "examples/models/tiny-dense"
SAMPLES = [
    "User: 三千零二十一写成数字\nAssistant: ",
    "Write in digits: four thousand one hundred eighty-two",
    "  two  spaces, a tab\t, a return\r\n and an end ",
    "a▁b ▁▂▃ 你好，世界！ émoji 👩‍👩‍👧 \u00a0\u3000\ufeff\ufffd\x00",
    "2024-03-05",
    "",
]


@pytest.fixture(scope="module")
def by_json():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def by_model(tmp_path_factory):
    """The same tokenizer from tokenizer.model."""
    directory = tmp_path_factory.mktemp("model_only")
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / name, directory)
    return load_tokenizer(directory)


def test_every_text_survives(by_json, by_model):
    for tokenizer in (by_json, by_model):
        for text in SAMPLES:
            assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.decode(tokenizer.encode_plain(text)) == text


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁\n<|>/s三0")), max_size=40
    )
)
def test_any_unicode_survives_and_both_files_agree(by_json, by_model, text):
    ids = by_json.encode(text)
    assert by_json.decode(ids) == text
    assert by_model.encode(text) == ids
    assert by_model.decode(ids) == text
    assert all(0 <= i < by_json.vocab_size for i in ids)


def test_the_first_merge_still_becomes_longer(by_json, by_model):
    """Of this vocabulary it is "is", whose score is 0 as that of what a user defined."""
    assert by_model.encode("ist") == by_json.encode("ist") == [by_json.token_id("ist")]


def test_roles_are_those_of_ernie(by_json, by_model):
    for tokenizer in (by_json, by_model):
        assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 0, 1, 2)
        assert tokenizer.cls_id == tokenizer.token_id("<|begin_of_sentence|>")
        assert tokenizer.sep_id == tokenizer.token_id("<|end_of_sentence|>")
        assert tokenizer.mask_id == tokenizer.token_id("<mask:1>")
        assert tokenizer.vocab_size == 576
        assert tokenizer.special_tokens == by_json.special_tokens


def test_no_bos_no_leading_space_and_single_digits(by_json, by_model):
    for tokenizer in (by_json, by_model):
        assert [tokenizer.decode([i]) for i in tokenizer.encode("1234")] == ["1", "2", "3", "4"]
        assert [tokenizer.decode([i]) for i in tokenizer.encode("三千零二")] == ["三", "千", "零", "二"]
        assert tokenizer.decode(tokenizer.encode("three")[:1]) == "three"


def test_a_dummy_prefix_of_the_sentencepiece_model_is_switched_off(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((TINY / "tokenizer.model").read_bytes() + b"\x1a\x02\x18\x01")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("three")) == "three"
    assert tokenizer.encode("three") == load_tokenizer(TINY).encode("three")


def test_special_tokens_are_one_id_in_templates_and_plain_characters_in_typed_text(by_json, by_model):
    for tokenizer in (by_json, by_model):
        for token, token_id in tokenizer.special_tokens.items():
            text = f"a{token}b"
            assert tokenizer.encode(text).count(token_id) == 1
            plain = tokenizer.encode_plain(text + token + token)
            assert not set(plain) & set(tokenizer.special_tokens.values())
            assert tokenizer.decode(plain) == text + token + token
        assert tokenizer.decode(tokenizer.encode("a<|im_end|>b</s>"), skip_special_tokens=True) == "ab"
        assert tokenizer.decode(tokenizer.encode("a<|im_end|>b</s>")) == "a<|im_end|>b</s>"


def test_encode_plain_equals_encode_without_special_tokens(by_json):
    for text in SAMPLES + ["1 < 2 > 0 <|", "<br> <mask:2>"]:
        assert by_json.encode_plain(text) == by_json.encode(text)


def test_user_defined_pieces_of_a_sentencepiece_model_are_recognised_and_can_be_plain(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world 你好"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=["<|end_of_sentence|>", "<think>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hello<|end_of_sentence|>").count(tokenizer.sep_id) == 1
    assert tokenizer.sep_id not in tokenizer.encode_plain("hello<|end_of_sentence|>")
    assert tokenizer.decode(tokenizer.encode_plain(" hello<think> ")) == " hello<think> "


def test_added_tokens_beyond_the_sentencepiece_model(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    added = {"576": {"content": "<|new|>", "special": True}, "577": {"content": "词语", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|new|>词语") == [576, 577]
    assert tokenizer.encode_plain("<|new|>词语")[-1] == 577 and 576 not in tokenizer.encode_plain("<|new|>词语")
    assert tokenizer.vocab_size == 578
    assert tokenizer.decode([576, 577], skip_special_tokens=True) == "词语"


def test_stream_never_shows_half_a_character(by_json, by_model):
    for tokenizer in (by_json, by_model):
        for text in SAMPLES:
            stream = StreamDecoder(tokenizer)
            parts = [stream.push(i) for i in tokenizer.encode(text)]
            assert "".join(parts) + stream.flush() == text
            if "\ufffd" not in text:
                assert not any("\ufffd" in part for part in parts)
        first, *rest = tokenizer.encode("👧")
        stream = StreamDecoder(tokenizer)
        assert [stream.push(i) for i in (first, *rest)] == ["", "", "", "👧"]


def test_stream_shows_broken_bytes_at_the_end_only(by_json, by_model):
    for tokenizer in (by_json, by_model):
        stream = StreamDecoder(tokenizer)
        half = tokenizer.encode("👧")[:2]
        assert [stream.push(i) for i in half] == ["", ""]
        assert set(stream.flush()) == {"\ufffd"}


def test_ids_outside_the_vocabulary_are_seen_not_dropped(by_json, by_model):
    for tokenizer in (by_json, by_model):
        ids = tokenizer.encode("ab")
        assert tokenizer.decode([ids[0], 100000, *ids[1:], 576]) == "a\ufffdb\ufffd"


def test_half_a_surrogate_pair_is_an_error(by_json, by_model):
    for tokenizer in (by_json, by_model):
        with pytest.raises(DataError, match="surrogate"):
            tokenizer.encode("a\ud800")


def test_a_tokenizer_that_does_not_fit_the_model(by_json):
    check_fits(by_json, 576, "model_name_or_path")
    check_fits(by_json, 600, "model_name_or_path")
    with pytest.raises(UserError, match=r"575, but.*vocab_size is 500"):
        check_fits(by_json, 500, "model_name_or_path")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
def test_damaged_files_are_named(tmp_path, name):
    for source in ("tokenizer.model", "tokenizer_config.json") + (
        ("tokenizer.json",) if name == "tokenizer.json" else ()
    ):
        shutil.copy(TINY / source, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


def test_missing_files_and_contradictions_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="model_name_or_path"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither"):
        load_tokenizer(tmp_path)
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<nope>"}')
    with pytest.raises(CheckpointError, match="<nope>"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"added_tokens_decoder": {"900": {"content": "<x>", "special": true}}}'
    )
    with pytest.raises(CheckpointError, match="900"):
        load_tokenizer(tmp_path)


def test_files_and_chat_template(tmp_path, by_json):
    assert [path.name for path in by_json.files] == [
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ]
    assert by_json.chat_template is None
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default", "template": "from config"}]}'
    )
    assert load_tokenizer(tmp_path).chat_template.source == "from config"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "from processor"}')
    assert load_tokenizer(tmp_path).chat_template.source == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(tmp_path).chat_template.source == "from file"
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert load_tokenizer(tmp_path).chat_template == ("from processor", f"{tmp_path}/chat_template.json: chat_template")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"chat_template": {"default": "x"}}, "chat_template: must be the text.*not an object"),
        ({"chat_template": 5}, "chat_template: must be the text.*not a number"),
        ({"chat_template": True}, "chat_template: must be the text.*not true or false"),
        ({"chat_template": [1]}, "chat_template: a list must have"),
        ({"chat_template": [{"name": "default", "template": 3}]}, "chat_template: a list must have"),
        ({"chat_template": [{"name": ["default"], "template": "x"}]}, "chat_template: a list must have"),
        ({"eos_token": 2}, "eos_token: must be a token's text.*found a number"),
        ({"bos_token": ["<s>"]}, "bos_token: must be a token's text.*found a list"),
        ({"sep_token": {"content": 3}}, "sep_token: must be a token's text"),
        ({"sep_token": {"text": "x"}}, "sep_token: must be a token's text"),
        ({"added_tokens_decoder": {"900": {"content": 5}}}, "added_tokens_decoder: 900: content: must be text"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder: must be an object"),
    ],
)
def test_values_of_another_kind_are_named(tmp_path, content, reason):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer_config.json" in str(caught.value)


def test_a_role_in_the_older_file_is_named_with_it(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": 2}')
    with pytest.raises(CheckpointError, match=r"special_tokens_map\.json: eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", ["gbk", "directory", "pipe"])
def test_a_chat_template_that_is_no_utf8_file_is_named(tmp_path, make):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    path = tmp_path / "chat_template.jinja"
    if make == "gbk":
        path.write_bytes("{# 模板 #}".encode("gbk"))
    elif make == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: (not UTF-8|a directory|not a regular file)"):
        load_tokenizer(tmp_path)


def test_templates_that_are_not_used_are_named(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("erniekit.utils.log.info", said.append)
    monkeypatch.setattr("erniekit.utils.log.warning", said.append)
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template.source == "a" and "tool_use" in said[-1]
    config.write_text(json.dumps({"chat_template": named[1:]}))
    assert load_tokenizer(tmp_path).chat_template is None and "called default" in said[-1]


def test_special_tokens_that_the_vocabulary_lacks_are_named(tmp_path):
    shutil.copy(TINY / "tokenizer.json", tmp_path)
    listed = ["<s>", {"content": "<call>"}, "<answer>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": listed}))
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"extra_special_tokens": {"image_token": "<picture>"}})
    )
    with log.captured() as lines:
        tokenizer = load_tokenizer(tmp_path)
    assert [text.split(": ")[-1] for _, text in lines] == ["<picture>", "<answer>, <call>"]
    assert "<call>" not in tokenizer.special_tokens
    for model in (TINY, TINY.with_name("tiny-vl")):
        with log.captured() as lines:
            load_tokenizer(model)
        assert not lines


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_tiny_models_fit_their_tokenizer(name):
    directory = ROOT / "examples/models" / name
    config = json.loads((directory / "config.json").read_text())
    tokenizer = load_tokenizer(directory)
    assert config["vocab_size"] == tokenizer.vocab_size
    assert (config["pad_token_id"], config["bos_token_id"], config["eos_token_id"]) == (
        tokenizer.pad_id,
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    assert (directory / "tokenizer.model").stat().st_size < 300_000


def test_transformers_reads_the_directory_and_gives_the_same_ids(by_json):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    texts = [text.replace("▁", "_") for text in SAMPLES]  # U+2581 becomes a space there
    texts += [
        "<|begin_of_sentence|>只回答结果。\nUser: 37加58等于几？\nAssistant: 95<|end_of_sentence|>",
        "<think>\n</think><|im_end|></s><mask:4>",
    ]
    texts += [
        json.loads(line)["src"][0]
        for line in (ROOT / "data/demo/test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    ]
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert by_json.encode(text) == ids == theirs(text)["input_ids"]
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == by_json.decode(ids) == text
    for ours, role in (
        (by_json.pad_id, "pad"),
        (by_json.eos_id, "eos"),
        (by_json.bos_id, "bos"),
        (by_json.cls_id, "cls"),
        (by_json.sep_id, "sep"),
    ):
        assert getattr(theirs, f"{role}_token_id") == ours


def test_transformers_config_classes_read_the_tiny_models():
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoConfig.from_pretrained(ROOT / "examples/models/tiny-dense")
    moe = transformers.AutoConfig.from_pretrained(ROOT / "examples/models/tiny-moe")
    assert type(dense).__name__ == "Ernie4_5Config" and dense.rope_parameters["rope_theta"] == 500000.0
    assert type(moe).__name__ == "Ernie4_5_MoeConfig" and (
        moe.moe_num_experts,
        moe.moe_k,
        moe.moe_num_shared_experts,
    ) == (8, 2, 1)


def test_the_longest_added_token_wins(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    texts = ["<a", "<a>", "<ab>", "a"]
    added = {str(576 + i): {"content": text, "special": True} for i, text in enumerate(texts)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<ab><a><aa") == [578, 577, 576, 579]


def test_pieces_that_are_not_there(by_json, by_model):
    for tokenizer in (by_json, by_model):
        assert tokenizer.find_id("<|nope|>") is None
        with pytest.raises(CheckpointError, match="nope"):
            tokenizer.token_id("<|nope|>")


def tokenizer_with(tmp_path, main="tokenizer.model", **files):
    """Loads a copy of a tokenizer, some of whose JSON files are given as text or as values."""
    shutil.copy(TINY / main, tmp_path)
    shutil.copy(TINY / "tokenizer_config.json", tmp_path)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / f"{name}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    return load_tokenizer(tmp_path)


@pytest.mark.parametrize("main", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"added_tokens": {"<x>": -1}}, "added_tokens.json: <x>: must be an integer from 0"),
        ({"added_tokens": {"<x>": 10**12}}, "added_tokens.json: <x>: must be an integer from 0"),
        ({"added_tokens": {"<x>": "576"}}, "added_tokens.json: <x>: must be an integer"),
        ({"added_tokens": {"<x>": True}}, "added_tokens.json: <x>: must be an integer"),
        ({"added_tokens": {"<x>": 576, "<y>": 576}}, "'<x>' and '<y>' have the same id 576"),
        ({"added_tokens": '{"<x>": 576, "<x>": 577}'}, "'<x>' stands twice"),
        ({"added_tokens": ["<x>"]}, "must hold one JSON object, found a list"),
        ({"added_tokens": {"x" * 200: 576}}, "has 200 characters; at most 128"),
        ({"added_tokens": {"<x>": 10}}, "have the same id 10"),
        ({"tokenizer_config": '{"eos_token": "\udcff"}'}, "tokenizer_config.json: not UTF-8 text"),
        ({"tokenizer_config": {"eos_token": 2}}, "tokenizer_config.json: eos_token: must be a token's text"),
        (
            {"special_tokens_map": {"pad_token": {"content": 3}}},
            "special_tokens_map.json: pad_token: must be a token's text",
        ),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "added_tokens_decoder: must be an object, found"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}}, "'x' is not an id"),
        ({"tokenizer_config": {"added_tokens_decoder": {"576": {"content": 1}}}}, "576: content: must be text"),
        ({"tokenizer_config": {"added_tokens_decoder": {"576": {}}}}, "576: it names no content"),
        ({"tokenizer_config": {"added_tokens_decoder": {"9": {"content": ""}}}}, "the token with id 9 is empty"),
    ],
)
def test_wrong_json_beside_a_tokenizer_is_named_with_file_and_key(tmp_path, main, files, says):
    with pytest.raises(CheckpointError, match=says):
        tokenizer_with(tmp_path, main, **files)


def test_a_byte_order_mark_does_not_matter(tmp_path):
    config = (TINY / "tokenizer_config.json").read_text("utf-8")
    assert tokenizer_with(tmp_path, tokenizer_config="\ufeff" + config).vocab_size == 576


def test_a_vocabulary_with_one_id_twice_or_without_end_is_refused(tmp_path):
    content = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    some = [name for name in vocabulary if vocabulary[name] in (300, 301)]
    for i, says in (
        (vocabulary[some[1]], "same id|not a readable"),
        (2**30, "has the id 1073741823|has the id 1073741824"),
    ):
        content["model"]["vocab"] = vocabulary | {some[0]: i}
        with pytest.raises(CheckpointError, match=says):
            tokenizer_with(tmp_path, "tokenizer.json", tokenizer=content)


def test_many_nested_special_tokens_are_found(tmp_path):
    tokens = {"<" * n: 575 + n for n in range(1, 129)}
    tokenizer = tokenizer_with(tmp_path, added_tokens=tokens)
    assert tokenizer.encode("<" * 130) == [703, 577]
