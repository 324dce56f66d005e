"""Bounds on what a chat template may compute: a model's makers wrote it, who may be anybody.

Jinja's sandbox, in which transformers renders, keeps a template from files and from Python. It does not keep loops
within loops from running for years, nor a text times a number from filling the memory. Here the same environment
counts: CPU time in loops and calls; the size of what each operation takes and makes, before it is made where it could
be much larger; and all that is written. Whoever renders in this process, lm-eval and TRL too, does so within the
bounds, and what a template within them writes is the same as without.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, wraps
from typing import Any

from jinja2 import Environment, Template, TemplateRuntimeError, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Context, Macro, Namespace
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

SECONDS = 5.0
"""CPU time of one rendering. A conversation takes some hundred microseconds."""

MAX_TEMPLATE = 2**20
"""Characters of a template; the longest that are known have some 30,000."""

MAX_VALUE = 2**24
"""Characters of a text, or of all texts in a value, and the largest number that sets a width, a count or the like."""

_SMALL = 1000

_ITEM = 64
"""How a thing in a list counts, in characters."""

_MULTIPLY = frozenset(
    {"join", "format", "format_map", "translate", "expandtabs", "indent", "wordwrap", "tojson", "pprint", "xmlattr"}
    | {"urlize", "center", "ljust", "rjust", "zfill", "to_bytes", "batch", "slice"}
)
"""Filters and methods whose result may have the product of two operands' sizes."""

_PLACE = re.compile(r"%(?:\([^)]*\))?[-+ #0-9.*]*|\{[^{}]*[{}]?")
"""Where a format has a value written, with its width."""

_LAZY = frozenset({"map", "select", "reject", "selectattr", "rejectattr"})
"""Filters that go over a list one by one, as they are asked."""

_MAX_PRODUCT = 2**28
"""Of these; what comes of it is held against `MAX_VALUE` again."""


class TooMuch(TemplateRuntimeError):
    """A template that is out of bounds; the message says of which."""


def bound_templates() -> None:
    """Have transformers render chat templates within the bounds, from now on and in this process."""
    from transformers.utils import chat_template_utils

    chat_template_utils._compile_jinja_template = bounded


@lru_cache
def bounded(text: str) -> Template:
    """The template, compiled in transformers' environment with the bounds.

    Raises:
        TooMuch: it is longer than any, or nested too deeply to be compiled.
        TemplateSyntaxError: it is no template.
    """
    from transformers.utils import chat_template_utils

    if len(text) > MAX_TEMPLATE:
        raise TooMuch(f"it has {len(text):,} characters, as no template has")
    environment = chat_template_utils._cached_compile_jinja_template("").environment
    environment.__class__ = _Bounded
    environment.filters = {name: _within(name, do) for name, do in environment.filters.items()}
    environment.tests = {name: _within(name, do) for name, do in environment.tests.items()}
    environment.filters |= {"counted": _counted, "compared": _compared, "concatenated": _concatenated}
    environment.finalize, environment.concat = _written, _joined
    del environment.globals["lipsum"]  # as much random text as it is asked for
    try:
        return environment.from_string(text)
    except (RecursionError, MemoryError, SyntaxError) as error:  # as Python says it of expressions and of blocks
        raise TooMuch("it is nested too deeply") from error


class _Context(Context):
    """Of one rendering, with what it has left."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.until, self.left, self.ticks = time.thread_time() + SECONDS, 4 * MAX_VALUE, 0

    def tick(self) -> None:
        self.ticks += 1
        if self.ticks % 64 == 0 and time.thread_time() > self.until:
            raise TooMuch(f"it runs for more than {SECONDS:g} s")


class _Generator(CodeGenerator):
    """Compiles a template with filters of ours around what loops go over, what is compared, and what `~` joins."""

    def visit_Template(self, node: nodes.Template, frame: Any = None) -> None:
        super().visit_Template(_Around(self.environment).visit(node), frame)


class _Around(NodeTransformer):
    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def _filtered(self, name: str, value: nodes.Node) -> Any:
        made: Any = nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
        return made.set_environment(self._environment)

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.iter = self._filtered("counted", node.iter)
        return node

    def visit_Compare(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if not all(isinstance(operand.expr, nodes.Const) for operand in node.ops):  # which is no list of lists
            node.expr = self._filtered("compared", node.expr)
        return node

    def visit_Concat(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return self._filtered("concatenated", nodes.List(node.nodes, lineno=node.lineno))


class _Bounded(ImmutableSandboxedEnvironment):
    """transformers' environment of a template, within bounds."""

    code_generator_class = _Generator
    context_class = _Context
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def call(__self, __context: Any, __function: Any, *arguments: Any, **settings: Any) -> Any:  # noqa: B902, N805
        __context.tick()
        if not isinstance(__function, Macro):
            arguments = _listed(arguments)
        method = getattr(__function, "__wrapped__", __function)  # Jinja wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _check_operands(method.__name__, [owner, *arguments, *settings.values()])
        found = super().call(__context, __function, *arguments, **settings)
        if not isinstance(__function, Macro):  # whose text is bounded as all that is written
            _size(found)
        return found

    def call_binop(self, context: Context, name: str, left: Any, right: Any) -> Any:
        if name == "+":
            if not isinstance(left, int | float) and _size(left) + _size(right) > MAX_VALUE:
                raise _too_large()
        elif name == "%":
            if isinstance(left, str | bytes):
                _check_operands("format", [left, right])
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if name == "**" else left.bit_length() + right.bit_length()
            if bits > 4096:
                raise _too_large()
        elif name == "*":
            number = left if isinstance(left, int) else right if isinstance(right, int) else 1
            if number * max(_size(left), _size(right)) > MAX_VALUE:
                raise _too_large()
        return self.binop_table[name](left, right)


class _Counted:
    """What a loop goes over; each round looks at the clock."""

    def __init__(self, items: Iterable[Any], context: _Context) -> None:
        self._items, self._context = items, context

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]  # where it has none, the loop takes the error for that

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._context.tick()
            yield item


@pass_context
def _counted(context: _Context, items: Iterable[Any]) -> _Counted:
    return _Counted(items, context)


def _compared(value: Any) -> Any:
    _size(value)
    return value


def _concatenated(values: list[Any]) -> str:
    if sum(map(_size, values)) > MAX_VALUE:
        raise _too_large()
    return "".join(map(str, values))


@pass_context
def _written(context: _Context, value: Any) -> Any:
    """What is to be written, if there is room left for it."""
    context.left -= len(value) if type(value) is str else _size(value)
    if context.left < 0:
        raise TooMuch(f"it writes more than {4 * MAX_VALUE:,} characters")
    return value


def _joined(pieces: Iterable[str]) -> str:
    """In place of `str.join`: written texts as one."""
    kept, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_VALUE:
            raise _too_large()
        kept.append(piece)
    return "".join(kept)


def _within(name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test whose operands and result are bounded."""
    kind = getattr(do, "jinja_pass_arg", None)  # what Jinja gives it first

    @pass_context
    @wraps(do)
    def done(context: _Context, *arguments: Any, **settings: Any) -> Any:
        context.tick()
        if name not in _LAZY:
            arguments = _listed(arguments)
        _check_operands(name, [*arguments, *settings.values()])
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        found = do(*([] if kind is None else [first[kind.name]]), *arguments, **settings)
        _size(found)
        return found

    return done


def _listed(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """With lists in place of iterators, which might not end or hold too much."""
    return tuple(_drained(value) if isinstance(value, Iterator) else value for value in values)


def _drained(items: Iterator[Any]) -> list[Any]:
    kept, size = [], 0
    for item in items:
        size += _size(item) + _ITEM
        if size > MAX_VALUE:
            raise _too_large()
        kept.append(item)
    return kept


def _check_operands(name: str, given: list[Any]) -> None:
    """Refuse operands that are too large, or that could make a text or list that is.

    Args:
        name: of the filter or method.
        given: what it works on, and its settings.

    Raises:
        TooMuch: one is too large, or two of them together.
    """
    sizes = [len(one) if type(one) is str else _size(one) for one in given]
    if sum(sizes) < _SMALL and name not in _MULTIPLY:
        return
    if name == "replace" and len(given) > 2 and all(isinstance(one, str) for one in given[:3]):
        text, old, new = given[:3]
        if text.count(old) * len(new) > MAX_VALUE:
            raise _too_large()
    elif name in _MULTIPLY:
        widths = given[1:]
        if name.startswith("format") and isinstance(given[0], str | bytes):
            form = given[0] if isinstance(given[0], str) else given[0].decode("latin-1")
            places = " ".join(_PLACE.findall(form))
            widths = [int(number[:12]) for number in re.findall(r"\d+", places)]
            if "*" in places or places.count("{") > places.count("}"):  # a width may stand among the values, too
                widths += _numbers(given[1:])
            widths = [sum(map(abs, widths))]
        held = [
            size for one, size in zip(given, sizes, strict=True) if isinstance(one, str | bytes | list | tuple | dict)
        ]
        held = sorted([*held, *_numbers(widths)])
        if held and (held[-1] > MAX_VALUE or (len(held) > 1 and held[-1] * held[-2] > _MAX_PRODUCT)):
            raise _too_large()


def _numbers(values: Iterable[Any]) -> list[int]:
    """The whole numbers among values, and in lists of them; how large they are."""
    found = []
    for value in values:
        within = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        found += [abs(one) for one in within if isinstance(one, int)]
    return found


def _size(value: Any) -> int:
    """Characters of a text, or of what a value holds.

    Raises:
        TooMuch: it is above `MAX_VALUE`.
    """
    if isinstance(value, str | bytes):
        if len(value) > MAX_VALUE:
            raise _too_large()
        return len(value)
    size, waiting = 0, [value]
    while waiting:
        one = waiting.pop()
        size += _ITEM
        if isinstance(one, str | bytes):
            size += len(one)
        elif isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += one
        elif isinstance(one, Namespace):
            waiting.append(one._Namespace__attrs)
        elif isinstance(one, int):
            size += one.bit_length() // 3
        if size > MAX_VALUE or len(waiting) > MAX_VALUE:
            raise _too_large()
    return size


def _too_large() -> TooMuch:
    return TooMuch("it makes a value that is too large")
