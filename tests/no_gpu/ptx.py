"""What can be read from a kernel's PTX, and from what ptxas says of it."""

import functools
import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+([^;]*);", re.MULTILINE)
_ADDRESS = re.compile(r"\[\s*([%\w$]+)")
_POINTER = re.compile(r"%rd\d+")
_REGISTER = re.compile(r"%rd?\d+")
_WIDTH = re.compile(r"\.[busf](\d+)$")
_VECTOR = re.compile(r"\.v(\d+)\.")
# Memory that is not global; an access that names no space could be any.
_OTHER_SPACES = (".shared", ".param", ".local", ".const")


class Usage(NamedTuple):
    """What ptxas took for one kernel: registers per thread, and bytes."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


def usage(log: str) -> Usage:
    """From `ptxas -v` of a file with one kernel."""
    [registers] = re.findall(r"Used (\d+) registers", log)
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    [(stack, stores, loads)] = re.findall(pattern, log)
    return Usage(int(registers), int(stack), int(stores), int(loads))


class Access(NamedTuple):
    """An instruction on global memory.

    Attributes:
        instruction: its name.
        bytes: how many it moves.
        parameters: the kernel parameters that its address is computed from, by position.
        position: where in the text it stands.
        register: what holds its address.
    """

    instruction: str
    bytes: int
    parameters: frozenset[int]
    position: int
    register: str


def max_threads(ptx: str) -> int:
    """Threads per CTA that the kernel is compiled for."""
    [sizes] = re.findall(r"\.(?:maxntid|reqntid)\s+(\d+), (\d+), (\d+)", ptx)
    return int(sizes[0]) * int(sizes[1]) * int(sizes[2])


@functools.lru_cache(maxsize=1)
def _writers(ptx: str) -> dict[str, list[tuple[str, str]]]:
    """For each register the instructions that write it, and what they read."""
    writers: dict[str, list[tuple[str, str]]] = {}
    for match in _INSTRUCTION.finditer(ptx):
        target, _, sources = match[2].partition(",")
        writers.setdefault(target.strip(), []).append((match[1], sources))
    return writers


def _behind(ptx: str, register: str, kind: re.Pattern) -> set[tuple[str, str]]:
    """The instructions that a register is computed by, through registers of that kind, and what they read;
    back to what is given, or was loaded from memory."""
    writers, found, seen, todo = _writers(ptx), set(), {register}, [register]
    while todo:
        for name, sources in writers.get(todo.pop(), ()):
            if name.startswith(("ld.", "atom.")) and not name.startswith("ld.param"):
                continue
            found.add((name, sources))
            new = set(kind.findall(sources)) - seen
            seen |= new
            todo += new
    return found


def computed_by(ptx: str, register: str) -> set[str]:
    """The instructions that a register is computed by."""
    return {name for name, _ in _behind(ptx, register, _REGISTER)}


def global_accesses(ptx: str) -> list[Access]:
    """Every access to global memory, with the parameters behind its address.

    A 64-bit register counts as computed from a parameter if any instruction that writes it reads one that
    is; what a load from memory returns does not.
    """
    found = []
    for match in _INSTRUCTION.finditer(ptx):
        name, operands = match[1], match[2]
        kind = name.split(".")[0]
        if kind not in ("ld", "ldu", "st", "atom", "red") or any(s in name for s in _OTHER_SPACES):
            continue
        register = _ADDRESS.search(operands)
        width, vector = _WIDTH.search(name), _VECTOR.search(name)
        if not register or not width:
            raise ValueError(f"not understood: {name} {operands}")
        size = int(width[1]) // 8 * int(vector[1] if vector else 1)
        parameters = frozenset(
            int(number)
            for writer, sources in _behind(ptx, register[1], _POINTER)
            if writer.startswith("ld.param")
            for number in re.findall(r"_param_(\d+)", sources)
        )
        found.append(Access(name, size, parameters, match.start(), register[1]))
    return found
