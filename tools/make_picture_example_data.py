"""Make the example data with pictures: examples/data/*vl*.jsonl and the pictures that they name.

    python tools/make_picture_example_data.py     # as committed

Each file shows one format (docs/vision-data.md); together they have questions about one and two pictures, a video as
frames, boxes, a thought before an answer, zooms into a picture whose crops come back as pictures, a search, a tool with
a result of text alone, and text without a picture. The pictures are drawn here, with the font that the package ships.
"""

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from erniekit.data.vision.frames import FONT

RED, BLUE, GREEN, GREY = (205, 60, 50), (60, 100, 190), (70, 150, 80), (120, 120, 120)
WHITE, BLACK, SKY, ROAD, WALL = (255, 255, 255), (0, 0, 0), (190, 215, 240), (150, 150, 150), (215, 190, 150)
SIGN = (400, 150, 540, 206)  # in pixels of the street, which is 560 x 392
HOUSE_NUMBER = (500, 156, 536, 200)

Picture = Image.Image
Row = dict[str, Any]


def blank(width: int, height: int, colour: tuple[int, int, int] = WHITE) -> tuple[Picture, ImageDraw.ImageDraw]:
    """A picture of one colour, and what draws on it."""
    picture = Image.new("RGB", (width, height), colour)
    return picture, ImageDraw.Draw(picture)


def font(size: int) -> ImageFont.FreeTypeFont:
    """The font that also draws the time on frames."""
    return ImageFont.truetype(str(FONT), size)


def cups(count: int) -> Picture:
    """Cups in a row."""
    picture, draw = blank(280, 140)
    for i in range(count):
        left = 20 + 84 * i
        draw.rectangle((left, 40, left + 46, 110), BLUE)
        draw.arc((left + 34, 55, left + 66, 95), 270, 90, BLUE, 7)
    return picture


def shapes() -> Picture:
    """A red circle, a blue square and a green triangle."""
    picture, draw = blank(280, 196)
    draw.ellipse((20, 20, 90, 90), RED)
    draw.rectangle((140, 98, 210, 168), BLUE)
    draw.polygon(((60, 180), (20, 120), (100, 120)), GREEN)
    return picture


def chart() -> Picture:
    """Bars with a letter below and a number above."""
    picture, draw = blank(336, 224)
    for i, (name, value) in enumerate((("A", 3), ("B", 7), ("C", 5))):
        left, top = 40 + 100 * i, 180 - 20 * value
        draw.rectangle((left, top, left + 50, 180), (RED, BLUE, GREEN)[i])
        draw.text((left + 17, 186), name, BLACK, font(26))
        draw.text((left + 17, top - 30), str(value), BLACK, font(26))
    return picture


def street() -> Picture:
    """Two houses; the sign on the right one can be read when it is enlarged."""
    picture, draw = blank(560, 392, SKY)
    draw.rectangle((0, 320, 560, 392), ROAD)
    draw.rectangle((30, 110, 250, 320), WALL)
    draw.rectangle((330, 70, 550, 320), (200, 160, 140))
    for left, top in ((60, 150), (160, 150), (60, 230), (360, 100), (470, 100)):
        draw.rectangle((left, top, left + 45, top + 40), SKY)
    draw.rectangle(SIGN, WHITE, BLACK, 2)
    draw.text((410, 164), "BAKERY", BLACK, font(22))
    draw.text((506, 164), "27", RED, font(22))
    draw.rectangle((430, 240, 480, 320), (110, 70, 40))
    return picture


def crop(picture: Picture, box: tuple[int, int, int, int], width: int) -> Picture:
    """A part of a picture, enlarged: what a zoom gives back."""
    part = picture.crop(box)
    return part.resize((width, round(width * part.height / part.width)), Image.Resampling.BICUBIC)


def relative(box: tuple[int, int, int, int], picture: Picture) -> list[int]:
    """A box in the model's numbers, 0 to 1000 of the full picture."""
    return [round(1000 * value / picture.size[i % 2]) for i, value in enumerate(box)]


def frame(number: int) -> Picture:
    """A ball that falls onto the ground."""
    picture, draw = blank(168, 140, SKY)
    draw.rectangle((0, 120, 168, 140), GREEN)
    top = (10, 35, 90, 90)[number]
    draw.ellipse((70, top, 100, top + 30), RED)
    return picture


def pictures() -> dict[str, Picture]:
    """All pictures by file name."""
    scene = street()
    drawn = {"cups.png": cups(3), "two_cups.png": cups(2), "shapes.png": shapes(), "chart.png": chart()}
    drawn |= {"street.png": scene, "street_sign.png": crop(scene, SIGN, 280)}
    drawn |= {"street_number.png": crop(scene, HOUSE_NUMBER, 112)}
    return drawn | {f"ball/{number}.png": frame(number) for number in range(4)}


def asked(*texts: str) -> list[Row]:
    """Questions and answers in turn, as ERNIEKit's text_info."""
    return [{"text": text, "tag": ("mask", "no_mask")[i % 2]} for i, text in enumerate(texts)]


def shown(*names: str, before: int = 0) -> list[Row]:
    """Pictures before a text, as ERNIEKit's image_info."""
    return [{"image_url": f"pictures/{name}", "matched_text_index": before} for name in names]


def erniekit_pictures() -> list[Row]:
    """One picture, two, a box, two rounds, no picture."""
    where = json.dumps([{"bbox_2d": relative((140, 98, 210, 168), shapes()), "label": "square"}])
    return [
        {"image_info": shown("cups.png"), "text_info": asked("How many cups?", "Three.")},
        {
            "image_info": shown("cups.png", "two_cups.png"),
            "text_info": asked("Which picture has more cups?", "Picture 1."),
        },
        {"image_info": shown("chart.png"), "text_info": asked("哪一根柱子最高？", "B，高度是7。")},
        {"image_info": shown("shapes.png"), "text_info": asked("Where is the square? Answer with a box.", where)},
        {
            "image_info": [*shown("shapes.png"), *shown("chart.png", before=2)],
            "text_info": asked("What colour is the circle?", "Red.", "And the bar of A in this chart?", "Red, too."),
        },
        {"text_info": asked("What is 6 times 7?", "42")},
    ]


def thoughts() -> list[Row]:
    """Answers that think first, for the Thinking model."""
    difference = "<think>\nB is the highest bar, with 7; A has 3. The difference is 4.\n</think>\n\n4"
    colours = "<think>\n圆是红色，方块是蓝色，三角形是绿色。一共三种。\n</think>\n\n三种。"
    return [
        {"image_info": shown("chart.png"), "text_info": asked("How much higher is B than A?", difference)},
        {"image_info": shown("shapes.png"), "text_info": asked("图里有几种颜色？", colours)},
    ]


def erniekit_videos() -> list[Row]:
    """A video as a directory, and as frames with their times."""
    frames = [{"image_url": f"pictures/ball/{n}.png", "matched_text_index": 0, "time_stamp": 0.5 * n} for n in range(4)]
    return [
        {
            "video_info": [{"image_url": "pictures/ball", "matched_text_index": 0}],
            "text_info": asked("What happens?", "A red ball falls to the ground."),
        },
        {"video_info": frames, "text_info": asked("When is the ball on the ground?", "At 00:00:01.00.")},
    ]


def erniekit_order() -> list[Row]:
    """A system text, and pictures and a video before one text."""
    return [
        {
            "is_system": 1,
            "text_info": asked("Answer in one word.", "", "What colour is the circle?", "Red."),
            "image_info": shown("shapes.png", before=2),
        },
        {
            "image_info": shown("shapes.png"),
            "video_info": [{"image_url": "pictures/ball", "matched_text_index": 0}],
            "order": {"type": ["image", "video", "text", "text"], "index": [0, 0, 0, 1]},
            "text_info": asked("What is red in both?", "The circle in the picture and the ball in the video."),
        },
    ]


def function(name: str, description: str, properties: Row, required: list[str]) -> Row:
    """A tool in OpenAI's form."""
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


BOX = {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4}
ZOOM = function(
    "image_zoom_in_tool",
    "Enlarge a part of a picture.",
    {"bbox_2d": BOX | {"description": "[x1, y1, x2, y2], 0 to 1000 of the picture"}, "label": {"type": "string"}},
    ["bbox_2d"],
)
SEARCH = function(
    "image_search",
    "Find pictures like this one.",
    {"img_idx": {"type": "number", "description": "from 0"}},
    ["img_idx"],
)
SUM = function("add", "a + b", {"a": {"type": "number"}, "b": {"type": "number"}}, ["a", "b"])


def called(thought: str, name: str, **arguments: Any) -> Row:
    """An answer that thinks and calls a tool."""
    call = {"name": name, "arguments": json.dumps(arguments)}
    return {"text": f"<think>\n{thought}\n</think>", "tag": "no_mask", "tool_calls": [call]}


def result(text: str) -> Row:
    """What a tool gives back."""
    return {"text": text, "tag": "mask", "tool_response": True}


def tool_rows() -> list[Row]:
    """Two zooms whose crops come back as pictures, a search, and a tool with text alone."""
    scene = street()
    sign = relative(SIGN, scene)
    zooms = [
        {"text": "Which number does the bakery have?", "tag": "mask"},
        called("The sign is small. I enlarge it.", "image_zoom_in_tool", bbox_2d=sign, label="sign"),
        result("The part is Picture 2."),
        called(
            "BAKERY, and a number at its right end. I look closer.",
            "image_zoom_in_tool",
            bbox_2d=relative(HOUSE_NUMBER, scene),
            label="number",
        ),
        result("The part is Picture 3."),
        {"text": "<think>\nThe number is 27.\n</think>\n\n27", "tag": "no_mask"},
    ]
    search = [
        {"text": "Is there a picture with fewer cups?", "tag": "mask"},
        called("Three cups. I look for pictures like it.", "image_search", img_idx=0),
        result("1 picture: two_cups.png"),
        {"text": "<think>\nThat one has two cups.\n</think>\n\nYes, one with two cups.", "tag": "no_mask"},
    ]
    text = [
        {"text": "What do all bars add up to?", "tag": "mask"},
        called("3 and 7 first, then 5.", "add", a=10, b=5),
        result("15"),
        {"text": "<think>\n10 + 5 is 15.\n</think>\n\n15", "tag": "no_mask"},
    ]
    crops = [*shown("street_sign.png", before=2), *shown("street_number.png", before=4)]
    return [
        {"image_info": [*shown("street.png"), *crops], "text_info": zooms, "tools": [ZOOM]},
        {
            "image_info": [*shown("cups.png"), *shown("two_cups.png", before=2)],
            "text_info": search,
            "tools": [ZOOM, SEARCH],
        },
        {"image_info": shown("chart.png"), "text_info": text, "tools": [SUM]},
    ]


def said(question: Any, answer: str) -> list[Row]:
    """A round in the form of messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def messages() -> list[Row]:
    """Tags, OpenAI's content list, a picture in the row itself, frames, boxes in pixels, and agent roles."""
    small, buffer = cups(2).resize((84, 42)).quantize(8), io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    uri = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    listed = [
        {"type": "image_url", "image_url": {"url": "pictures/shapes.png"}},
        {"type": "text", "text": "What colour is the triangle?"},
    ]
    inline = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "How many cups?"}]
    call = {"name": "image_zoom_in_tool", "arguments": {"bbox_2d": relative(SIGN, street())}}
    agent = [
        {"role": "user", "content": "<image>What is sold in the right house?"},
        {"role": "tool_call", "content": json.dumps(call)},
        {"role": "tool_response", "content": "<image>"},
        {"role": "assistant", "content": "Bread: the sign says BAKERY."},
    ]
    return [
        {"messages": said("<image>How many cups?", "Three."), "images": ["pictures/cups.png"]},
        {"messages": said(listed, "Green.")},
        {"messages": said(inline, "Two.")},
        {"messages": said("<video>What happens?", "A red ball falls to the ground."), "videos": ["pictures/ball"]},
        {
            "messages": said("<image>Find <ref-object>.", "<bbox>"),
            "images": ["pictures/shapes.png"],
            "objects": {"ref": ["the square"], "bbox": [[140, 98, 210, 168]], "bbox_type": "real"},
        },
        {"messages": agent, "images": ["pictures/street.png", "pictures/street_sign.png"], "tools": [ZOOM]},
    ]


def sharegpt() -> list[Row]:
    """LLaMA-Factory's form."""
    turns = [{"from": "human", "value": "<image>How many cups?"}, {"from": "gpt", "value": "Three."}]
    return [{"conversations": turns, "images": ["pictures/cups.png"]}]


def alpaca() -> list[Row]:
    """Instructions with pictures."""
    return [{"instruction": "<image>Which bar is the lowest?", "output": "A.", "images": ["pictures/chart.png"]}]


def documents() -> list[Row]:
    """Text for pretraining, with pictures in it."""
    return [
        {"text": "<image>Three blue cups stand in a row.", "images": ["pictures/cups.png"]},
        {
            "text": "<image>这张图有一个红色的圆、一个蓝色的方块和一个绿色的三角形。<image>这张图里有三根柱子。",
            "images": ["pictures/shapes.png", "pictures/chart.png"],
        },
        {"text": "<video>A red ball falls to the ground.", "videos": ["pictures/ball"]},
        {"text": "A bakery sells bread. Some also sell coffee."},
    ]


def pairs() -> list[Row]:
    """A chosen and a rejected answer about a picture."""
    question = [{"role": "user", "content": "<image>How many cups?"}]
    colour = [{"role": "user", "content": "<image>What colour is the circle?"}]
    return [
        {"messages": question, "images": ["pictures/cups.png"], "chosen": "Three.", "rejected": "Five."},
        {"messages": colour, "images": ["pictures/shapes.png"], "chosen": "Red.", "rejected": "I see no circle."},
    ]


def prompts() -> list[Row]:
    """Prompts for reinforcement learning, with what rewards compare answers with."""

    def asks(question: str) -> list[Row]:
        return [{"role": "user", "content": f"<image>{question}"}]

    sign = relative(SIGN, street())
    return [
        {
            "prompt": asks("How many cups? Give the number in \\boxed{}."),
            "images": ["pictures/cups.png"],
            "answer": "3",
            "domain": "counting",
            "reward_funcs": ["accuracy"],
        },
        {
            "prompt": asks("杯子有几个？把数字写在 \\boxed{} 里。"),
            "images": ["pictures/two_cups.png"],
            "answer": "2",
            "domain": "counting",
            "reward_funcs": ["accuracy"],
        },
        {
            "prompt": asks("Where is the sign? Give its box as [x1, y1, x2, y2], from 0 to 1000."),
            "images": ["pictures/street.png"],
            "answer": sign,
            "domain": "grounding",
            "reward_funcs": ["box_iou"],
        },
    ]


def held_out() -> list[Row]:
    """Questions for the evaluation."""
    return [
        {"image_info": shown("two_cups.png"), "text_info": asked("How many cups?", "Two.")},
        {"image_info": shown("shapes.png"), "text_info": asked("What colour is the square?", "Blue.")},
        {"image_info": shown("chart.png"), "text_info": asked("哪一根柱子最低？", "A，高度是3。")},
    ]


FILES = {
    "sft_vl-train_demo1.jsonl": erniekit_pictures,
    "sft_vl-train_demo2.jsonl": erniekit_videos,
    "sft_vl-train_demo3.jsonl": erniekit_order,
    "sft_vl_think-train.jsonl": thoughts,
    "sft_vl-eval.jsonl": held_out,
    "sft_function_call_vl-train_demo1.jsonl": tool_rows,
    "sft_vl-messages.jsonl": messages,
    "sft_vl-sharegpt.jsonl": sharegpt,
    "sft_vl-alpaca.jsonl": alpaca,
    "pt_vl-train.jsonl": documents,
    "dpo_vl-train.jsonl": pairs,
    "rl_vl-train.jsonl": prompts,
}


def main() -> None:
    """Read the arguments, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="examples/data", help="the directory of the files")
    directory = Path(parser.parse_args().out)
    for name, picture in pictures().items():
        path = directory / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, optimize=True)
    for name, make in FILES.items():
        lines = [json.dumps(row, ensure_ascii=False) for row in make()]
        (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
