"""Chat templates of strangers: rendered in a sandbox, within limits of time and memory."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from cl_zoo.language._extra import optional

__all__ = ["rendered"]

SECONDS, LETTERS = 2.0, 1_000_000
_BUILDERS = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
"""Methods of text that make a long one of a short one: templates need none of them."""
_TEXT = _BUILDERS | {"replace", "join"}


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """What a Jinja template makes of values.

    The sandbox keeps it from what is not given to it. A trace looks at the clock, and at the length of every text that
    it holds, at each of its lines.

    Raises:
      Exception: what Jinja raises; TimeoutError; a TemplateError where a text or a number grows too large.
    """
    jinja, sandbox = optional("jinja2"), optional("jinja2.sandbox")

    def refuse(message: str) -> None:
        raise jinja.TemplateError(message)

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):  # type: ignore[name-defined]
        intercepted_binops = frozenset({"*", "**", "%", "+"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            long = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
            if operator == "%" and isinstance(left, str):
                refuse("texts are not formatted by %")
            if operator == "+" and sum(long) > LETTERS:
                refuse("a text is too long")
            if operator == "*" and len(long) == 1:
                times = left if isinstance(left, int) else right
                if isinstance(times, int) and long[0] * times > LETTERS:
                    refuse("a text is too long")
            if (
                operator in ("*", "**")
                and not long
                and max(abs(left), abs(right)) > (64 if operator == "**" else 2**64)
            ):
                refuse("a number is too large")
            return super().call_binop(context, operator, left, right)

        def getattr(self, found: Any, attribute: str) -> Any:
            if isinstance(found, str) and attribute in _BUILDERS:
                return self.unsafe_undefined(found, attribute)
            if isinstance(found, str) and attribute in ("replace", "join"):
                return partial(replace if attribute == "replace" else join, found)
            return super().getattr(found, attribute)

        def getitem(self, found: Any, argument: Any) -> Any:
            return (
                self.getattr(found, argument)
                if isinstance(found, str) and argument in _TEXT
                else super().getitem(found, argument)
            )

    def limited(length: int) -> None:
        if length > LETTERS:
            refuse("a text is too long")

    def replace(text: str, old: str, new: str, count: int = -1) -> str:
        limited(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        return text.replace(old, new, count)

    def join(between: str, parts: Any) -> str:
        parts = [str(part) for part in parts]
        limited(len(between) * len(parts) + sum(map(len, parts)))
        return between.join(parts)

    own = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    for name in ("center", "format", "indent", "wordwrap", "pprint", "xmlattr", "urlize"):
        own.filters.pop(name, None)
    own.filters["replace"] = lambda text, old, new, count=-1: replace(str(text), str(old), str(new), count)
    own.filters["join"] = lambda parts, between="", attribute=None: join(
        str(between), parts if attribute is None else [part[attribute] for part in parts]
    )
    own.globals["raise_exception"] = refuse
    own.globals.pop("lipsum", None)
    own.filters["tojson"] = lambda value, indent=None, **options: json.dumps(
        value, indent=indent if indent is None else min(int(indent), 16), **({"ensure_ascii": False} | options)
    )
    compiled = own.from_string(template)
    # What `~` compiles to.
    compiled.root_render_func.__globals__.update(dict.fromkeys(("str_join", "markup_join"), partial(join, "")))
    end = time.monotonic() + SECONDS

    def watch(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {SECONDS:g} seconds")
        if frame.f_code.co_filename == "<template>":
            held = sum(len(value) for value in frame.f_locals.values() if isinstance(value, (str, list)))
            if held > LETTERS:
                refuse("a text is too long")
        return watch

    before = sys.gettrace()
    made, length = [], 0
    sys.settrace(watch)
    try:
        for piece in compiled.generate(**values):
            made.append(piece)
            length += len(piece)
            if length > LETTERS:
                refuse("the prompt is too long")
    finally:
        sys.settrace(before)
    return "".join(made)
