"""Make the pictures, clips and questions of the vision-language demo, in Chinese and English.

    python tools/make_vl_demo_data.py OUTPUT_DIR            # 1400 rows a task to train on, 100 held out
    python tools/make_vl_demo_data.py OUTPUT_DIR --train 5000 --test 300 --seed 7

Seven tasks, each with one right answer that a program can check: which handwritten digit, how many shapes, what colour,
which bar of a chart is the tallest, which word, where (a box), and what happens when in a clip. The digits are
scikit-learn's (1,797 scans of 8 x 8 pixels of the UCI repository); everything else is drawn here. What is held out is
the picture: another scan of a digit, another arrangement of shapes, another rendering of a word.

Files: `TASK-train.jsonl` and `TASK-test.jsonl` (messages with `<image>` or `<video>`), `captions-train.jsonl` and
`captions-test.jsonl` (the same pictures with some words about each, for pretraining), and the PNG files below media/. A
clip is a directory of PNG frames, two a second. `text-train.jsonl` (plain text) has data/demo's questions to write a
number in digits, and the captions without their pictures; `text-test.jsonl` has such questions that are held out. The
same arguments give the same bytes.
"""

import argparse
import functools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "data" / "demo"
FONT = Path(__file__).resolve().parent / "fonts" / "NotoSansSC-Subset.ttf"
COLOURS = {  # name: (Chinese, RGB)
    "red": ("红", (214, 40, 40)),
    "green": ("绿", (40, 150, 60)),
    "blue": ("蓝", (40, 80, 210)),
    "yellow": ("黄", (240, 200, 30)),
    "purple": ("紫", (140, 50, 170)),
    "black": ("黑", (20, 20, 20)),
}
SHAPES = {"circle": "圆", "square": "方块", "triangle": "三角"}
WORDS_CHINESE = "苹果 月亮 太阳 学校 飞机 火车 电脑 花园 小狗 老师 河流 森林 海洋 米饭 衣服 雨伞".split()
WORDS_ENGLISH = "apple moon sun milk bird train girl dog river tree sea book rice door coat rain".split()
DIRECTIONS = {"left": ("左", (-1, 0)), "right": ("右", (1, 0)), "up": ("上", (0, -1)), "down": ("下", (0, 1))}
FRAMES_PER_SECOND = 2
MAX_TRIES = 10_000
PAPERS = ((255, 255, 255), (238, 238, 232), (222, 230, 240))
Draw = Callable[[random.Random, bool], "Row"]


class Row(NamedTuple):
    """One picture, or the frames of one clip, with a question and its answer.

    fact: two rows with the same one show the same thing, so they are never on both sides of the split.
    """

    fact: tuple[Any, ...]
    frames: list[Image.Image]
    question: tuple[str, str]  # Chinese, English
    answer: tuple[str, str]
    caption: tuple[str, str]
    is_clip: bool = False


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of words and charts, `size` pixels high."""
    return ImageFont.truetype(str(FONT), size)


@functools.cache
def scans() -> tuple[list[Image.Image], list[int]]:
    """Scikit-learn's handwritten digits, dark on white, and which digit each is."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures = [Image.fromarray((255 - 15 * scan).astype("uint8"), "L") for scan in digits.images]
    return pictures, [int(digit) for digit in digits.target]


def draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: tuple[int, int, int]
) -> None:
    """Fill a circle, square or triangle that touches all four sides of `box` (left, top, right, bottom, in pixels)."""
    left, top, right, bottom = box
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    else:
        draw.polygon([((left + right) // 2, top), (left, bottom), (right, bottom)], fill=colour)


def digit(rng: random.Random, held_out: bool) -> Row:
    pictures, targets = scans()
    first_held_out = len(pictures) * 4 // 5  # as in the collection, the last scans are other people's
    number = rng.randrange(first_held_out, len(pictures)) if held_out else rng.randrange(first_held_out)
    side = rng.choice((24, 26, 28))
    picture = Image.new("RGB", (28, 28), "white")
    place = (rng.randint(0, 28 - side), rng.randint(0, 28 - side))
    scan, angle = pictures[number].resize((side, side), Image.Resampling.BICUBIC), rng.randint(-12, 12)
    picture.paste(scan.rotate(angle, Image.Resampling.BICUBIC, fillcolor=255), place)
    answer = str(targets[number])
    return Row(
        ("digit", number, side, place, angle),
        [picture],
        ("哪个数字？", "Which digit?"),
        (answer, answer),
        (f"数字{answer}", f"digit {answer}"),
    )


def count(rng: random.Random, held_out: bool) -> Row:
    number, shape, colour = rng.randint(1, 5), rng.choice(list(SHAPES)), rng.choice(list(COLOURS))
    cells = sorted(rng.sample(range(9), number))
    picture = Image.new("RGB", (84, 84), rng.choice(PAPERS))
    for cell in cells:
        left, top = 28 * (cell % 3) + rng.randint(2, 6), 28 * (cell // 3) + rng.randint(2, 6)
        draw_shape(ImageDraw.Draw(picture), shape, (left, top, left + 19, top + 19), COLOURS[colour][1])
    answer = str(number)
    return Row(
        ("count", shape, colour, *cells),
        [picture],
        (f"有几个{SHAPES[shape]}？", f"How many {shape}s?"),
        (answer, answer),
        (f"{answer}个{COLOURS[colour][0]}色的{SHAPES[shape]}", f"{answer} {colour} {shape}s"),
    )


def colour(rng: random.Random, held_out: bool) -> Row:
    name, shape, side = rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), rng.randint(14, 26)
    picture = Image.new("RGB", (28, 28), rng.choice(PAPERS))
    left, top = rng.randint(0, 27 - side), rng.randint(0, 27 - side)
    draw_shape(ImageDraw.Draw(picture), shape, (left, top, left + side, top + side), COLOURS[name][1])
    chinese = f"{COLOURS[name][0]}色"
    return Row(
        ("colour", name, shape, left, top, side),
        [picture],
        (f"{SHAPES[shape]}是什么颜色？", f"What colour is the {shape}?"),
        (chinese, name),
        (f"{chinese}的{SHAPES[shape]}", f"{name} {shape}"),
    )


def chart(rng: random.Random, held_out: bool) -> Row:
    names = rng.sample(list(COLOURS), 3)
    heights = rng.sample((1, 2, 3, 4, 5), 3)
    picture = Image.new("RGB", (84, 84), "white")
    draw = ImageDraw.Draw(picture)
    draw.line([(4, 78), (80, 78)], fill="black")
    draw.line([(4, 4), (4, 78)], fill="black")
    for index, (name, height) in enumerate(zip(names, heights)):
        left = 12 + 24 * index
        draw.rectangle((left, 78 - 14 * height, left + 16, 77), fill=COLOURS[name][1])
    tallest = names[heights.index(max(heights))]
    chinese = f"{COLOURS[tallest][0]}色"
    return Row(
        ("chart", *names, *heights),
        [picture],
        ("哪种颜色最高？", "Which bar is the tallest?"),
        (chinese, tallest),
        (f"{chinese}最高的柱状图", f"{tallest} is the tallest bar"),
    )


def word(rng: random.Random, held_out: bool) -> Row:
    text, size = rng.choice(WORDS_CHINESE + WORDS_ENGLISH), rng.randint(24, 26)
    picture = Image.new("RGB", (84, 28), rng.choice(PAPERS))
    draw = ImageDraw.Draw(picture)
    left, top, _, bottom = draw.textbbox((0, 0), text, font=font(size))
    place = (rng.randint(1, 4) - left, (28 - bottom - top) // 2 + rng.randint(-1, 1))
    ink = rng.choice(list(COLOURS))
    draw.text(place, text, font=font(size), fill=COLOURS[ink][1])
    return Row(
        ("word", text, size, place, ink),
        [picture],
        ("读出图中的词。", "Read this word."),
        (text, text),
        (text, text),
    )


def box(rng: random.Random, held_out: bool) -> Row:
    """The answer is ERNIE's: x and y of two corners in thousandths of the picture's width and height."""
    name, shape, paper = rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), rng.choice(PAPERS)
    side = rng.choice((28, 56, 84))
    left, top = 28 * rng.randint(0, 4 - side // 28), 28 * rng.randint(0, 4 - side // 28)
    corners = (left, top, left + side, top + side)
    picture = Image.new("RGB", (112, 112), paper)
    draw_shape(ImageDraw.Draw(picture), shape, (*corners[:2], corners[2] - 1, corners[3] - 1), COLOURS[name][1])
    answer = json.dumps({"bbox_2d": [round(1000 * corner / 112) for corner in corners]})
    chinese = f"{COLOURS[name][0]}色的{SHAPES[shape]}"
    return Row(
        ("box", name, shape, paper, corners),
        [picture],
        (f"{chinese}在哪里？", f"Where is the {name} {shape}?"),
        (answer, answer),
        (f"{chinese}在{answer}", f"The {name} {shape} is at {answer}"),
    )


def clip(rng: random.Random, held_out: bool) -> Row:
    """A shape rests, and moves by half the picture at a whole second: what happens, and when?"""
    name, shape, direction = rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), rng.choice(list(DIRECTIONS))
    seconds, start, side = 4, rng.randint(1, 3), 18
    chinese_direction, (x, y) = DIRECTIONS[direction]
    begin = rng.randint(3, 7) + (28 if -1 in (x, y) else 0)
    across = rng.randint(3, 7) + 28 * rng.randrange(2)
    paper = rng.choice(PAPERS)
    frames = []
    for index in range(seconds * FRAMES_PER_SECOND):
        at = begin + (x + y) * 14 * min(max(0, index - start * FRAMES_PER_SECOND + 1), 2)
        left, top = (at, across) if x else (across, at)
        frame = Image.new("RGB", (56, 56), paper)
        draw_shape(ImageDraw.Draw(frame), shape, (left, top, left + side, top + side), COLOURS[name][1])
        frames.append(frame)
    chinese, english = f"{start}秒向{chinese_direction}移动", f"moves {direction} at {start} s"
    return Row(
        ("clip", name, shape, direction, start, begin, across, paper),
        frames,
        ("发生了什么，在几秒？", "What happens, and when?"),
        (chinese, english),
        (chinese, english),
        is_clip=True,
    )


MORE = {"digit": 5, "word": 2, "box": 2, "clip": 2}  # times as many rows to train on: the tasks that need most of them
TASKS: dict[str, Draw] = {draw.__name__: draw for draw in (digit, count, colour, chart, word, box, clip)}


def rows(task: str, number: int, seed: int, held_out: bool, shown: set[tuple[Any, ...]]) -> Iterator[Row]:
    """Yield `number` rows of a task whose facts are not in `shown`, to which facts that are held out are added. Rows to
    train on may repeat one another.
    """
    rng = random.Random(f"{seed} {task} {held_out}")
    for _ in range(number):
        for _ in range(MAX_TRIES):
            row = TASKS[task](rng, held_out)
            if row.fact not in shown:
                break
        else:
            raise SystemExit(f"{task}: no further picture in {MAX_TRIES} tries; ask for fewer rows than {number}")
        if held_out:
            shown.add(row.fact)
        yield row


def write_media(row: Row, path: Path) -> str:
    """Save the picture as PATH.png, or the frames of a clip as PATH/0000.png and so on. Returns the name written."""
    if not row.is_clip:
        row.frames[0].save(path.with_suffix(".png"))
        return path.with_suffix(".png").name
    path.mkdir(exist_ok=True)
    for index, frame in enumerate(row.frames):
        frame.save(path / f"{index:04d}.png")
    return path.name


def records(row: Row, name: str, language: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The question with its answer, and the caption, as lines of two files. language: 0 Chinese, 1 English."""
    kind = "video" if row.is_clip else "image"
    medium: dict[str, Any] = {kind: f"media/{name}"}
    if row.is_clip:  # a directory of frames, and how many of them there are in a second
        medium["fps"] = FRAMES_PER_SECOND
    answer = {"role": "assistant", "content": row.answer[language]}
    question = {"role": "user", "content": [{"type": kind, **medium}, {"type": "text", "text": row.question[language]}]}
    caption = {"text": f"<{kind}>{row.caption[language]}", f"{kind}s": [medium]}
    return {"messages": [question, answer]}, caption


def number_questions(source: Path) -> list[tuple[str, str]]:
    """The text task: the questions of an `erniekit` jsonl to write a number in digits, with their answers."""
    with source.open(encoding="utf-8") as lines:
        samples = [json.loads(line) for line in lines]
    pairs = [pair for sample in samples for pair in zip(sample["src"], sample["tgt"], strict=True)]
    return [pair for pair in pairs if pair[0].startswith("Write in digits") or pair[0].endswith("写成数字")]


def write_text(output: Path, sentences: list[str], seed: int) -> None:
    """Write what the first stage reads (the text task and sentences, as plain text) and the held-out questions."""
    texts = [f"User: {question}\nAssistant: {answer}" for question, answer in number_questions(TEXT / "train.jsonl")]
    texts += sentences
    random.Random(f"{seed} text").shuffle(texts)
    held_out = [{"src": question, "tgt": answer} for question, answer in number_questions(TEXT / "test.jsonl")]
    for name, rows in (("text-train", [{"text": text} for text in texts]), ("text-test", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (output / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")


def make(output: Path, sizes: dict[str, int], seed: int) -> None:
    """Write every file. sizes: rows of each task by split, `train` and `test`."""
    (output / "media").mkdir(parents=True, exist_ok=True)
    captions: dict[str, list[str]] = {split: [] for split in sizes}
    sentences: list[str] = []
    for task in TASKS:
        shown: set[tuple[Any, ...]] = set()
        for split in sorted(sizes):  # the test first: what it shows is not trained on
            lines = []
            number = sizes[split] * (MORE.get(task, 1) if split == "train" else 1)
            for index, row in enumerate(rows(task, number, seed, split == "test", shown)):
                name = write_media(row, output / "media" / f"{task}-{split}-{index:05d}")
                question, caption = records(row, name, index % 2)
                lines.append(json.dumps(question, ensure_ascii=False))
                captions[split].append(json.dumps(caption, ensure_ascii=False))
                sentences += [row.caption[index % 2]] if split == "train" else []
            (output / f"{task}-{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    for split, lines in captions.items():
        random.Random(f"{seed} captions {split}").shuffle(lines)
        (output / f"captions-{split}.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    write_text(output, sentences, seed)


def main() -> None:
    """Parse the arguments and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--train", type=int, default=1400, help="rows of each task to train on")
    parser.add_argument("--test", type=int, default=100, help="rows of each task that are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.output_dir, {"test": args.test, "train": args.train}, args.seed)


if __name__ == "__main__":
    main()
