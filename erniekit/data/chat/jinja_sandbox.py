"""Jinja for chat templates, configured as in transformers, with limits on steps, memory and time.

Jinja's sandbox keeps a template from reaching Python objects, but not from using all memory. A template is therefore
rewritten before it is compiled: every iteration of a loop and every call of a macro spends from the allowance of the
rendering (chat.jinja_meter), as does every operation whose cost depends on the size of its operands: output, `~`,
comparisons, slices and computed keys. Filters, tests, operators and calls are metered through jinja's own hooks. The
output of a template is not changed.
"""

import json
from collections.abc import Callable, Iterator, Sized
from datetime import datetime
from functools import lru_cache
from types import BuiltinMethodType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes as nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
import jinja2.visitor

from erniekit.data.chat.jinja_meter import STEP, LimitExceeded, Meter, check_integer

MAX_SOURCE = 1 << 16  # characters of a template
_MAX_REASON = 300  # characters of an error's text in a message
_NODE = 8  # units for each node of the syntax tree inside a loop

# Filters whose cost does not depend on the size of their value.
_CONSTANT_FILTERS = frozenset("attr count d default first items last length random".split())
# Filters that pass the items of their value on one by one.
_ITEM_FILTERS = frozenset("map reject rejectattr select selectattr".split())
# Filters whose result is at most about as long as their value and arguments together.
_LINEAR_FILTERS = frozenset(
    "abs capitalize e escape filesizeformat float forceescape int list lower reverse safe string truncate upper".split()
)
# Filters that make a list; for a text, a list of its characters.
_ELEMENT_FILTERS = frozenset("batch groupby list max min slice sort unique".split())
# Filters written in Python that process every character, and so are slower than those written in C.
_SLOW_FILTERS = frozenset("title urlencode wordcount wordwrap xmlattr".split())
_SLOW = 32
_INDENTED = 16  # factor by which indented JSON is more expensive than JSON without line breaks
# Filters for web pages and debugging whose cost may be quadratic in the length of their value, or higher. They are
# removed.
_LEFT_OUT = ("pprint", "striptags", "urlize")
# Tests whose cost does not depend on the size of their value.
_CONSTANT_TESTS = frozenset(
    "boolean callable defined escaped false float integer iterable mapping none number sameas sequence string true "
    "undefined".split()
)
_NUMBER_TESTS = frozenset(("divisibleby", "even", "odd"))


class TemplateFault(Exception):
    """An error in a template, or in the values that it gets: `reason`, and the template's line if known."""

    def __init__(self, reason: str, line: int | None) -> None:
        super().__init__(reason if line is None else f"line {line}: {reason}")


class BoundedTemplate:
    """A compiled chat template. Raises TemplateFault for an invalid template, and for every error during a rendering,
    since the template is a program that we do not control.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateFault(f"{len(source):,} characters; a template has at most {MAX_SOURCE:,}", None)
        environment = _environment()
        try:
            tree = _Rewriter().visit(environment.parse(source))
            tree.set_environment(environment)
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFault(error.message or "not valid", error.lineno) from None
        # raised for the Python code that jinja generates, whose lines are not the template's
        except SyntaxError as error:
            raise TemplateFault(error.msg, None) from None
        except (RecursionError, MemoryError):  # Python's parser raises MemoryError when its stack is too small
            raise TemplateFault("nested too deeply", None) from None
        except Exception as error:
            raise TemplateFault(_text(error), None) from None

    def render(self, **variables: Any) -> str:
        """Render the template with `variables`, of which `messages` and `tools` are the conversation."""
        context = self._template.new_context(variables)
        assert isinstance(context, _Context)
        context.meter = Meter((variables.get("messages"), variables.get("tools")))
        try:
            return "".join(self._template.root_render_func(context))
        except Exception as error:
            raise TemplateFault(_text(error), self._line(error)) from None

    def _line(self, error: Exception) -> int | None:
        """The line of the template at which `error` was raised."""
        line, entry = None, error.__traceback__
        while entry is not None:
            if entry.tb_frame.f_globals.get("__jinja_template__") is self._template:
                line = self._template.get_corresponding_lineno(entry.tb_lineno)
            entry = entry.tb_next
        return line


def _text(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it calls itself, or is nested, too deeply"
    if isinstance(error, MemoryError):
        return "the memory is used up"
    text = str(error)
    if not isinstance(error, jinja2.TemplateError | LimitExceeded):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _MAX_REASON else text[:_MAX_REASON] + " ..."


class _Context(jinja2.runtime.Context):
    """The variables of one rendering, with its allowance."""

    meter: Meter

    def derived(self, locals: dict[str, Any] | None = None) -> "_Context":
        context = super().derived(locals)
        assert isinstance(context, _Context)
        context.meter = self.meter
        return context


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    context_class = _Context
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Meter the operators whose result may be larger than their operands."""
        meter, kind = context.meter, type(left)
        if operator == "+":
            if kind is str and type(right) is str:
                meter.spend(len(left) + len(right))
                return left + right
            return meter.result(left + right)
        if operator == "%":
            if isinstance(left, str):
                meter.spend_percent(left, right)
            return left % right
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            check_integer(bits + right.bit_length() if operator == "*" else bits * max(0, right))
        elif operator == "*":
            if isinstance(left, int):
                meter.spend_growth(right, (left,), {})
            else:
                meter.spend_growth(left, (right,), {})
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Meter a call of a function or method."""
        meter = context.meter
        # jinja wraps text.format in a function of its own; __wrapped__ is the method
        method = getattr(function, "__wrapped__", function)
        if type(method) is BuiltinMethodType:
            args = tuple(list(meter.draw(value)) if isinstance(value, Iterator) else value for value in args)
            meter.spend_method(method.__self__, method.__name__, args, kwargs)
        elif isinstance(function, jinja2.runtime.Macro):
            meter.spend(STEP * (4 + len(args) + len(kwargs)))
        else:
            meter.spend(4 * STEP)
            meter.spend_walk(*args, *kwargs.values())
        return meter.result(super().call(context, function, *args, **kwargs))


class _Rewriter(jinja2.visitor.NodeTransformer):
    """Inserts nodes that spend from the allowance into a template's syntax tree. They are filters whose names begin
    with a space, so that they cannot hide a filter of the template.
    """

    def __init__(self) -> None:
        self._units = 0  # the cost of the nodes visited since the innermost loop or macro began

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        self._units += _NODE
        if isinstance(node, nodes.TemplateData):
            self._units += len(node.data)
        elif isinstance(node, nodes.Const) and isinstance(node.value, str):
            self._units += len(node.value)
        elif isinstance(node, nodes.List | nodes.Dict | nodes.Tuple):
            self._units += STEP
        return super().visit(node, *args, **kwargs)

    def _visit_repeated(self, node: nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block) -> nodes.Node:
        """Rewrite a statement whose body may run several times, so that each time spends the cost of its nodes."""
        before = self._units
        self.generic_visit(node)
        units = nodes.Const(STEP + self._units - before, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(_filtered(units, " step"), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = nodes.And(_filtered(units, " step"), node.test, lineno=node.lineno)
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _visit_repeated

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier) -> NoReturn:
        raise jinja2.TemplateSyntaxError("{% autoescape %} is for web pages, not for chat templates", node.lineno)

    def _refuse(self, node: nodes.Node) -> NoReturn:
        raise jinja2.TemplateSyntaxError("a chat template is one file: it can take nothing from another", node.lineno)

    visit_Extends = visit_Include = visit_Import = visit_FromImport = _refuse

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [
            item if isinstance(item, nodes.Const | nodes.TemplateData) else _filtered(item, " walked")
            for item in node.nodes
        ]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load", lineno=node.lineno), " joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        if len(sides) == 2 and node.ops[0].op not in ("in", "notin") and any(map(_is_constant, sides)):
            return node  # a comparison with a constant reads at most as much as the constant
        if not _is_constant(node.expr):
            node.expr = _filtered(node.expr, " walked")
        for operand in node.ops:
            if not _is_constant(operand.expr):
                searched = operand.op in ("in", "notin") and _is_constant(node.expr)
                operand.expr = _filtered(operand.expr, " scanned" if searched else " walked")
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _filtered(node.node, " scanned")
        elif not _is_constant(node.arg):
            node.arg = _filtered(node.arg, " walked")
        return node

    def _visit_arguments(self, node: nodes.Call | nodes.Filter | nodes.Test) -> nodes.Node:
        """Rewrite f(*items): Python makes a tuple of all items before any hook sees the call."""
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = _filtered(node.dyn_args, " spread")
        return node

    visit_Call = visit_Filter = visit_Test = _visit_arguments

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not _is_constant(node.key):
            node.key = _filtered(node.key, " walked")
        return node


def _is_constant(node: nodes.Node) -> bool:
    """Whether a node is a constant, or a list of constants."""
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _step(context: Any, units: int) -> bool:
    context.meter.spend(units)
    return True


@jinja2.pass_context
def _walked(context: Any, value: Any) -> Any:
    """Returns `value`, after spending the cost of writing or comparing all of it."""
    context.meter.spend(len(value) if type(value) is str else context.meter.size(value))
    return value


@jinja2.pass_context
def _scanned(context: Any, value: Any) -> Any:
    """Returns `value`, after spending the cost of copying a part of it or searching in it."""
    if isinstance(value, str):
        context.meter.spend(len(value))
    elif isinstance(value, list | tuple):
        context.meter.spend(STEP * len(value))
    return value


@jinja2.pass_context
def _spread(context: Any, values: Any) -> Any:
    """Returns `values`, after spending the cost of passing each item as an argument."""
    context.meter.spend(STEP * len(values) if isinstance(values, Sized) else STEP)
    return values


@jinja2.pass_context
def _joined(context: Any, values: tuple[Any, ...]) -> str:
    """The operator `~`, which joins values as text."""
    context.meter.spend(2 * context.meter.size(values))
    return "".join(map(str, values))


@jinja2.pass_context
def _summed(context: Any, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    """The filter `sum`, as separate additions, so that each one is metered."""
    environment = context.environment
    if attribute is not None:
        values = environment.call_filter("map", values, kwargs={"attribute": attribute}, context=context)
    for value in context.meter.draw(iter(values)):
        start = environment.call_binop(context, "+", start, value)
    return start


def _spend_filter(meter: Meter, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Spend the cost of a filter."""
    if isinstance(value, str) and name in _ELEMENT_FILTERS:
        meter.spend(STEP * len(value))
    if name in _LINEAR_FILTERS:
        meter.spend_walk(value, *args, *kwargs.values())
    elif name == "join" and "attribute" not in kwargs and len(args) < 2:
        meter.spend_join(args[0] if args else kwargs.get("d", ""), value)
    elif name == "replace":
        meter.spend_replace(value, args, kwargs)
    elif name == "format":
        meter.spend_walk(value)
        meter.spend_percent(str(value), (*args, *kwargs.values()))
    elif name == "tojson":
        indented = kwargs.get("indent") is not None or len(args) > 1
        meter.spend_growth(value, args, kwargs, _INDENTED if indented else 1)
    else:
        meter.spend_growth(value, args, kwargs, _SLOW if name in _SLOW_FILTERS else 1)


def _bounded_filter(name: str) -> Callable[..., Any]:
    """The filter of that name, with metering."""

    @jinja2.pass_context
    def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        meter = context.meter
        if name in _ITEM_FILTERS:
            item_cost = STEP + sum(map(meter.size, (*args, *kwargs.values())))
            return meter.draw(_plain().call_filter(name, value, args, kwargs, context), item_cost)
        if isinstance(value, Iterator):
            value = list(meter.draw(value))
        _spend_filter(meter, name, value, args, kwargs)
        return meter.result(_plain().call_filter(name, value, args, kwargs, context))

    return bounded


def _bounded_test(name: str) -> Callable[..., Any]:
    """The test of that name, with metering."""

    @jinja2.pass_context
    def bounded(context: Any, value: Any, *args: Any) -> Any:
        if name in _NUMBER_TESTS and isinstance(value, str):
            raise TypeError(f"{name} is a test for numbers")
        context.meter.spend_walk(value, *args)
        return _plain().call_test(name, value, args, context=context)

    return bounded


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %} ... {% endgeneration %}, with which some templates mark answers; it has no effect."""

    tags = {"generation"}  # noqa: RUF012  (jinja's own convention)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """The object that {% set space.name = ... %} assigns to. It prints as its name only, since it may contain
    itself.
    """

    def __repr__(self) -> str:
        return "<Namespace>"


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > _MAX_REASON:
        raise LimitExceeded(f"a date format of more than {_MAX_REASON} characters")
    return datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson` without ASCII escapes, with the arguments that transformers gives it."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=1)
def _plain() -> jinja2.Environment:
    """An environment with jinja's own filters and tests, which the metered ones call."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = _to_json
    return environment


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    """The environment for chat templates, as in transformers: sandboxed, with trimmed blocks and JSON without
    ASCII escapes.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    for name in set(_plain().filters) - _CONSTANT_FILTERS:
        environment.filters[name] = _bounded_filter(name)
    for name in set(_plain().tests) - _CONSTANT_TESTS:
        environment.tests[name] = _bounded_test(name)
    for name in _LEFT_OUT:
        del environment.filters[name]
    del environment.globals["lipsum"]  # it makes random text of any length
    added: dict[str, Any] = {
        "sum": _summed,
        " step": _step,
        " walked": _walked,
        " scanned": _scanned,
        " spread": _spread,
        " joined": _joined,
    }
    environment.filters.update(added)
    environment.globals["namespace"] = _Namespace
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment
