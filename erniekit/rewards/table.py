"""The table of the built-in reward functions that worker processes compute."""

from collections.abc import Callable
from dataclasses import dataclass

from erniekit.config.schema_rewards import RIGHT_OR_WRONG, RewardArgs
from erniekit.rewards import calls, code, formulas, grounding, numbers, texts
from erniekit.rewards.right_answer import right_answers
from erniekit.rewards.sample import Sample

RewardFunction = Callable[[Sample, RewardArgs], float | None]


@dataclass(frozen=True)
class Builtin:
    """A built-in function, from 0 to 1 unless it says otherwise; None where it does not apply. It raises ValueError for
    a wrong record, as does `check`, which only reads it. `reads_answer`: it needs the right answer, which is an empty
    list only where it `may_be_empty`; `fields`: other fields of the record that it needs. `packages`: what the extra
    `rl` has to bring. `seconds`: what it may take beyond reward_timeout.
    """

    function: RewardFunction
    check: Callable[[Sample, RewardArgs], object] = lambda sample, cfg: None
    reads_answer: bool = False
    may_be_empty: bool = False
    fields: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    seconds: Callable[[Sample, RewardArgs], float] = lambda sample, cfg: 0.0


def _cosine(sample: Sample, cfg: RewardArgs) -> float:
    name = next(name for name in cfg.reward_funcs if name in RIGHT_OR_WRONG)
    is_right = BUILTINS[name].function(sample, cfg) == 1.0
    return texts.cosine(len(sample.completion_ids), is_right, cfg.cosine_max_length)


BUILTINS: dict[str, Builtin] = {
    "accuracy": Builtin(numbers.accuracy, right_answers, reads_answer=True),
    "math": Builtin(formulas.math, right_answers, reads_answer=True, packages=("math_verify", "antlr4")),
    "exact": Builtin(texts.exact, right_answers, reads_answer=True),
    "choice": Builtin(texts.choice, texts.right_letters, reads_answer=True),
    "format": Builtin(texts.thinking_format),
    "json_schema": Builtin(texts.json_schema, texts.right_schema, fields=("json_schema",), packages=("jsonschema",)),
    "length": Builtin(texts.length),
    "cosine": Builtin(_cosine, right_answers, reads_answer=True),
    "repetition": Builtin(texts.repetition),
    "language": Builtin(texts.language),
    "box_iou": Builtin(grounding.box_iou, grounding.right_boxes, reads_answer=True),
    "box_f1": Builtin(grounding.box_f1, grounding.right_boxes, reads_answer=True),
    "point_in_box": Builtin(grounding.point_in_box, grounding.right_boxes, reads_answer=True),
    "tool_calls": Builtin(calls.tool_calls, calls.right_calls, reads_answer=True, may_be_empty=True),
    "code": Builtin(code.code, code.tests_of, fields=("tests",), seconds=code.seconds_of),
}
