"""What can be read from a kernel's PTX, and from what ptxas says of it."""

import functools
import re
from collections.abc import Iterator
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


def global_accesses(ptx: str) -> list[Access]:
    """Every access to global memory, with the parameters behind its address.

    A 64-bit register counts as computed from a parameter if any instruction that writes it reads one that
    is; what a load from memory returns does not.
    """
    instructions = [(m[1], m[2], m.start()) for m in _INSTRUCTION.finditer(ptx)]
    origin: dict[str, frozenset[int]] = {}
    changed = True
    while changed:
        changed = False
        for name, operands, _ in instructions:
            target, _, sources = operands.partition(",")
            if not _POINTER.fullmatch(target.strip()):
                continue
            found = origin.get(target.strip(), frozenset())
            if name.startswith("ld.param"):
                found |= {int(k) for k in re.findall(r"_param_(\d+)", sources)}
            elif not name.startswith(("ld.", "atom.")):
                found = found.union(*(origin.get(r, ()) for r in _POINTER.findall(sources)))
            if found != origin.get(target.strip(), frozenset()):
                origin[target.strip()], changed = found, True
    return list(_accesses(instructions, origin))


def _accesses(
    instructions: list[tuple[str, str, int]], origin: dict[str, frozenset[int]]
) -> Iterator[Access]:
    for name, operands, position in instructions:
        kind = name.split(".")[0]
        if kind not in ("ld", "ldu", "st", "atom", "red") or any(s in name for s in _OTHER_SPACES):
            continue
        register = _ADDRESS.search(operands)
        width, vector = _WIDTH.search(name), _VECTOR.search(name)
        if not register or not width:
            raise ValueError(f"not understood: {name} {operands}")
        size = int(width[1]) // 8 * int(vector[1] if vector else 1)
        parameters = origin.get(register[1], frozenset())
        yield Access(name, size, parameters, position, register[1])


@functools.lru_cache(maxsize=1)
def _writers(ptx: str) -> dict[str, list[tuple[str, list[str]]]]:
    """For each register the instructions that write it, and the registers that they read."""
    writers: dict[str, list[tuple[str, list[str]]]] = {}
    for match in _INSTRUCTION.finditer(ptx):
        target, _, sources = match[2].partition(",")
        writers.setdefault(target.strip(), []).append((match[1], _REGISTER.findall(sources)))
    return writers


def computed_by(ptx: str, register: str) -> set[str]:
    """The instructions that a register is computed by, back to what was loaded or is given."""
    writers, found, seen, todo = _writers(ptx), set(), {register}, [register]
    while todo:
        for name, sources in writers.get(todo.pop(), ()):
            found.add(name)
            new = set(sources) - seen if not name.startswith(("ld.", "atom.")) else set()
            seen |= new
            todo += new
    return found
