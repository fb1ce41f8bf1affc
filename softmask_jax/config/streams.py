"""Standard streams that never end a command: closed, without a reader, on a full device, in a narrow encoding."""
import codecs
import contextlib
import io
import json
import os
import select
import sys

_ESCAPE = "softmask_jax.escape"


class Tolerant(io.FileIO):
    """Descriptor that drops what cannot be written. lost: the error of the first such write."""

    lost: OSError | None = None

    def write(self, data) -> int:
        try:
            while (count := super().write(data)) is None:  # nonblocking, as another program of the terminal may make it
                select.select([], [self], [])
            return count
        except OSError as error:
            self.lost = self.lost or error
            return len(data)


def secure() -> None:
    """Make the process's standard streams tolerant, unless something has replaced them: a closed descriptor becomes the
    null device (else the next opened file would get its number), unencodable characters are escaped."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is this one
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    codecs.register_error(_ESCAPE, _escaped)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _tolerant(descriptor, "utf-8", descriptor == 2))
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, _tolerant(descriptor, stream.encoding, stream.line_buffering or stream.write_through))


def _tolerant(descriptor: int, encoding: str, line_buffering: bool) -> io.TextIOWrapper:
    raw = Tolerant(descriptor, "w", closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, _ESCAPE, line_buffering=line_buffering)


def _escaped(error: UnicodeEncodeError) -> tuple[str | bytes, int]:
    character, end = error.object[error.start], error.start + 1
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that the locale could not decode
        return character.encode("ascii", "surrogateescape"), end
    return json.dumps(character)[1:-1], end


def lost() -> OSError | None:
    """Error by which standard output was dropped; None if nothing was, or if its reader has closed the pipe."""
    sys.stdout.flush()
    error = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    return None if isinstance(error, BrokenPipeError) else error
