"""ERNIE 4.5's own tokenizer and chat template: ids, round trips, and templates byte for byte.

The files are looked for in `shared/data/ernie45` beside the repository, since they are too large to keep in it.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from erniekit.data.chat.template import load_template
from erniekit.data.chat.tokenizer import StreamDecoder, load_tokenizer
from erniekit.utils.errors import DataError

ROOT = Path(__file__).parents[4]
REAL = ROOT.parent / "shared/data/ernie45"
pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="the published tokenizer's files are not here")

# As in the published files.
IDS = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "<|end_of_sentence|>": 100272,
    "<|begin_of_sentence|>": 100273,
    "<mask:1>": 100274,
    "<mask:4>": 100277,
    "<mask:7>": 100280,
    "<|IMAGE_PLACEHOLDER|>": 100295,
    "<|AUDIO_PLACEHOLDER|>": 100296,
    "<|LOC_0|>": 100297,
    "<|LOC_1000|>": 101297,
    "<|LOC_BEGIN|>": 101298,
    "<|LOC_END|>": 101299,
    "<|LOC_SEP|>": 101300,
    "<|CROP_COL_SEP|>": 101301,
    "<|CROP_ROW_SEP|>": 101302,
    "<|IMAGE_SEP|>": 101303,
}
TEXTS = [
    "法国的首都是哪里？巴黎。",
    "The quick brown fox, 3.14 and 1,000,000.",
    "def f(x):\n    return x ** 2  # 平方\n",
    "émoji 👩‍👩‍👧 and 𠮷, ｆｕｌｌ　ｗｉｄｔｈ",
    " leading and trailing ",
    "two  spaces\tand a tab",
]
VARIANTS = {
    "default": {"add_generation_prompt": True},  # what the template does where it is not told
    "generation_prompt": {"add_generation_prompt": True},
    "no_generation_prompt": {"add_generation_prompt": False},
    "enable_thinking_true": {"add_generation_prompt": True, "enable_thinking": True},
    "enable_thinking_false": {"add_generation_prompt": True, "enable_thinking": False},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The vocabulary with the settings and the chat template of ERNIE-4.5-0.3B."""
    directory = tmp_path_factory.mktemp("ernie45")
    shutil.copy(REAL / "tokenizer/tokenizer.model", directory)
    for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        shutil.copy(REAL / "text-0.3b-base" / name, directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def template(tokenizer):
    return load_template(tokenizer)


@pytest.fixture(scope="module")
def rendered():
    return json.loads((REAL / "rendered.json").read_text(encoding="utf-8"))


def expected_ids(text: str) -> list[int]:
    """The ids by the sentencepiece library and added_tokens.json, special tokens being one id each."""
    library = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "tokenizer/tokenizer.model"))
    special = IDS | json.loads((REAL / "tokenizer/added_tokens.json").read_text(encoding="utf-8"))
    ids: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        ids += [special[part]] if part in special else library.encode(part)
    return ids


def test_special_tokens_have_the_published_ids(tokenizer):
    assert {token: tokenizer.token_id(token) for token in IDS} == IDS
    for token, number in IDS.items():
        assert tokenizer.encode(f"a{token}b").count(number) == 1
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.sep_id) == (2, 1, 0, 100272)
    assert tokenizer.vocab_size == 101304  # config.json pads it to 103424


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_the_library(tokenizer, text):
    assert tokenizer.encode(text) == expected_ids(text)


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ▁\n<|>/s三0")), max_size=40)
)
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push(number) for number in tokenizer.encode(text)) + decoder.flush() == text


def test_special_tokens_in_typed_text_stay_text(tokenizer):
    for token, number in IDS.items():
        ids = tokenizer.encode_plain(f"a{token}b")
        assert number not in ids and tokenizer.decode(ids) == f"a{token}b"


def conversations(rendered):
    """(name, messages, {variant: text}) of what the template renders."""
    for name, results in rendered["real"]["text-0.3b-base"]["results"].items():
        texts = {variant: result["text"] for variant, result in results.items() if "text" in result}
        if texts:
            yield name, rendered["conversations"][name], texts


def test_the_template_writes_the_published_bytes(template, rendered):
    compared = 0
    for name, messages, texts in conversations(rendered):
        for variant, text in texts.items():
            assert template.render(messages, **VARIANTS[variant]) == text, (name, variant)
            compared += 1
    assert compared == 35


def test_the_built_in_template_writes_the_same_where_no_tool_is_called(tokenizer, rendered):
    built_in = load_template(tokenizer, "text")
    for name, messages, texts in conversations(rendered):
        if name != "tools":
            prompt = texts["generation_prompt"]
            assert built_in.render(messages, add_generation_prompt=True) == prompt, name


def test_what_the_template_refuses_is_one_message(template, rendered):
    with pytest.raises(DataError):
        template.render(rendered["conversations"]["image"])


@pytest.mark.parametrize("name", ["plain", "system", "multi_turn"])
def test_prompts_have_the_ids_of_the_rendered_text(template, rendered, name):
    """Up to where a turn ends: each turn is encoded by itself, as in training."""
    text = rendered["real"]["text-0.3b-base"]["results"][name]["generation_prompt"]["text"]
    ids = template.prompt_ids(rendered["conversations"][name])
    assert template.tokenizer.decode(ids) == text
    if name != "multi_turn":  # a single turn: one text, so the ids are those of the text
        assert ids == expected_ids(text)


def test_training_on_a_conversation(template, rendered):
    """The published rendering without its generation prompt; the loss is on the answers and their ends, which are
    </s>.
    """
    messages = rendered["conversations"]["multi_turn_finished"]
    text = rendered["real"]["text-0.3b-base"]["results"]["multi_turn_finished"]["no_generation_prompt"]["text"]
    ids, labels = template.labels(template.encode(messages))
    decode = template.tokenizer.decode
    assert decode(ids) == text.removesuffix("<|end_of_sentence|>") + "</s>"
    assert decode([label for label in labels if label != -100]) == "4</s>12</s>"
