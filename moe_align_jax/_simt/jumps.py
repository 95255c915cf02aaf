"""Finds jumps out of the body of a `with` or `for` statement in the text of a kernel body.

Python leaves a `with` block by `return`, `break` or `continue` as it leaves it at its end, so a context
manager cannot tell them apart. The text of the function can.
"""

import ast
import functools
import linecache
from types import FrameType
from typing import NamedTuple

LEFT_LOOP = (
    "kernel body: t.for_range must run to the end of its body; got a `break` or `return` in it. A body is "
    "traced once, for all threads: guard the rest of it with `with t.if_(c):`, and give the loop its end as "
    "`stop`."
)


class BodyError(TypeError):
    """A kernel body says something that Python would take in another meaning than its author."""


class Jump(NamedTuple):
    """A statement that leaves a body before its end.

    Attributes:
        word: `return`, `break` or `continue`.
        file, line: where it stands.
    """

    word: str
    file: str
    line: int


def refuse_jumps(function: str, frame: FrameType) -> None:
    """`function` is what the head of the `with` or `for` calls, in this frame.

    Raises:
        BodyError: a jump leads out of the statement's body.
    """
    if jump := out_of(frame):
        raise BodyError(
            f"kernel body: {function} must run to the end of its body; got `{jump.word}` "
            f"({jump.file}:{jump.line}). It would hold for all threads at once: guard what follows with "
            "`with t.if_(c):` instead, or move it into the other branch."
        )


def out_of(frame: FrameType) -> Jump | None:
    """The first jump out of the `with` or `for` whose head the frame is executing; None for none, for a head
    that is no such statement, and where there is no text (a function made by `exec`)."""
    return _of_file(frame.f_code.co_filename).get(frame.f_lineno)


@functools.cache
def _of_file(file: str) -> dict[int, Jump]:
    """The jumps by the lines of the heads of their statements."""
    found: dict[int, Jump] = {}
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            heads, is_with = [item.context_expr for item in node.items], True
        elif isinstance(node, ast.For):
            heads, is_with = [node.iter], False
        else:
            continue
        # A `continue` in a loop's own body only ends this turn of it.
        if jump := _first(node.body, file, breaks=True, continues=is_with):
            for head in heads:
                for line in range(head.lineno, (head.end_lineno or head.lineno) + 1):
                    found[line] = jump
    return found


def _first(
    body: list[ast.stmt], file: str, breaks: bool = False, continues: bool = False
) -> Jump | None:
    """The first jump in a body; whether `break` and `continue` in it belong to a loop around it."""
    for statement in body:
        match statement:
            case ast.Return():
                return Jump("return", file, statement.lineno)
            case ast.Break() if breaks:
                return Jump("break", file, statement.lineno)
            case ast.Continue() if continues:
                return Jump("continue", file, statement.lineno)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                continue
            case ast.For() | ast.While():
                parts = [_first(statement.body, file)]
                parts.append(_first(statement.orelse, file, breaks, continues))
            case _:
                parts = [_first(part, file, breaks, continues) for part in _bodies(statement)]
        if jump := next(filter(None, parts), None):
            return jump
    return None


def _bodies(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The lists of statements of an `if`, `with`, `try` or `match`."""
    parts = [getattr(statement, name, []) for name in ("body", "orelse", "finalbody")]
    inner = [*getattr(statement, "handlers", []), *getattr(statement, "cases", [])]
    return parts + [part.body for part in inner]
