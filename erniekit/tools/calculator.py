"""A calculator: arithmetic in Python's notation, exact for fractions, with bounded results."""

import ast
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from erniekit.tools.result import BadCall

MAX_LENGTH = 500  # characters of an expression
_MAX_BITS = 4096  # of a number
_MAX_DEPTH = 60
_DIGITS = 15  # of a result that is not exact

Number = Fraction | float
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
    "floor": math.floor,
    "ceil": math.ceil,
    **{name: vars(math)[name] for name in ("sqrt", "exp", "log", "log10", "log2", "sin", "cos", "tan")},
}
_CONSTANTS = {"pi": math.pi, "e": math.e}
_WRITTEN_OTHERWISE = str.maketrans({"×": "*", "÷": "/", "−": "-", "^": "**", "（": "(", "）": ")", "，": ","})


def calculate(expression: str) -> str:
    """The value of an expression as text, such as "2 * (3 + 4)" -> "14" and "1 / 8" -> "0.125". `^` is a power, as in
    mathematics. Raises BadCall for anything but arithmetic, and for results that are too large.
    """
    if len(expression) > MAX_LENGTH:
        raise BadCall(f"the expression has {len(expression)} characters, and at most {MAX_LENGTH} are read")
    try:
        tree = ast.parse(expression.strip().translate(_WRITTEN_OTHERWISE), mode="eval")
        return _written(_value(tree.body, 0))
    except (SyntaxError, RecursionError, MemoryError):
        raise BadCall("the expression cannot be read; write arithmetic such as 2 * (3 + 4)") from None
    except ZeroDivisionError:
        raise BadCall("division by zero") from None
    except (ArithmeticError, ValueError, TypeError) as error:
        raise BadCall(f"it has no value ({error})") from None


def _value(node: ast.expr, depth: int) -> Number:
    if depth > _MAX_DEPTH:
        raise BadCall("the expression is nested too deeply")
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return _bounded(Fraction(str(node.value)) if math.isfinite(node.value) else node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and (isinstance(node.op, ast.Pow) or type(node.op) in _BINARY):
        apply = _power if isinstance(node.op, ast.Pow) else _BINARY[type(node.op)]
        return _bounded(apply(_value(node.left, depth + 1), _value(node.right, depth + 1)))
    return _named_value(node, depth)


def _named_value(node: ast.expr, depth: int) -> Number:
    """The value of a constant's name, or of a call of a function."""
    if isinstance(node, ast.Name) and node.id in _CONSTANTS:
        return _CONSTANTS[node.id]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return _bounded(function(*(_value(argument, depth + 1) for argument in node.args)))
    raise BadCall(f"only arithmetic is computed, with {', '.join(_FUNCTIONS)}, pi and e")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction) and exponent.denominator == 1:
        if abs(exponent) * max(base.numerator.bit_length(), base.denominator.bit_length()) > _MAX_BITS:
            raise BadCall("the result is too large")
        return base ** int(exponent)
    return float(base) ** float(exponent)


def _bounded(value: Any) -> Number:
    if isinstance(value, int):
        value = Fraction(value)
    if isinstance(value, complex):
        raise BadCall("the result is not a real number")
    if isinstance(value, Fraction) and max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise BadCall("the result is too large")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadCall("the result is too large")
    return value


def _written(value: Number) -> str:
    """Whole numbers with all digits; others with up to 15."""
    if isinstance(value, Fraction) and value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.{_DIGITS}g}"
