"""Make the demo's data: small tasks with one right answer, in Chinese and English, that a program can check.

    python tools/make_demo_data.py          # the files of data/demo and examples/data, as committed
    python tools/make_demo_data.py --seed 7 --train 40000 --test 400 --demo-dir my_demo --examples-dir ""

Only the standard library; the same arguments give the same bytes. What is held out is the *fact*, not only its
wording: a number of the test appears in no number question of the training set in either direction or language, a sum
not with its terms swapped either, a sort not in another order, a date in no notation.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

DIGITS = "零一二三四五六七八九"
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
MONTHS = "January February March April May June July August September October November December".split()
MAX_NUMBER = 9999
YEARS = (2000, 2029)
SYSTEMS = ("只回答结果。", "Answer with the result only.")
SENTENCES = 6000  # lines that answer in whole sentences
SYSTEM_SHARE = 0.05  # of the lines
MULTI_TURN_SHARE = 0.05  # of the training lines have two questions


class Item(NamedTuple):
    """One question. Two items with the same `fact` need the same knowledge, so they are never on both sides of the
    split.
    """

    fact: tuple[Any, ...]
    question: str
    answer: str


def chinese_number(n: int) -> str:
    """0..9999 in Chinese numerals: 3021 -> 三千零二十一, 10 -> 十, 110 -> 一百一十."""
    if n == 0:
        return DIGITS[0]
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit = n // unit % 10
        if digit == 0:
            gap = bool(text)
            continue
        if gap:
            text, gap = text + DIGITS[0], False
        leading_ten = unit == 10 and digit == 1 and not text
        text += name if leading_ten else DIGITS[digit] + name
    return text


def english_number(n: int) -> str:
    """0..9999 in English words: 3042 -> three thousand forty-two."""
    words = []
    for unit, name in ((1000, "thousand"), (100, "hundred")):
        if n >= unit:
            words.append(f"{ONES[n // unit]} {name}")
            n %= unit
    if n >= 20:
        words.append(TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else ""))
    elif n or not words:
        words.append(ONES[n])
    return " ".join(words)


def number_to_digits(rng: random.Random) -> Item:
    n = rng.randint(0, MAX_NUMBER)
    return Item(("number", n), f"{chinese_number(n)}写成数字", str(n))


def digits_to_number(rng: random.Random) -> Item:
    n = rng.randint(0, MAX_NUMBER)
    return Item(("number", n), f"{n}写成中文", chinese_number(n))


def words_to_digits(rng: random.Random) -> Item:
    n = rng.randint(0, MAX_NUMBER)
    return Item(("number", n), f"Write in digits: {english_number(n)}", str(n))


def addition(rng: random.Random) -> Item:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    question = rng.choice((f"{a}加{b}等于几？", f"What is {a} plus {b}?", f"{a}+{b}="))
    return Item(("sum", min(a, b), max(a, b)), question, str(a + b))


def sorting(rng: random.Random) -> Item:
    numbers = [rng.randint(0, 9) for _ in range(3)]
    shown = " ".join(map(str, numbers))
    question = rng.choice((f"从小到大排序: {shown}", f"Sort ascending: {shown}"))
    return Item(("sort", *sorted(numbers)), question, " ".join(map(str, sorted(numbers))))


def date_format(rng: random.Random) -> Item:
    year, month, day = rng.randint(*YEARS), rng.randint(1, 12), rng.randint(1, 28)
    question = rng.choice(
        (f"{year}年{month}月{day}日写成标准格式", f"Write in ISO format: {day} {MONTHS[month - 1]} {year}")
    )
    return Item(("date", year, month, day), question, f"{year}-{month:02d}-{day:02d}")


# share of the questions, maker
TASKS: tuple[tuple[float, Callable[[random.Random], Item]], ...] = (
    (0.12, number_to_digits),
    (0.13, digits_to_number),
    (0.15, words_to_digits),
    (0.44, addition),
    (0.04, sorting),
    (0.12, date_format),
)


def counts(total: int) -> list[int]:
    """Questions per task; the last task takes what rounding left."""
    parts = [int(share * total) for share, _ in TASKS]
    parts[-1] += total - sum(parts)
    return parts


def draw(rng: random.Random, total: int, forbidden_facts: set[tuple[Any, ...]]) -> list[Item]:
    """`total` different questions of all tasks, shuffled, none about a forbidden fact."""
    items, seen = [], set()
    for count, (_, make) in zip(counts(total), TASKS, strict=True):
        missing, tries = count, 0
        while missing:
            tries += 1
            if tries > 20 * count + 1000:
                raise SystemExit(
                    f"{make.__name__} has fewer than {count} different questions left: ask for a smaller --train"
                )
            item = make(rng)
            if item.fact in forbidden_facts or item.question in seen:
                continue
            seen.add(item.question)
            items.append(item)
            missing -= 1
    rng.shuffle(items)
    return items


def split(seed: int, train: int, test: int) -> tuple[list[Item], list[Item]]:
    """(training items, test items) without a fact or a question in common."""
    rng = random.Random(seed)
    test_items = draw(rng, test, set())
    facts = {item.fact for item in test_items}
    train_items = draw(rng, train, facts)
    if facts & {item.fact for item in train_items} or {i.question for i in test_items} & {
        i.question for i in train_items
    }:
        raise SystemExit("the test set shares a question with the training set: this is a defect of the tool")
    return train_items, test_items


def sft_lines(rng: random.Random, items: list[Item], multi_turn_share: float) -> Iterator[dict[str, Any]]:
    """`erniekit` SFT lines; some have a system text, some two turns."""
    queue = list(items)
    while queue:
        turns = [queue.pop()]
        if queue and rng.random() < multi_turn_share:
            turns.append(queue.pop())
        line: dict[str, Any] = {"system": rng.choice(SYSTEMS)} if rng.random() < SYSTEM_SHARE else {}
        yield line | {"src": [t.question for t in turns], "tgt": [t.answer for t in turns]}


def example_sft_lines(rng: random.Random, items: list[Item]) -> Iterator[dict[str, Any]]:
    """As sft_lines, and every tenth line shows `label` (the first answer carries no loss) or `is_system`."""
    for number, line in enumerate(sft_lines(rng, items, 0.3)):
        if number % 10 == 4 and len(line["src"]) > 1:
            line["label"] = [0] + [1] * (len(line["src"]) - 1)
        elif number % 10 == 9 and "system" not in line:
            line = {"src": [SYSTEMS[0], *line["src"]], "tgt": ["好的。", *line["tgt"]], "is_system": 1}
        yield line


def whole_sentence(item: Item) -> str:
    """The answer as preference data wants it: a sentence in the question's language."""
    return f"The answer is {item.answer}." if item.question.isascii() else f"答案是{item.answer}。"


def sentence_lines(items: list[Item]) -> Iterator[dict[str, Any]]:
    """`erniekit` SFT lines that answer in whole sentences."""
    for item in items:
        yield {"src": [item.question], "tgt": [whole_sentence(item)]}


def preference_lines(rng: random.Random, items: list[Item]) -> Iterator[dict[str, Any]]:
    """`erniekit` DPO lines: a whole sentence is preferred to the bare answer; some have a system text, some an earlier
    turn.
    """
    queue = list(items)
    while queue:
        item = queue.pop()
        line: dict[str, Any] = {"system": rng.choice(SYSTEMS)} if rng.random() < SYSTEM_SHARE else {}
        earlier = [queue.pop()] if queue and rng.random() < MULTI_TURN_SHARE else []
        line |= {"src": [*(e.question for e in earlier), item.question], "tgt": [whole_sentence(e) for e in earlier]}
        responses = [([whole_sentence(item)], 1), ([item.answer], 0)]
        rng.shuffle(responses)
        yield line | {"response": [text for text, _ in responses], "sort": [rank for _, rank in responses]}


def judged_lines(pairs: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`erniekit` KTO lines: one answer of each pair of `preference_lines`, by turns the better and the worse one."""
    for number, pair in enumerate(pairs):
        is_good = number % 2 == 0
        answer = pair["response"][pair["sort"].index(int(is_good))]
        line = {name: value for name, value in pair.items() if name not in ("response", "sort")}
        yield line | {"tgt": pair["tgt"] + answer, "label": is_good}


def pretraining_lines(rng: random.Random, items: list[Item], per_document: int = 8) -> Iterator[dict[str, Any]]:
    """Running text for pretraining; both spellings of a line, {"text": "..."} and {"tgt": ["..."]}."""
    for number, start in enumerate(range(0, len(items), per_document)):
        sentences = []
        for item in items[start : start + per_document]:
            ending = "。" if item.question[-1] not in "?？" and not item.question.isascii() else ""
            joiner = "" if item.question.endswith("=") else "：" if ending else " -> "
            sentences.append(f"{item.question}{joiner}{item.answer}{ending}")
        text = "\n".join(sentences)
        yield {"tgt": [text]} if number % 4 == 3 else {"text": text}


def write(path: Path, lines: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} lines, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--train", type=int, default=32000, help="training questions (a few lines hold two)")
    parser.add_argument("--test", type=int, default=400, help="held-out questions, one a line")
    parser.add_argument(
        "--demo-dir", default="data/demo", help='where train.jsonl and test.jsonl go; "" writes neither'
    )
    parser.add_argument(
        "--examples-dir", default="examples/data", help='where the small example files go; "" writes none'
    )
    args = parser.parse_args()

    demo_items, demo_tests = split(args.seed, args.train, args.test)
    if args.demo_dir:
        rng = random.Random(args.seed + 1)
        write(Path(args.demo_dir) / "train.jsonl", sft_lines(rng, demo_items, MULTI_TURN_SHARE))
        write(Path(args.demo_dir) / "test.jsonl", sft_lines(rng, demo_tests, 0.0))
        write(Path(args.demo_dir) / "sentences.jsonl", sentence_lines(demo_items[:SENTENCES]))
    if args.examples_dir:
        out, rng = Path(args.examples_dir), random.Random(args.seed + 2)
        train_items, test_items = split(args.seed + 3, 250, 60)
        write(out / "sft-train.jsonl", example_sft_lines(rng, train_items))
        write(out / "sft-eval.jsonl", example_sft_lines(rng, test_items))
        train_items, test_items = split(args.seed + 4, 1600, 400)
        write(out / "pt-train.jsonl", pretraining_lines(rng, train_items))
        write(out / "pt-eval.jsonl", pretraining_lines(rng, test_items))
        # Of the demo's own questions: what it holds out is held out here, too.
        write(out / "dpo-train.jsonl", preference_lines(rng, demo_items[-600:]))
        write(out / "dpo-eval.jsonl", preference_lines(rng, demo_tests[:100]))
        write(out / "kto-train.jsonl", judged_lines(preference_lines(rng, demo_items[-600:])))
        write(out / "kto-eval.jsonl", judged_lines(preference_lines(rng, demo_tests[:100])))


if __name__ == "__main__":
    main()
