"""What a kernel body can do wrong, as the emulator reports it."""


class EmulatorError(Exception):
    """A kernel body does what the machine does not define. The traceback holds its line."""


class OutOfBounds(EmulatorError):
    """An index (or a source lane) outside its range."""


class MisalignedAccess(EmulatorError):
    """A 16-byte access whose index is no multiple of 4."""


class UninitialisedRead(EmulatorError):
    """A read of a cell that nothing has written."""


class UnwrittenOutput(EmulatorError):
    """A kernel ended without having written all of an output."""


class RaceError(EmulatorError):
    """Two threads touch a cell, one of them writing, with no barrier between."""


class ConflictingStores(RaceError):
    """Two threads store to one cell in one instruction; equal values count too."""


class DivergentBarrier(EmulatorError):
    """Some but not all threads of the CTA or warp reach a barrier, shuffle, ballot or match."""


class Undefined(EmulatorError):
    """A division by zero, a shift by 32 or more, a loop whose counter overflows, mixed types."""


class EscapedValue(EmulatorError):
    """A value is used outside the `if_` or the loop iteration that computed it."""
