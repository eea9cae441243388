"""Chat templates of strangers end, in time and in size, and reach nothing."""

import time

import pytest

from cl_zoo.language._templates import LETTERS, rendered

MESSAGES = {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True, "bos_token": "<s>"}

GOOD = {
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim }}{% endfor %}": "<s>user: Hello",
    "{% for m in messages %}{{ loop.index0 % 2 }}{{ '-' * 3 }}{% endfor %}": "0---",
    "{{ messages | tojson }}": '[{"role": "user", "content": "Hello"}]',
    "{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}": "10",
    "{{ messages[0].content.split('l') | join('-') }}{{ 'a,b'.replace(',', ';') }}": "He--oa;b",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(2 ** 3) }}": "[8]",
}
BAD = {
    "a loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a list": "{{ [0] * 10 ** 9 }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "doubling": "{% set ns = namespace(s='aaaaaaaa') %}" + "{% set ns.s = ns.s + ns.s %}" * 60 + "{{ ns.s }}",
    "joining": "{% set s = 'aaaaaaaa' %}" + "{% set s = s ~ s %}" * 60 + "{{ s }}",
    "joining in a loop": "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "much output": "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "padding": "{{ 'a'.ljust(10 ** 10) }}",
    "padding by a filter": "{{ 'a' | center(10 ** 10) }}",
    "formatting": "{{ '{:>9999999999}'.format(1) }}",
    "formatting by percent": "{{ '%9999999999d' % 1 }}",
    "an indent": "{{ 'a' | indent(10 ** 10, true) }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__.secret }}",
    "replacing": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
    "replacing by a filter": "{{ 'a' * 9999 | replace('a', 'b' * 9999) }}",
    "between": "{{ (',' * 9999).join(range(9999)) }}",
    "by its name": "{{ 'a'['ljust'](10 ** 10) }}",
    "a refusal": "{{ raise_exception('no system prompt') }}",
    "no template": "{% for %}",
    "what is not there": "{{ nothing.at.all }}",
}


@pytest.mark.parametrize("template", GOOD)
def test_what_templates_do(template: str) -> None:
    assert rendered(template, MESSAGES) == GOOD[template]


@pytest.mark.parametrize("name", BAD)
def test_what_templates_may_not_do(name: str) -> None:
    begun = time.monotonic()
    with pytest.raises(BaseException) as error:
        rendered(BAD[name], MESSAGES)
    assert not isinstance(error.value, (SystemExit, KeyboardInterrupt, MemoryError))
    assert time.monotonic() - begun < 8


def test_long_conversations_are_fine() -> None:
    many = {**MESSAGES, "messages": [{"role": "user", "content": "word " * 50}] * 1000}
    made = rendered("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", many)
    assert 250_000 < len(made) < LETTERS
