"""Train the small tokenizer of the tiny models: sentencepiece BPE with ERNIE 4.5's special tokens in their roles.

    python tools/train_tokenizer.py                       # examples/models/tiny-dense and tiny-moe, as committed
    python tools/train_tokenizer.py --demo data/demo/tools-train.jsonl --out examples/models/tiny-tools
    python tools/train_tokenizer.py --vocab 1024 --out my_tokenizer --text my.txt

Every text survives encoding: what has no piece of its own is spelled in UTF-8 bytes (256 byte pieces). Digits and
Chinese numerals are split one by one, no space is added in front, nothing is normalised. tokenizer.json holds the
same rules for `tokenizers`/transformers and yields the same ids.
"""

import argparse
import io
import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

UNK, BOS, EOS = "<unk>", "<s>", "</s>"
CLS, SEP, MASK = "<|begin_of_sentence|>", "<|end_of_sentence|>", "<mask:1>"
EXTRA = [f"<mask:{n}>" for n in range(4, 8)]
EXTRA += [
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_PLACEHOLDER|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
]
EXTRA += ["<think>", "</think>", "<|im_start|>", "<|im_end|>"]
ROLES = {
    "unk_token": UNK,
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": UNK,
    "cls_token": CLS,
    "sep_token": SEP,
    "mask_token": MASK,
}
SPACE = "\u2581"  # sentencepiece's visible space
ALONE = re.compile("([零一二三四五六七八九十百千])")  # characters that must not merge with their neighbours


def demo_texts(path: Path) -> Iterator[str]:
    """The turns of an `erniekit` or `messages` jsonl as the text template shows them, one line each."""
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        if "messages" in sample:
            yield from tool_texts(sample)
            continue
        for question, answer in zip(sample["src"], sample["tgt"], strict=True):
            yield from (f"User: {question}", f"Assistant: {answer}", answer)
        if "system" in sample:
            yield sample["system"]


def tool_texts(sample: dict[str, Any]) -> Iterator[str]:
    """The lines of a conversation with tools."""
    yield from ("<tool_list>", json.dumps(sample.get("tools", []), ensure_ascii=False), "</tool_list>")
    for message in sample["messages"]:
        if message["role"] == "tool":
            yield from ("User: <tool_output>", message["content"], "</tool_output>")
        elif message["content"]:
            yield f"{message['role'].capitalize()}: {message['content']}"
        for call in message.get("tool_calls", []):
            yield from ("Assistant: <tool_call>", json.dumps(call["function"], ensure_ascii=False), "</tool_call>")


def train(texts: list[str], vocab: int) -> bytes:
    """The bytes of a sentencepiece model. No file is involved, so that no path ends up in the model and the same
    texts give the same bytes.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(part for text in texts for part in ALONE.split(text) if part),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,  # ERNIE pads with <unk>
        control_symbols=[CLS, SEP, MASK, *EXTRA],
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        required_chars=string.ascii_letters + string.digits + string.punctuation,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def merges_of(processor: sentencepiece.SentencePieceProcessor) -> list[tuple[str, str]]:
    """The BPE merges behind a sentencepiece BPE model: every split of a piece into two pieces, best piece first
    (sentencepiece joins by the score of the result).
    """
    ordinary = {
        processor.id_to_piece(i): processor.get_score(i)
        for i in range(processor.get_piece_size())
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    }
    ranked = sorted((piece for piece in ordinary if len(piece) > 1), key=lambda piece: -ordinary[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]


def write_tokenizer_json(model: bytes, out: Path) -> None:
    """The same tokenizer in `tokenizers`' format."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    bpe = models.BPE(vocab=vocab, merges=merges_of(processor), unk_token=UNK, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special_tokens()])
    tokenizer.save(str(out))


def special_tokens() -> list[str]:
    return [UNK, BOS, EOS, CLS, SEP, MASK, *EXTRA]


def tokenizer_config() -> dict[str, Any]:
    decoder = {
        str(i): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, text in enumerate(special_tokens())
    }
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "padding_side": "right",
        **ROLES,
        "additional_special_tokens": EXTRA,
        "added_tokens_decoder": decoder,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--demo", default="data/demo/train.jsonl", help="an `erniekit` or `messages` jsonl to learn the pieces from"
    )
    parser.add_argument("--text", nargs="*", default=[], help="further plain text files")
    parser.add_argument("--vocab", type=int, default=576)
    parser.add_argument("--out", nargs="+", default=["examples/models/tiny-dense", "examples/models/tiny-moe"])
    args = parser.parse_args()

    texts = list(demo_texts(Path(args.demo)))
    for path in args.text:
        texts += Path(path).read_text(encoding="utf-8").splitlines()
    model = train(texts, args.vocab)
    for out in map(Path, args.out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "tokenizer.model").write_bytes(model)
        write_tokenizer_json(model, out / "tokenizer.json")
        write_json(out / "tokenizer_config.json", tokenizer_config())
        write_json(out / "special_tokens_map.json", ROLES | {"additional_special_tokens": EXTRA})
        print(f"{out}: {args.vocab} pieces, tokenizer.model {len(model) / 1000:.1f} kB")


if __name__ == "__main__":
    main()
