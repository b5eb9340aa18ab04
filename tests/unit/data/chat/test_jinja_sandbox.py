"""Chat templates behave as in jinja itself, and what goes wrong in one is one message with its line."""

import json
from pathlib import Path

import jinja2
import jinja2.sandbox
import pytest

from erniekit.data.chat.jinja_meter import ALLOWANCE
from erniekit.data.chat.jinja_sandbox import BoundedTemplate, TemplateFault

REAL = Path(__file__).parents[5] / "shared/data/ernie45"
MESSAGES = [
    {"role": "user", "content": "a <b> 你\n"},
    {"role": "assistant", "content": "b", "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None, True]}}]},
]

# Written alike by jinja's own sandbox: every kind of expression and statement that is rewritten.
ALIKE = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role ~ ':' ~ m['content'] }}{% endfor %}",
    "{% for m in messages if m.role != 'user' %}{{ m.content }}{% else %}none{% endfor %}",
    "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ a }}{{ b }}{{ ',' if not loop.last }}{% endfor %}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "{% for i in range(9) %}{% if i is odd %}{% continue %}{% endif %}{% if i > 6 %}{% break %}{% endif %}"
    "{{ i }}{% endfor %}",
    "{% set ns = namespace(n=0, s='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.s = ns.s + m.role %}"
    "{% endfor %}{{ ns.n }}{{ ns.s }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1) }}{{ f(1, 3) }}",
    "{% macro f(a) %}<{{ caller(a) }}>{% endmacro %}{% call(x) f(3) %}{{ x * 2 }}{% endcall %}",
    "{% set x %}a{{ 1 }}b{% endset %}{{ x|upper }}{% filter upper %}abc{% endfilter %}"
    "{% set y | trim %} z {% endset %}{{ y }}",
    "{{ messages[1:]|length }}{{ messages[::-1][0].role }}{{ 'abcdef'[1:-1] }}{{ messages[0].content[:3] }}",
    "{{ 1 + 2 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 'ab' * 3 }}{{ 3 * 'ab' }}{{ 2 ** 10 }}{{ 7 % 4 }}"
    "{{ '%s-%03d' % ('x', 5) }}",
    "{{ 7 / 2 }}{{ 7 // 2 }}{{ -3 }}{{ 1 ~ 2 ~ none ~ true ~ [1] }}{{ 2 ** -1 }}{{ 'a' * 0 }}",
    "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 'x' not in ['y'] }}{{ [1, 2] == [1, 2] }}{{ 'role' in messages[0] }}"
    "{{ 1 == 1.0 }}",
    "{{ 'a,b,c'.split(',')|join('+') }}{{ ' a '.strip() }}{{ 'a-b'.replace('-', '') }}{{ 'x'.join(['1', '2']) }}"
    "{{ '{} {a:>4}'.format(1, a=2) }}{{ 'abc'.startswith('ab') }}{{ 'a b'.split()[-1] }}{{ 'a'.center(5) }}|",
    "{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}['a'] }}{{ {('a', 1): 2}[('a', 1)] }}{{ dict(a=1) }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ [3, 1, 2]|sort }}{{ ['b', 'a']|sort|first }}{{ [1, 1, 2]|unique|list }}{{ [1, 2]|sum }}{{ [1, 5]|max }}"
    "{{ [4, 2]|min }}",
    "{{ [[1], [2]]|sum(start=[]) }}{{ [{'a': 1}, {'a': 2}]|sum(attribute='a') }}{{ [1, 2, 3]|batch(2, 'x')|list }}",
    "{{ [1, 2, 3]|slice(2)|list }}{{ messages|groupby('role')|map('first')|list }}{{ {'b': 1, 'a': 2}|dictsort }}",
    "{{ 'a\nb'|indent(2) }}{{ 'abc'|center(9) }}{{ '%s'|format(3) }}{{ 'aXa'|replace('X', 'y') }}"
    "{{ 'a b'|title }}{{ 2.567|round(1) }}",
    "{{ nothing }}{{ nothing ~ 1 }}{{ [nothing] }}{{ 1 if nothing }}{{ 'x'|default('y') }}"
    "{{ nothing|default('y') }}{{ nothing is defined }}{{ none is none }}{{ 3 is divisibleby(3) }}",
    "{{ messages is sequence }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ 'a' is in(['a']) }}"
    "{{ 3 is gt(2) }}{{ 'A' is upper }}",
    "{{ ['a', 'b']|map('upper')|list }}{{ [0, 1]|select|list }}{{ [0, 1]|reject('odd')|list }}{{ 'ab'|list }}"
    "{{ 'ab'|reverse }}",
    "{{ '<a>'|e }}{{ '<a>'|safe }}{{ ('a'|safe) + '<' }}{{ 'a' | length }}{{ '5'|int + 1 }}{{ '1.5'|float }}"
    "{{ 'ab'|wordcount }}",
    "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{% if a %}x{% elif messages %}y{% else %}z{% endif %}"
    "{{ 'a' if 0 else 'b' }}",
    "{% block a %}in{{ messages|length }}{% endblock %}{{ self.a() }}",
    "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{% set j = joiner('-') %}{{ j() }}"
    "{{ j() }}",
    "{# comment #}\n  {% if true %}\n line\n  {% endif %}\n{%- if true -%} x {%- endif %} {% raw %}{{ x }}{% endraw %}",
    "{% for m in messages %}{{ loop.previtem is defined }}{{ loop.nextitem is defined }}"
    "{{ loop.changed(m.role) }}{{ loop.cycle(1, 2) }}{% endfor %}",
    "{{ 'a\\nb'.splitlines() }}{{ 'x=y'.partition('=') }}{{ 'abc'.rstrip('c') }}{{ 'a' < 'b' }}"
    "{{ not messages }}{{ '%(a)s' % {'a': 1} }}",
]


def theirs(source):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(source).render(messages=MESSAGES, tools=None)


@pytest.mark.parametrize("source", ALIKE)
def test_the_text_is_that_of_jinja_itself(source):
    assert BoundedTemplate(source).render(messages=MESSAGES, tools=None) == theirs(source)


def test_the_additions_of_transformers():
    source = "{% generation %}{{ x|tojson }}{% endgeneration %}{{ x|tojson(indent=1, sort_keys=true) }}"
    source += "{{ x|tojson(ensure_ascii=true, separators=(',', ':')) }}{{ strftime_now('%Y')|length }}"
    x = {"你": [1, None], "a": "<"}
    expected = json.dumps(x, ensure_ascii=False) + json.dumps(x, ensure_ascii=False, indent=1, sort_keys=True)
    expected += json.dumps(x, separators=(",", ":")) + "4"
    assert BoundedTemplate(source).render(x=x) == expected
    with pytest.raises(TemplateFault, match="line 2: roles must alternate"):
        BoundedTemplate("\n{{ raise_exception('roles must alternate') }}").render()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ 1 / 0 }}", "line 2: ZeroDivisionError: division by zero"),
        ("{% for m in messages %}\n{{ m.x.y }}\n{% endfor %}", "line 2: 'dict object' has no attribute 'x'"),
        ("{{ 'a' + 1 }}", "line 1: TypeError: .*"),
        ("{{ 'a'|round }}", "line 1: TypeError: .*"),
        ("{{ ''.__class__.mro() }}", "line 1: access to attribute '__class__' of 'str' object is unsafe."),
        ("{% macro m() %}{{ m() }}{% endmacro %}\n{{ m() }}", "line .: it calls itself, or is nested, too deeply"),
        ("{{ 1e999 }}{{ 1e999 + 1 }}", "line 1: .*"),
        ("{{ 'x' * 99999999999 }}", "line 1: it takes too many steps or writes too much text for one conversation"),
    ],
)
def test_what_goes_wrong_is_one_message_with_the_line(source, message):
    with pytest.raises(TemplateFault, match=f"^{message}$"):
        BoundedTemplate(source).render(messages=MESSAGES)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("\n{% for m in messages %}", "line 2: Unexpected end of template"),
        ("{{ x|nothing }}", "line 1: No filter named 'nothing'"),
        ("{% include 'x' %}", "line 1: a chat template is one file"),
        ("{% autoescape true %}{% endautoescape %}", "line 1: .*not for chat templates"),
        ("{{ " + "(" * 5000, "nested too deeply"),
        ("{% for i in x %}" * 40 + "{% endfor %}" * 40, "too many statically nested blocks"),
        ("{{ " + "9" * 5000 + " }}", "ValueError: .*digits"),
        ("x" * 70000, "70,000 characters"),
    ],
)
def test_what_is_no_template_is_refused_when_it_is_loaded(source, message):
    with pytest.raises(TemplateFault, match=f"^{message}"):
        BoundedTemplate(source)


def test_a_long_conversation_may_take_more_than_a_short_one():
    """Ten passes over each message: refused for no conversation, however long it is."""
    source = "{% for i in range(10) %}{% for m in messages %}{{ m.content }}{% endfor %}{% endfor %}"
    message = {"role": "user", "content": "x" * (ALLOWANCE // 20)}
    assert len(BoundedTemplate(source).render(messages=[message] * 4)) == 40 * len(message["content"])
    hostile = "{{ messages[0].content * 99999 }}"
    with pytest.raises(TemplateFault, match="too much text"):
        BoundedTemplate(hostile).render(messages=[message])


@pytest.mark.skipif(not REAL.is_dir(), reason="the published template's files are not here")
def test_the_published_template_writes_its_bytes():
    settings = json.loads((REAL / "text-0.3b-base/tokenizer_config.json").read_text(encoding="utf-8"))
    template = BoundedTemplate(settings["chat_template"])
    rendered = json.loads((REAL / "rendered.json").read_text(encoding="utf-8"))
    results = rendered["real"]["text-0.3b-base"]["results"]
    variants = {
        "default": {},
        "generation_prompt": {"add_generation_prompt": True},
        "no_generation_prompt": {"add_generation_prompt": False},
    }
    compared = 0
    for name, by_variant in results.items():
        for variant, variables in variants.items():
            if "text" not in by_variant[variant]:
                continue
            given = {"bos_token": "<s>", "eos_token": "</s>", **variables}
            written = template.render(messages=rendered["conversations"][name], tools=None, **given)
            assert written == by_variant[variant]["text"], (name, variant)
            compared += 1
    assert compared > 10
