"""Make the demo's data for tool calling: questions in Chinese and English for tools, and some that no tool answers.

    python tools/make_tool_demo_data.py     # data/demo/tools-*.jsonl, examples/data/function-call-*.jsonl, as committed

Only the standard library; the same arguments give the same bytes. Each conversation offers one to three of the tools
and has the calls, their results and the answer that follows; `pair` questions need two calls at once, some
conversations go on with a second question, and a question whose tool is not offered is answered without a call. What is
held out is the fact: no calculation, conversion or item of the test is in the training set, in either language.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]
OPERATIONS = {  # operator -> (Chinese, English)
    "+": ("加", "plus"),
    "-": ("减", "minus"),
    "*": ("乘", "times"),
}
UNITS = {  # unit -> (Chinese, English, its smaller unit, how many of those)
    "km": ("公里", "km", "m", 1000),
    "kg": ("千克", "kg", "g", 1000),
    "h": ("小时", "hours", "min", 60),
    "min": ("分", "minutes", "s", 60),
}
UNIT_NAMES = {"m": ("米", "m"), "g": ("克", "g"), "min": ("分", "minutes"), "s": ("秒", "seconds")}
NO_TOOL = ("没有能用的工具。", "No tool can do that.")
TALK = (
    ("你好", "你好！"),
    ("谢谢", "不用谢。"),
    ("Hello", "Hello!"),
    ("Thank you", "You are welcome."),
)


def tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    """A tool's description in OpenAI's form; properties are name=type."""
    parameters = {"type": "object", "properties": {key: {"type": kind} for key, kind in properties.items()}}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    "calculate": tool("calculate", "a op b", a="integer", op="string", b="integer"),
    "convert": tool("convert", "change units", value="integer", unit="string", to="string"),
    "price": tool("price", "price of an item", item="string"),
}


class Item(NamedTuple):
    """A question with its one call. `fact` is what must not be on both sides of the split; `result` is what the tool
    returns, `answer` what the assistant then says; `chinese` the language.
    """

    fact: tuple[Any, ...]
    chinese: bool
    question: str
    name: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str


def calculation(rng: random.Random, chinese: bool) -> Item:
    """Two numbers below 100 and an operation."""
    op = rng.choice(list(OPERATIONS))
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    value = {"+": a + b, "-": a - b, "*": a * b}[op]
    words = OPERATIONS[op]
    question = f"{a}{words[0]}{b}等于几？" if chinese else f"What is {a} {words[1]} {b}?"
    fact = ("calculate", op, *(sorted((a, b)) if op != "-" else (a, b)))
    arguments = {"a": a, "op": op, "b": b}
    return Item(fact, chinese, question, "calculate", arguments, {"result": value}, str(value))


def conversion(rng: random.Random, chinese: bool) -> Item:
    """A number of units in the next smaller unit."""
    unit = rng.choice(list(UNITS))
    value = rng.randint(2, 99)
    named, english, to, factor = UNITS[unit]
    small = UNIT_NAMES[to]
    question = f"{value}{named}是几{small[0]}？" if chinese else f"Convert {value} {english} to {small[1]}."
    result = value * factor
    answer = f"{result}{small[0]}" if chinese else f"{result} {small[1]}"
    arguments = {"value": value, "unit": unit, "to": to}
    return Item(("convert", unit, value), chinese, question, "convert", arguments, {"result": result}, answer)


def look_up(rng: random.Random, chinese: bool) -> Item:
    """The price of an item, which only the tool knows."""
    item = f"{rng.choice('ABCDEFGHKMNPRSTWXY')}{rng.randint(10, 99)}"
    price = rng.randint(2, 99)
    question = f"{item}几元？" if chinese else f"What does {item} cost?"
    answer = f"{price}元" if chinese else f"{price} yuan"
    return Item(("price", item), chinese, question, "price", {"item": item}, {"price": price}, answer)


MAKERS = (calculation, conversion, look_up)
KINDS = ("one", "pair", "two rounds", "not offered", "talk")
SHARES = (0.58, 0.16, 0.12, 0.10, 0.04)


def call_messages(items: list[Item]) -> list[Message]:
    """The assistant's calls and the tools' results, in the same order."""
    calls = [{"type": "function", "function": {"name": item.name, "arguments": item.arguments}} for item in items]
    results = [{"role": "tool", "content": json.dumps(item.result)} for item in items]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *results]


def pair_text(items: list[Item]) -> tuple[str, str]:
    """(question, answer) of two items of one language at once."""
    first, second = items
    if first.chinese:
        return f"{first.question}{second.question}", f"{first.answer}，{second.answer}"
    return f"{first.question} {second.question}", f"{first.answer}, {second.answer}"


class Drawer:
    """Draws conversations; facts in `forbidden` are never asked."""

    def __init__(self, rng: random.Random, forbidden: set[tuple[Any, ...]]):
        self._rng, self._forbidden = rng, forbidden
        self.facts: set[tuple[Any, ...]] = set()

    def item(self, chinese: bool) -> Item:
        """A question whose fact may be asked."""
        while True:
            item = self._rng.choice(MAKERS)(self._rng, chinese)
            if item.fact not in self._forbidden:
                self.facts.add(item.fact)
                return item

    def line(self) -> dict[str, Any]:
        """One conversation as a line of type `messages`."""
        rng = self._rng
        kind = rng.choices(KINDS, SHARES)[0]
        chinese = rng.random() < 0.5
        if kind == "talk":
            question, answer = rng.choice(TALK)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            return {"messages": messages, "tools": self._offer(set())}
        items = [self.item(chinese) for _ in range(1 if kind in ("one", "not offered") else 2)]
        needed = {item.name for item in items}
        if kind == "not offered":
            others = [name for name in TOOLS if name not in needed]
            offered = rng.sample(others, rng.randint(1, 2))
            messages = [
                {"role": "user", "content": items[0].question},
                {"role": "assistant", "content": NO_TOOL[0 if chinese else 1]},
            ]
            return {"messages": messages, "tools": [TOOLS[name] for name in offered]}
        rounds = [items] if kind == "pair" else [[item] for item in items]
        messages = []
        for asked in rounds:
            question, answer = pair_text(asked) if len(asked) == 2 else (asked[0].question, asked[0].answer)
            messages += [{"role": "user", "content": question}, *call_messages(asked)]
            messages.append({"role": "assistant", "content": answer})
        return {"messages": messages, "tools": self._offer(needed)}

    def _offer(self, needed: set[str]) -> list[dict[str, Any]]:
        """The needed tools and perhaps others, in any order."""
        others = [name for name in TOOLS if name not in needed]
        names = [*needed, *self._rng.sample(others, self._rng.randint(0 if needed else 1, min(1, len(others))))]
        self._rng.shuffle(names := sorted(names))
        return [TOOLS[name] for name in names]


def split(seed: int, train: int, test: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training lines, test lines) without a fact in common."""
    drawer = Drawer(random.Random(seed), set())
    test_lines = [drawer.line() for _ in range(test)]
    learner = Drawer(random.Random(seed + 1), drawer.facts)
    train_lines = [learner.line() for _ in range(train)]
    if drawer.facts & learner.facts:
        raise SystemExit("the test set shares a fact with the training set: this is a defect of the tool")
    return train_lines, test_lines


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{path}: {len(rows)} lines, {path.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    """Read the arguments, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--train", type=int, default=2400, help="training conversations")
    parser.add_argument("--test", type=int, default=160, help="held-out conversations")
    parser.add_argument("--demo-dir", default="data/demo", help='where the demo\'s files go; "" writes none')
    parser.add_argument("--examples-dir", default="examples/data", help='where the small files go; "" writes none')
    args = parser.parse_args()
    if args.demo_dir:
        train_lines, test_lines = split(args.seed, args.train, args.test)
        write(Path(args.demo_dir) / "tools-train.jsonl", train_lines)
        write(Path(args.demo_dir) / "tools-test.jsonl", test_lines)
    if args.examples_dir:
        train_lines, test_lines = split(args.seed + 3, 120, 30)
        write(Path(args.examples_dir) / "function-call-train.jsonl", train_lines)
        write(Path(args.examples_dir) / "function-call-eval.jsonl", test_lines)


if __name__ == "__main__":
    main()
