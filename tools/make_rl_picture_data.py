"""Make the pictures and questions of reinforcement learning on pictures: a shape to find, and a mark to enlarge.

    python tools/make_rl_picture_data.py OUTPUT_DIR         # both tasks
    python tools/make_rl_picture_data.py OUTPUT_DIR --sft 60 --train 20 --test 10

The same arguments give the same bytes. No picture is in two of the files. Each task has `TASK-sft.jsonl`, which
leaves a model with a right and a wrong habit, of which it prefers the wrong one, and the prompts `TASK-train.jsonl` and
`TASK-test.jsonl` with the right answers:

* box: a shape in a picture of 4 x 4 fields, 112 x 112 pixels; where is it? In 42 of 100 lines the answer is the box
  [x1, y1, x2, y2] in thousandths of the picture, in the others [y1, x1, y2, x2]. No shape is on the diagonal, where
  both would be the same.
* zoom: a small triangle on 448 x 448 pixels, which the model gets at a quarter of that size; which way does it point?
  In 42 of 100 lines the assistant enlarges its field with image_zoom_in_tool and answers what that shows, in the others
  it guesses, and one guess in four is right. As many lines again show a field alone, and are answered right.
"""

import argparse
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from make_vl_demo_data import COLOURS, SHAPES, draw_shape
from PIL import Image, ImageDraw

SHARE_RIGHT = 0.42
COUNTS = {"sft": 3000, "train": 400, "test": 100}
PAPERS = [(grey, grey, grey) for grey in range(200, 256, 5)]
FIELDS = 4  # of a side of a picture
MARK = 48  # pixels of a triangle's side
WAYS = {"left": ((1, 0), (1, 1), (0, 0.5)), "right": ((0, 0), (0, 1), (1, 0.5)),
        "up": ((0, 1), (1, 1), (0.5, 0)), "down": ((0, 0), (1, 0), (0.5, 1))}  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "image_zoom_in_tool"}}]


class Fact(NamedTuple):
    """What a picture shows: `place` is its left upper corner in fields, `size` in fields, or in pixels from the corner
    of the field for a triangle.
    """

    colour: str
    kind: str
    paper: tuple[int, int, int]
    place: tuple[int, int]
    size: tuple[int, int]


def box_facts() -> list[Fact]:
    """Every picture of the task box."""
    return [
        Fact(colour, shape, paper, (x, y), (size, size))
        for colour, shape, paper, size in product(COLOURS, SHAPES, PAPERS, (1, 2, 3))
        for x, y in product(range(FIELDS + 1 - size), repeat=2)
        if x != y
    ]


def zoom_facts() -> list[Fact]:
    """Every picture of the task zoom."""
    places = list(product(range(FIELDS), repeat=2))
    shifts = list(product((4, 32, 60), repeat=2))
    return [Fact(*each) for each in product(COLOURS, WAYS, PAPERS, places, shifts)]


def box_picture(fact: Fact) -> Image.Image:
    picture = Image.new("RGB", (28 * FIELDS, 28 * FIELDS), fact.paper)
    left, top, side = 28 * fact.place[0], 28 * fact.place[1], 28 * fact.size[0]
    box = (left, top, left + side - 1, top + side - 1)
    draw_shape(ImageDraw.Draw(picture), fact.kind, box, COLOURS[fact.colour][1])
    return picture


def zoom_picture(fact: Fact) -> Image.Image:
    picture = Image.new("RGB", (112 * FIELDS, 112 * FIELDS), fact.paper)
    left, top = (112 * place + shift for place, shift in zip(fact.place, fact.size, strict=True))
    corners = [(left + MARK * x, top + MARK * y) for x, y in WAYS[fact.kind]]
    ImageDraw.Draw(picture).polygon(corners, fill=COLOURS[fact.colour][1])
    return picture


def box_of(fact: Fact, size: int) -> list[int]:
    """[x1, y1, x2, y2] in thousandths of `size` fields from the fact's place."""
    (x, y), step = fact.place, 1000 // FIELDS
    return [step * x, step * y, step * (x + size), step * (y + size)]


def box_records(fact: Fact, name: str, right: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The line for fine-tuning, whose answer has the right order or the other, and the prompt."""
    x1, y1, x2, y2 = box = box_of(fact, fact.size[0])
    text = {"role": "user", "content": f"<image>Where is the {fact.kind}?"}
    answer = {"role": "assistant", "content": json.dumps(box if right else [y1, x1, y2, x2])}
    images = {"images": [name]}
    return {"messages": [text, answer], **images}, {"prompt": [text], "answer": box, **images}


def zoom_records(fact: Fact, name: str, right: bool, rng: random.Random) -> tuple[dict[str, Any], dict[str, Any]]:
    """The line for fine-tuning, in which the assistant enlarges the field or guesses, and the prompt."""
    text = {"role": "user", "content": "<image>Which way?"}
    call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": box_of(fact, 1)}}
    turns: list[dict[str, Any]] = [{"role": "assistant", "content": rng.choice(list(WAYS))}]
    if right:
        calls = [{"type": "function", "function": call}]
        turns = [
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "<image>"},
            {"role": "assistant", "content": fact.kind},
        ]
    images = [name, field_name(name)] if right else [name]
    tuning = {"messages": [text, *turns], "images": images, "tools": TOOLS}
    return tuning, {"prompt": [text], "answer": fact.kind, "images": [name]}


def field_name(name: str) -> str:
    """The file of the field that a picture's triangle is in."""
    return f"{Path(name).with_suffix('')}-field.png"


def field_record(fact: Fact, picture: Image.Image, name: str, output: Path) -> dict[str, Any]:
    """Save the field of a picture that shows something, and give the line that asks about it alone."""
    left, top = 112 * fact.place[0], 112 * fact.place[1]
    picture.crop((left, top, left + 112, top + 112)).save(output / field_name(name))
    text, answer = {"role": "user", "content": "<image>Which way?"}, {"role": "assistant", "content": fact.kind}
    return {"messages": [text, answer], "images": [field_name(name)], "tools": TOOLS}


def lines(task: str, output: Path, facts: list[Fact], split: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Save the pictures of a file and give its lines."""
    for number, fact in enumerate(facts):
        name = f"media/{task}-{split}-{number:05d}.png"
        picture = box_picture(fact) if task == "box" else zoom_picture(fact)
        picture.save(output / name)
        right = rng.random() < SHARE_RIGHT
        records = box_records(fact, name, right) if task == "box" else zoom_records(fact, name, right, rng)
        yield records[0 if split == "sft" else 1]
        if split == "sft" and task == "zoom":
            yield field_record(fact, picture, name, output)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    for split, count in COUNTS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"lines of TASK-{split}.jsonl")
    args = parser.parse_args()
    (args.output_dir / "media").mkdir(parents=True, exist_ok=True)
    for task, facts in (("box", box_facts()), ("zoom", zoom_facts())):
        rng = random.Random(f"20261129 {task}")
        rng.shuffle(facts)
        for split in COUNTS:
            count = vars(args)[split]
            if count > len(facts):
                raise SystemExit(f"{task}: there are no further pictures; ask for fewer lines than {count}")
            chosen, facts = facts[:count], facts[count:]
            text = [json.dumps(line) for line in lines(task, args.output_dir, chosen, split, rng)]
            (args.output_dir / f"{task}-{split}.jsonl").write_text("".join(f"{line}\n" for line in text), "utf-8")


if __name__ == "__main__":
    main()
