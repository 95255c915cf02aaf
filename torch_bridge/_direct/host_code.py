"""Reads the host function that Mosaic compiles beside each kernel: how it is launched, and with what.

The function is straight-line LLVM: it loads the pointers of the custom call's buffers, encodes a TMA
descriptor for each array that the kernel copies by TMA (`mosaic_gpu_init_tma_desc`), and passes grid, block,
cluster, shared memory and parameters to Mosaic's runtime. It is followed here instruction by instruction,
with addresses as symbols. Whatever is not known is refused.

Imports nothing of ours: `compile_worker.py` loads this file by path, in a process that imports no torch.
"""

import re
from typing import Any, NamedTuple

# The parameter that holds a kernel's descriptors, all of them by value, 128 bytes each.
TENSOR_MAPS = "*tensor maps"
TENSOR_MAP_BYTES = 128

# Mosaic's code of an element type: (CUtensorMapDataType, bytes). `mosaic/gpu/launch_context.py` makes the
# code, jaxlib's runtime translates it. Types below a byte are not among them.
_ELEMENTS = {
    **{1: (0, 1), 2: (1, 2), 3: (2, 4), 4: (4, 8), 5: (6, 2), 6: (7, 4), 7: (9, 2)},
    **{9: (3, 4), 10: (5, 8)},
}
_SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # bytes: CUtensorMapSwizzle

_SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i8": 1}
_RUNTIME = ("mosaic_gpu_launch_kernel", "mosaic_gpu_build_kernel_spec")
_STEP = re.compile(r"(?:(%[\w.]+) = )?(\w+) (.*)")
_AGGREGATE = re.compile(r"(\{[^}]*\}|\[\d+ x \w+\]|\w+) (\S+)$")


class TensorMap(NamedTuple):
    """The arguments of one `cuTensorMapEncodeTiled`. Interleaving, promotion and filling are none.

    Attributes:
        buffer: the array that it describes, from its start on.
        dtype: CUtensorMapDataType.
        sizes: elements of each dimension, the innermost first.
        strides: bytes of a step in each dimension but the innermost.
        box: elements of a copy.
        swizzle: CUtensorMapSwizzle.
        rows: name of the launch's value that tells the size of dimension `axis`; "" for none.
        axis: see `rows`. 0, the innermost one: steps of the others are multiples of that size.
    """

    buffer: str
    dtype: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    rows: str = ""
    axis: int = 0

    def with_rows(self, name: str, shape: tuple[int, ...]) -> "TensorMap":
        """The same with as many rows as the launch's value `name` says. The buffer's shape is `shape`.

        Raises:
            ValueError: it is not plain which dimension counts the rows.
        """
        item = dict(_ELEMENTS.values())[self.dtype]
        pitch = item
        for length in shape[1:]:
            pitch *= length
        steps = (item, *self.strides)
        found = [
            axis
            for axis, (size, step) in enumerate(zip(self.sizes, steps, strict=True))
            if (size, step) == (shape[0], pitch)
        ]
        if len(found) != 1:
            raise ValueError(f"{len(found)} dimensions of {self} count the rows of {list(shape)}")
        return self._replace(rows=name, axis=found[0])

    def with_pitch(self, name: str, shape: tuple[int, ...]) -> "TensorMap":
        """The same with rows as long as the launch's value `name` says, one behind the other.

        Raises:
            ValueError: the descriptor is of another array than this shape's.
        """
        pitch = shape[-1] * dict(_ELEMENTS.values())[self.dtype]
        if self.sizes[0] != shape[-1] or any(step % pitch for step in self.strides):
            raise ValueError(f"{self} does not have the rows of {list(shape)}")
        return self._replace(rows=name, axis=0)


class Launch(NamedTuple):
    """What the host function hands to the runtime.

    Attributes:
        numbers: grid, cluster (0, 0, 0 for none) and block, three each, shared bytes, and what the release
            adds.
        parameters: for each parameter, the name of its buffer, or TENSOR_MAPS.
        tensor_maps: in the order in which they lie in that parameter.
    """

    numbers: tuple[int, ...]
    parameters: tuple[str, ...]
    tensor_maps: tuple[TensorMap, ...]


class _Address(NamedTuple):
    """`offset` bytes behind the start of something that has a name."""

    base: str
    offset: int


class _Function:
    """The state of the host function while it is followed."""

    def __init__(self, buffers: tuple[str, ...]):
        self._buffers = buffers
        self._values: dict[str, Any] = {}
        self._memory: dict[_Address, Any] = {}
        self._tables: set[str] = set()
        self._maps: dict[_Address, TensorMap] = {}
        self.launches: list[Launch] = []

    def step(self, line: str) -> None:
        found = _STEP.match(line)
        if found is None:
            raise ValueError(f"unknown host code: {line}")
        name, operation, rest = found.groups()
        handler = getattr(self, f"_{operation}", None)
        if handler is None:
            raise ValueError(f"unknown host code: {line}")
        result = handler(rest, name)
        if name is not None:
            self._values[name] = result

    def _value(self, text: str) -> Any:
        """Of a name or a constant; a name that nothing was assigned to is an argument."""
        text = text.strip()
        if text in ("undef", "poison"):
            return {}
        if text.startswith("%"):
            return self._values.setdefault(text, _Address(text, 0))
        return int(text)

    def _typed(self, text: str) -> Any:
        """Of `TYPE VALUE`."""
        found = _AGGREGATE.match(text.strip())
        if found is None:
            raise ValueError(f"unknown host code: {text}")
        return self._value(found[2])

    def _pointer(self, text: str) -> _Address:
        value = self._typed(text)
        if not isinstance(value, _Address):
            raise ValueError(f"no pointer: {text}")
        return value

    # -- instructions

    def _alloca(self, rest: str, name: str) -> _Address:
        return _Address(f"memory {name}", 0)

    def _load(self, rest: str, name: str) -> Any:
        kind, address = rest.split(", ptr ")
        at = self._value(address.split(",")[0])
        if at in self._memory:
            return self._memory[at]
        if kind != "ptr":  # all descriptors, as one value
            return at
        self._tables.add(at.base)
        return _Address(f"pointer {at.base} {at.offset}", 0)

    def _getelementptr(self, rest: str, name: str) -> _Address:
        kind, pointer, *indices = _split(re.sub(r"^(?:inbounds |nuw |nusw )+", "", rest))
        at, steps = self._pointer(pointer), [self._typed(index) for index in indices]
        if kind.startswith("{") and len(steps) == 2 and steps[0] == 0:
            # A struct of pointers, with the descriptors behind them.
            return at._replace(offset=at.offset + 8 * steps[1])
        if len(steps) != 1 or kind not in _SIZES:
            raise ValueError(f"unknown host code: {rest}")
        return at._replace(offset=at.offset + _SIZES[kind] * steps[0])

    def _store(self, rest: str, name: str) -> None:
        value, address = rest.rsplit(", ptr ", 1)
        self._memory[self._value(address.split(",")[0])] = self._typed(value)

    def _insertvalue(self, rest: str, name: str) -> dict:
        whole, value, *path = _split(rest)
        return {**self._typed(whole), tuple(map(int, path)): self._typed(value)}

    def _extractvalue(self, rest: str, name: str) -> Any:
        whole, *path = _split(rest)
        return self._typed(whole)[tuple(map(int, path))]

    def _mul(self, rest: str, name: str) -> int:
        a, b = map(self._value, rest.split(" ", 1)[1].split(","))
        return a * b

    def _add(self, rest: str, name: str) -> Any:
        a, b = map(self._value, rest.split(" ", 1)[1].split(","))
        if isinstance(b, _Address):
            a, b = b, a
        return a._replace(offset=a.offset + b) if isinstance(a, _Address) else a + b

    def _ptrtoint(self, rest: str, name: str) -> Any:
        return self._typed(rest.split(" to ")[0])

    _inttoptr = _ptrtoint

    def _ret(self, rest: str, name: str) -> None:
        del rest, name

    def _call(self, rest: str, name: str) -> int:
        found = re.match(r"\w+ @(\w+)\((.*)\)$", rest)
        if found is None:
            raise ValueError(f"unknown host code: {rest}")
        function, arguments = found[1], [self._typed(x) for x in found[2].split(",")]
        if function == "mosaic_gpu_init_tma_desc":
            self._describe(*arguments)
        elif function in _RUNTIME:
            self._launch(arguments)
        else:
            raise ValueError(f"unknown host code: a call of {function}")
        return 0

    # -- calls of the runtime

    def _words(self, at: _Address, count: int) -> list[int]:
        return [self._memory[at._replace(offset=at.offset + 8 * k)] for k in range(count)]

    def _describe(
        self,
        target: _Address,
        base: _Address,
        element: int,
        rank: int,
        sizes: _Address,
        strides: _Address,
        swizzle: int,
        box: _Address,
    ) -> None:
        buffer = self._buffer(base)
        if buffer is None or base.offset:
            raise ValueError(f"a descriptor is of {base}, which is no buffer of the call")
        if element not in _ELEMENTS or swizzle not in _SWIZZLES:
            raise ValueError(f"a descriptor has the unknown type {element} or swizzle {swizzle}")
        dtype, item = _ELEMENTS[element]
        *outer, inner = self._words(strides, rank)
        if inner != 1:
            raise ValueError(f"a descriptor's innermost stride is {inner}")
        self._maps[target] = TensorMap(
            buffer,
            dtype,
            tuple(reversed(self._words(sizes, rank))),
            tuple(item * stride for stride in reversed(outer)),
            tuple(reversed(self._words(box, rank))),
            _SWIZZLES[swizzle],
        )

    def _launch(self, arguments: list[Any]) -> None:
        numbers = tuple(x for x in arguments if isinstance(x, int))
        # jaxlib 0.12 puts the parameters' sizes behind them.
        table = arguments[-1 if self._holds_addresses(arguments[-1]) else -2]
        parameters: list[str] = []
        while (slot := self._memory.get(table._replace(offset=8 * len(parameters)))) is not None:
            parameters.append(self._parameter(slot))
        maps = sorted(self._maps.items())
        places = [at.offset for at, _ in maps]
        if len({at.base for at, _ in maps}) > 1 or places != [
            TENSOR_MAP_BYTES * k for k in range(len(maps))
        ]:
            raise ValueError(f"descriptors lie at unknown places: {places}")
        if parameters.count(TENSOR_MAPS) != bool(maps):
            raise ValueError("the descriptors are not passed as one parameter")
        self.launches.append(Launch(numbers, tuple(parameters), tuple(m for _, m in maps)))

    def _holds_addresses(self, at: Any) -> bool:
        return isinstance(self._memory.get(at), _Address)

    def _parameter(self, slot: Any) -> str:
        """What the parameter is whose value lies at `slot`."""
        value = self._memory.get(slot, slot)
        if value in self._maps:
            return TENSOR_MAPS
        buffer = self._buffer(value)
        if buffer is None:
            raise ValueError(f"a parameter is no buffer of the call: {value}")
        return buffer

    def _buffer(self, value: Any) -> str | None:
        """The name of the buffer whose pointer this is."""
        if not isinstance(value, _Address) or not value.base.startswith("pointer "):
            return None
        _, table, offset = value.base.split(" ")
        index = int(offset) // 8
        if index >= len(self._buffers) or table not in self._tables:
            return None
        return self._buffers[index]


def _split(rest: str) -> list[str]:
    """At the commas that are outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{]*\})(?![^\[]*\])", rest)]


def read(host_llvm: str, buffers: tuple[str, ...]) -> list[Launch]:
    """The launches of a host function.

    Args:
        host_llvm: its LLVM module; the first function counts.
        buffers: names of the custom call's buffers, in order.

    Raises:
        ValueError: it does not look as in the releases that were checked.
    """
    body = host_llvm[host_llvm.index("define ") :].split("\n}\n")[0]
    function = _Function(buffers)
    for line in body.splitlines()[1:]:
        if line.strip():
            function.step(line.strip())
    return function.launches
