"""For the site's API pages: our docstrings in the form that griffe reads.

griffe knows the heading "Examples:", our docstrings say "Example:". In "Args:" and "Raises:" it takes only
items of the form "name: description" and leaves the rest out of the page: a list of names that goes over two
lines, and a sentence about all of them ("Nothing is written when an error is raised.").
"""

import re
from typing import Any

import griffe


def readable(text: str) -> str:
    """A docstring (dedented) whose sections hold items alone; sentences stand behind their section."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    # "    a, b,\n    c: as in f" on one line.
    wrapped = re.compile(r"^(    (?:\w+, )*\w+),\n    (?=(?:\w+, )*\w+(?:,$|: ))", re.M)
    while wrapped.search(text):
        text = wrapped.sub(r"\1, ", text)

    def split(section: re.Match[str]) -> str:
        entries = re.split(r"\n(?=    \S)", section[2].rstrip("\n"))
        items = [e for e in entries if re.match(r"    [\w*., ]+: ", e)]
        sentences = [" ".join(e.split()) for e in entries if e not in items]
        if items:
            return "\n".join([f"{section[1]}:", *items, "", *sentences, "", ""])
        first, *rest = sentences
        name = {"Args": "Arguments"}.get(section[1], section[1])
        return "\n".join([f"{name} {first[0].lower()}{first[1:]}", *rest, "", ""])

    return re.sub(
        r"^(Args|Raises):\n((?:    .*\n|\n(?=    ))*(?:    .*)?)\n*", split, text, flags=re.M
    )


class Readable(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)
