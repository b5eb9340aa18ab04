"""The built-in reward functions, called directly: right, wrong, empty, huge and hostile answers."""

import importlib.util
import json
import math
from fractions import Fraction
from typing import Any

import pytest

from erniekit.config.schema_rewards import REWARD_FUNCS, RewardArgs
from erniekit.rewards import Sample, texts
from erniekit.rewards.numbers import Number, last_number, number_of
from erniekit.rewards.right_answer import final_answer
from erniekit.rewards.scorer import GIVEN
from erniekit.rewards.table import BUILTINS

CFG = RewardArgs()


def score(name: str, completion: str, answer: Any = None, cfg: RewardArgs = CFG, **more: Any) -> float | None:
    fields = {"answer": answer} | more.pop("fields", {})
    ids = more.pop("ids", tuple(range(len(completion.split()))))
    prompt = [{"role": "user", "content": more.pop("prompt", "What is it?")}]
    return BUILTINS[name].function(Sample(prompt, completion, ids, fields, "d:1", **more), cfg)


def test_every_documented_function_exists():
    assert set(REWARD_FUNCS) == set(BUILTINS) | set(GIVEN) | {"judge"}


RIGHT = [
    ("5", "5"),
    ("so it is 5.", "5"),
    ("The answer is 1,234.", "1234"),
    ("\\boxed{\\frac{3}{4}}", "0.75"),
    ("\\boxed{3/4} of them", "\\frac{3}{4}"),
    ("答案是 12", 12),
    ("#### 12", "12"),
    ("<think>7 or 8</think>\\boxed{8}", "8"),
    ("x = -3", "-3"),
    ("10-5 = 5", "5"),
    ("It costs $5", "5"),
    ("5 km", "5 km"),
    ("50%", "0.5"),
    ("50%", "50%"),
    ("0.333333", "1/3"),
    ("**Answer:** 42", "42"),
    ("\\boxed{1} no, \\boxed{2}", "2"),
    ("Paris", "paris."),
    ("The answer is Paris.", "Paris"),
    ("\\boxed{\\text{Paris}}", "\\text{Paris}"),
    ("4", ["four", "4"]),
    ("1e3", "1000"),
    ("The result is 2 and the answer is 5 because 2 + 3 = 5", "5"),
    ("\u22125", "-5"),
    ("The answer is \u22125.", "-5"),
    ("\\boxed{(\u22121, 2)}", "(-1, 2)"),
    ("10\u22125", "5"),
    ("\\boxed{\\frac12}", "1/2"),
    ("\\boxed{-\\dfrac34}", "-0.75"),
    ("\\boxed{\\frac{12}5}", "2.4"),
    ("\\boxed{12{,}345}", "12345"),
    *(
        (text, "1500")
        for text in ("1.5×10^3", "1.5 \\times 10^{3}", "The answer is $1.5\\cdot10^3$", "1 500", "1,500.0")
    ),
    ("1×10⁻³", "0.001"),
    ("2^{10}", "1024"),
    ("\\boxed{1500}", "1.5×10^3"),
    *((text, "1234567") for text in ("1 234 567", "1'234'567", "12,34,567", "1.234.567", "1\\,234\\,567")),
    *((text, "3.5") for text in ("3 1/2", "3\\frac{1}{2}", "3½", "三点五")),
    ("\\frac{-3}{4}", "-3/4"),
    ("\\frac{-3}{-4}", "3/4"),
    (".5", "0.5"),
    ("50%", "50"),
    ("50", "50%"),
    ("\\boxed{90^\\circ}", "90"),
    ("90", "90^{\\circ}"),
    ("\\boxed{\\$5}", "5"),
    ("5 million dollars", "5000000"),
    ("答案是5万元。", "50000"),
    ("答案是十二", "12"),
    ("12", "十二"),
    ("两万五千", "25000"),
    ("百分之五十", "0.5"),
    ("三分之一", "1/3"),
    ("二〇二五", "2025"),
    ("Final Answer: The final answer is $5$. I hope it is correct.", "5"),
    ("(1,2)", "(1, 2)"),
    ("\\boxed{( -∞ , 3 ]}", "(-\\infty, 3]"),
    ("2 \\pi", "2\\pi"),
    ("\\dfrac{x}{2}", "\\frac{x}{2}"),
    ("1010_{2}", "1010_2"),
    ("\\boxed{\\text{Monday}}", "Monday"),
    ("\\fbox{5}", "5"),
    ("It costs $230/month.", "230"),
    ("Step 2 **8**", "8"),
    ("So:\n* 8", "8"),
    *((f"\\boxed{{{text}}}", "5") for text in ("(5)", "{5}", "5 \\text{ m}^2", "5\\,\\mathrm{m\\,s^{-1}}", "5\\quad")),
    *((f"\\boxed{{{text}}}", "1/3") for text in ("\\cfrac{1}{3}", "\\frac{1}{3} \\approx 0.33", "x = 1/3 ≈ 0.333")),
    ("x \\approx 3.14", "3.14"),
    *(
        (f"The answer is {text}", "5")
        for text in ('"5".', "5 (2+3).", "5 to the nearest ten", "5 times as many", "5 a day")
    ),
    ("After 3 days, 5 apples are left.", "5"),
    *((f"The answer is {text}", "12") for text in ("12, since 2 + 3 = 5.", "12 km because 2 + 3 = 5")),
    ("所以一共是-5个。", "-5"),
    *((text, "25") for text in ("The area is 25 cm².", "It is 25\\text{ m/s}^2.", "It is 25 s^{-1}")),
    *((text, "\\frac{\\sqrt{3}}{2}") for text in ("\\frac{\\sqrt3}{2}", "\\dfrac{\\sqrt 3}2")),
    ("\\pi/2", "\\frac{\\pi}{2}"),
    *((text, "x \\leq 5") for text in ("x \\le 5", "x≤5", "x <= 5")),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\boxed{\\text{(C)}}", "C"),
    ("\\boxed{5!}", "5!"),
    ("\\boxed{3 \\text{ hours } 20 \\text{ minutes}}", "3 hours 20 minutes"),
]
# The first number of a value that is another one.
PARTS_OF_VALUES = (
    "3 hours 20 minutes|3 \\text{ hours and } 20 \\text{ minutes}|3小时20分钟|3元5角|3米20厘米|3 ft 5 in|"
    "3^\\circ 15'|3年1月5日|3 dozen|3 squared|3的平方|3的倍数|3余2|3 \\text{ remainder } 2|3分之5|3‰|3a|3ab|3n + 1|"
    "3k|3-a|3/n|3\\alpha|3.\\overline{4}|3 \\pmod 7|3, 7|3 7|3 \\text{ or } -3|3 plus 4|3 times 4|"
    "3 divided by 4|3 less than 7|3 to the power of 2|a+3|大于3的数"
).split("|")
PARTS_OF_BOXES = ("3!", "3 \\le x", "3 = x", "3 n", "3 apples and 4 pears", "3 : 4", "2(3)", "x=2 y=3", "3 feet 10")
WRONG_PARTS = [
    *((text.join(around), "3") for text in PARTS_OF_VALUES for around in (("\\boxed{", "}"), ("The answer is ", "."))),
    *((f"\\boxed{{{text}}}", "3") for text in PARTS_OF_BOXES),
    *((text, "20") for text in ("3 hours 20 minutes", "It takes 3小时20分钟。")),
    ("The answer is three times 3.", "3"),
    ("The answer is none of 3", "3"),
    ("The answer is 12, since 2 + 3 = 5.", "5"),
    ("所以一共是-5个。", "5"),
    *((text, "5") for text in ("5x^2", "5 + x^2", "It is 5 xy^2", "It is 5m^2 + x")),
    ("\\boxed{5}", "5!"),
]
WRONG = [
    ("6", "5"),
    ("", "5"),
    ("   ", "5"),
    ("<think>5", "5"),
    ("0.5%", "50%"),
    ("0.33", "1/3"),
    *(
        (text, "3")
        for text in ("1.5×10^3", "10^3", "2^3", "2:3", "a_3", "5 \\times 3", "0.\\overline{3}", "(-\\infty, 3)")
    ),
    *(
        (text, "2")
        for text in ("2\\pi", "\\boxed{2\\pi}", "The answer is 2\\sqrt{3}", "\\sqrt{2}", "(1, 2)", "3+2", "2x")
    ),
    ("10³", "103"),
    ("2*3", "23"),
    ("1 000", "0"),
    ("3 1/2", "1/2"),
    ("3\\frac{1}{2}", "1/2"),
    ("x^2 + 9", "9"),
    (".5", "5"),
    ("0,5", "5"),
    ("5 million", "5"),
    ("5万", "5"),
    ("\\boxed{x=2 \\text{ or } x=3}", "3"),
    ("3y", "3x"),
    ("一样", "一致"),
    ("1" + " " * 50_000, "5"),
    ("123456788", "123456789"),
    ("-5", "5"),
    ("\u22125", "5"),
    ("\\boxed{\\frac12}", "12"),
    ("\\boxed{}", "5"),
    ("1/0", "5"),
    ("nan", "5"),
    ("inf", "5"),
    ("\\boxed{5", "6"),
    ("9" * 100_000, "5"),
    ("Paris or London", "Paris"),
    ("London", "Paris"),
    ("", "Paris"),
]


# What math-verify does not read: signs, numbers and measures in words, and an announced answer that is a sentence.
RIGHT_IN_WORDS = [
    *((text, "-5") for text in ("负5", "It is minus 5.", "零下5度", "\u20135", "negative 5")),
    *((text, "5000") for text in ("5千", "5千克 is 5 but 5千", "五千个")),
    *((text, "3000000") for text in ("3百万", "3百万元")),
    ("5千克", "5"),
    ("2千亿", "200000000000"),
    ("答案是十二个苹果", "12"),
    ("三十岁", "30"),
    ("壹佰贰拾叁", "123"),
    *((f"The answer is {text}.", "42") for text in ("therefore 42", "about 42", "that she has 42 apples", "<b>42</b>")),
    ("答案：小明有42个苹果", "42"),
    *((text, "120") for text in ("一百二", "答案是一百二十")),
    ("两万三", "23000"),
    ("一百零二", "102"),
    *((f"答案是{text}", "5") for text in ("5平方米", "5加仑", "小明有5元")),
    ("10 minus 5 is 5", "5"),
    ("1\u20442", "0.5"),
]
WRONG_IN_WORDS = [
    ("", "..."),
    *(
        (text, "5")
        for text in ("负5", "minus 5", "零下5度", "\u20135", "5千", "5百万", "1万5千", "≥5", "x > 5", "10 minus 5")
    ),
    *(
        (f"The answer is {text}", "5")
        for text in ("not 5", "5 or 7", "5 to 7", "less than 5", "x-5", "the sum of 2 and 5")
    ),
    *((text, "3") for text in ("三角形", "三位数")),
    ("一百二", "102"),
    ("三千五", "3005"),
]


@pytest.mark.parametrize(("completion", "answer"), RIGHT + RIGHT_IN_WORDS)
def test_right_answers(completion: str, answer: Any):
    assert score("accuracy", completion, answer) == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG + WRONG_IN_WORDS + WRONG_PARTS)
def test_wrong_answers(completion: str, answer: Any):
    assert score("accuracy", completion, answer) == 0.0


@pytest.mark.parametrize("answer", [None, {}, [], "", [None]])
@pytest.mark.parametrize("name", ["accuracy", "exact", "choice"])
def test_a_record_without_a_usable_answer_is_an_error(name: str, answer: Any):
    with pytest.raises(ValueError, match="'answer' of the record"):
        score(name, "5", answer)


def test_numbers_have_their_exact_value():
    assert number_of("-1,234.50") == Number(Fraction(-2469, 2))
    assert number_of("\\dfrac{1}{3}") == Number(Fraction(1, 3))
    assert number_of("12 \\text{ km}") == Number(Fraction(12))
    assert number_of("12 %") == Number(Fraction(12, 100), percent=True)
    for text in ("", "abc", "1 2", "5 or 6", "1/0", "1" * 500):
        assert number_of(text) is None, text
    assert last_number("from 3 to 10-7") == Number(Fraction(7))
    assert last_number("it is -7") == Number(Fraction(-7))
    assert final_answer("no mark") == "no mark"


MATH = [
    ("-5", "答案是负5", 1.0),
    ("5", "答案是负5", 0.0),
    ("\\frac{x}{2}", "\\boxed{\\frac{1}{2}x}", 1.0),
    ("$\\sqrt{8}$", "It is $2\\sqrt{2}$.", 1.0),
    ("(1, 2)", "\\boxed{(1,2)}", 1.0),
    ("0.5", "\\boxed{\\frac12}", 1.0),
    ("x+1", "\\boxed{x+2}", 0.0),
    ("5", "", 0.0),
    ("5", "\\boxed{}", 0.0),
    ("5", "9" * 50_000, 0.0),
    ("\\frac{3}{4}", "答案是\\dfrac{3}{4}。", 1.0),
    ("5", "答案：5", 1.0),
    ("12", "１２", 1.0),
    ("6", "所以小明有6个苹果", 1.0),
    ("25", "面积为25平方厘米。", 1.0),
    ("-3", "结果是-3。", 1.0),
    ("x^2", "x²", 1.0),
    ("1500", "1.5×10³", 1.0),
    ("\\sqrt{2}", "The answer is \\sqrt{2}.", 1.0),
    ("2", "The answer is 2\\sqrt{3}", 0.0),
    ("3.5", "\\boxed{3½}", 1.0),
    ("5 \\text{ km}", "It is 5 km.", 1.0),
    ("5", "The answer is not 5.", 0.0),
    ("20", "3 hours 20 minutes", 0.0),
    ("10", "\\boxed{\\text{half of } 10}", 0.0),
]


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="the extra `rl` is not installed")
@pytest.mark.parametrize(("answer", "completion", "expected"), MATH)
def test_formulas(answer: str, completion: str, expected: float):
    assert score("math", completion, answer) == expected


@pytest.mark.skipif(not importlib.util.find_spec("math_verify"), reason="the extra `rl` is not installed")
def test_our_numbers_agree_with_math_verify():
    """On answers that are numbers and not in words, but for these: it knows few groups of digits, mixed numbers in
    LaTeX alone and no Chinese ones, and finds a number in a formula that is not in LaTeX.
    """

    def differ(cases: list[tuple[str, Any]], expected: float) -> set[str]:
        read = [case for case in cases if isinstance(case[1], str) and number_of(case[1]) is not None]
        return {completion for completion, answer in read if score("math", completion, answer) != expected}

    assert differ(RIGHT, 1.0) == {"1e3", "12,34,567", "1.234.567", "3 1/2", "12"}  # 12 for 十二
    assert differ(WRONG, 0.0) == {"(1, 2)", "2x", "1 000", "x^2 + 9"}


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("exact", "  The Cat. ", "the cat", 1.0),
        ("exact", "a Cat", "the cat", 0.0),
        ("exact", "-5", "5", 0.0),
        ("exact", "", "x", 0.0),
        ("exact", "ｆｕｌｌ", "full", 1.0),
        ("exact", "<think>no</think>\n\nyes", ["yes", "y"], 1.0),
        ("choice", "B", "B", 1.0),
        ("choice", "答案：\uff22", "B", 1.0),
        ("choice", "\uff22", "\uff22", 1.0),
        ("choice", "The answer is (B).", "B", 1.0),
        ("choice", "A, B, C and D", "B", 0.0),
        ("choice", "\\boxed{A, C}", "AC", 1.0),
        ("choice", "The answer is A and C.", ["C", "A"], 1.0),
        ("choice", "ABCD", "AC", 0.0),
        ("choice", "", "B", 0.0),
        ("choice", "A or B", "B", 0.0),
        ("choice", "答案是A或B", "A", 0.0),
        ("choice", "所以故选：ABD。", "ABD", 1.0),
        ("choice", "(A), (B)", "AB", 1.0),
        ("choice", "\\boxed{\\text{A and B}}", "AB", 1.0),
        ("choice", "The correct answers are A and B.", "AB", 1.0),
        ("choice", "The answers are A, C, and D.", "ACD", 1.0),
        ("choice", "B is wrong.", "B", 0.0),
    ],
)
def test_texts_and_choices(name: str, completion: str, answer: Any, expected: float):
    assert score(name, completion, answer) == expected


@pytest.mark.parametrize(
    ("completion", "opened", "expected"),
    [
        ("<think>a</think>b", False, 1.0),
        ("<think>\na\n</think>\n\n<response>b</response>", False, 1.0),
        ("a</think>b", True, 1.0),
        ("a</think>b", False, 0.0),
        ("<think>a</think>b", True, 0.0),
        ("<think>a</think>", False, 0.0),
        ("<think>a</think><think>b</think>c", False, 0.0),
        ("<think>a</think>b</think>", False, 0.0),
        ("b", False, 0.0),
        ("", False, 0.0),
        ("", True, 0.0),
        ("<think>" * 100_000, False, 0.0),
    ],
)
def test_the_format_of_thinking(completion: str, opened: bool, expected: float):
    assert score("format", completion, opened_thought=opened) == expected


@pytest.mark.skipif(not importlib.util.find_spec("jsonschema"), reason="the extra `rl` is not installed")
def test_json_that_fits_a_schema():
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    cases = (
        ('{"a": 1}', 1.0),
        ('```JSON\n{"a": 1}\n```', 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ('{"a": "1"}', 0.0),
        ("", 0.0),
        ('{"a": NaN}', 0.0),
    )
    for text, expected in cases:
        for written in (schema, json.dumps(schema)):
            assert score("json_schema", text, fields={"json_schema": written}) == expected
    assert score("json_schema", "[" * 100_000, fields={"json_schema": schema}) == 0.0
    for wrong in (None, 5, {"type": "nothing"}, "{"):
        with pytest.raises(Exception, match=r"."):
            score("json_schema", "{}", fields={"json_schema": wrong})


def test_lengths():
    cfg = RewardArgs(reward_funcs=("exact", "cosine"), reward_min_length=2, reward_max_length=3, cosine_max_length=100)
    for count, expected in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 0.0)):
        assert score("length", "x", cfg=cfg, ids=tuple(range(count))) == expected
    # Equation 1 of arXiv 2502.03373: CosFn(t, T, low, high) = low + (high - low) (1 + cos(t pi / T)) / 2.
    for count, completion, expected in (
        (0, "x", 1.0),
        (50, "x", 0.75),
        (100, "x", 0.5),
        (1000, "x", 0.5),
        (0, "y", -1.0),
        (100, "y", -0.5),
    ):
        assert score("cosine", completion, "x", cfg, ids=tuple(range(count))) == pytest.approx(expected)
    assert texts.cosine(25, True, 100) == pytest.approx(0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2)


def test_repetition_is_the_share_of_repeated_sequences():
    assert score("repetition", "a b c d") == 0.0
    assert score("repetition", "a a a a a") == pytest.approx(-2 / 3)  # 3 sequences, 1 of them different
    assert score("repetition", "A b c a B C") == pytest.approx(-1 / 4)
    assert score("repetition", "好好好好好") == pytest.approx(-2 / 3)
    assert score("repetition", "") == 0.0
    assert score("repetition", "word " * 100_000) == pytest.approx(-1, abs=1e-4)


def test_language():
    zh, en = RewardArgs(reward_language="zh"), RewardArgs(reward_language="en")
    assert score("language", "我们走吧", cfg=zh) == 1.0
    assert score("language", "我们 go now", cfg=zh) == 0.5
    assert score("language", "我们 go now", cfg=en) == 0.5
    assert score("language", "我们 `code here` $x^2 + foo$ <think>", cfg=zh) == 1.0
    assert score("language", "42", cfg=en) == 1.0
    assert score("language", "", cfg=en) == 1.0
    assert score("language", "hello", prompt="你好吗") == 0.0
    assert score("language", "Привет, мир", cfg=en) == score("language", "안녕", cfg=zh) == 0.0
    assert score("language", "こんにちは世界", cfg=zh) == pytest.approx(2 / 7)
    assert score("language", "the angle α is small", cfg=en) == 1.0
    assert score("language", "你好", prompt="12 + 3 = ?") is None


@pytest.mark.parametrize("repeated", ["\\boxed{", "11,", " $", "\n\\left", "亿", "½½", "1 000 ", "answer is \n"])
def test_an_answer_that_repeats_itself_is_read_in_one_pass(repeated: str):
    """A policy that has gone astray writes such texts; by the square of their length they would take minutes."""
    assert score("accuracy", repeated * (40_000 // len(repeated)), "5") == 0.0


@pytest.mark.parametrize(
    ("name", "completion", "answer", "expected"),
    [
        ("box_iou", "[0, 0, 10, 10]", [0, 0, 10, 10], 1.0),
        ("box_iou", "[0, 0, 10, 5]", "[0, 0, 10, 10]", 0.5),
        ("box_iou", "[0, 0, 10, 10] [20, 20, 30, 30]", [0, 0, 10, 10], 0.5),
        ("box_iou", "[10, 10, 0, 0]", [0, 0, 10, 10], 0.0),
        ("box_iou", "", [0, 0, 10, 10], 0.0),
        ("box_iou", '{"bbox_2d": [0, 0, 1e999, NaN]}', [0, 0, 10, 10], 0.0),
        ("box_f1", "[0, 0, 10, 6]", [0, 0, 10, 10], 1.0),
        ("box_f1", "[0, 0, 10, 4]", [0, 0, 10, 10], 0.0),
        ("box_f1", "[0, 0, 10, 10] [20, 20, 30, 30]", [[0, 0, 10, 10], [50, 50, 60, 60]], 0.5),
        ("point_in_box", "(5, 5)", [0, 0, 10, 10], 1.0),
        ("point_in_box", "[11, 5]", [0, 0, 10, 10], 0.0),
        ("point_in_box", "[5, 5] [50, 50] [60, 60]", [0, 0, 10, 10], 0.5),
        ("point_in_box", "[0, 0, 10, 10]", [0, 0, 10, 10], 1.0),
        ("point_in_box", "", [0, 0, 10, 10], 0.0),
    ],
)
def test_boxes_and_points(name: str, completion: str, answer: Any, expected: float):
    assert score(name, completion, answer) == pytest.approx(expected)


def test_coordinates_in_pixels_are_not_clamped():
    pixels = RewardArgs(reward_coordinates="pixels")
    assert score("box_iou", "[0, 0, 2000, 2000]", [0, 0, 2000, 1000], pixels) == 0.5
    for wrong in ([0, 0, 2000, 1000], [10, 10, 0, 0], "none", None, 5):
        with pytest.raises(ValueError, match="'answer' of the record must be boxes"):
            score("box_iou", "[0, 0, 1, 1]", wrong)


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"name": name, "arguments": arguments}


def written(*calls: dict[str, Any]) -> str:
    return "".join(f"<tool_call>{json.dumps(one)}</tool_call>" for one in calls)


def test_calls_of_tools():
    due = [call("add", a=1, b=2)]
    assert score("tool_calls", written(*due), due) == 1.0
    assert score("tool_calls", "<think>x</think>" + written(call("add", b=2.0, a=1)), due) == 1.0
    assert score("tool_calls", written(call("sub", a=1, b=2)), due) == 0.0
    assert score("tool_calls", written(call("add", a=1, b="2")), due) == pytest.approx((1 + 1 + 1 / 2) / 3)
    assert score("tool_calls", written(call("add", a=1)), due) == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert score("tool_calls", written(*due, *due), due) == 0.5
    assert score("tool_calls", written(*due) + "<tool_call>{", due) == 0.5
    assert score("tool_calls", "", due) == 0.0
    assert score("tool_calls", "none is due", []) == 1.0
    assert score("tool_calls", written(*due), []) == 0.0
    two = [call("add", a=1), call("add", a=2)]
    assert score("tool_calls", written(*two[::-1]), two) == 1.0
    openai = [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]
    assert score("tool_calls", written(*due), openai) == 1.0
    turns = ({"role": "assistant", "content": "", "tool_calls": openai}, {"role": "tool", "content": "3"})
    parsed = [{"type": "function", "function": due[0]}]
    turns = (
        {"role": "assistant", "content": "", "tool_calls": parsed},
        {"role": "tool", "content": "3"},
        {"content": "3"},
    )
    assert score("tool_calls", "3", due, turns=turns) == 1.0
    for wrong in (None, 5, [{"name": 1}], [{"name": "a", "arguments": 5}]):
        with pytest.raises((ValueError, TypeError)):
            score("tool_calls", "", wrong)
