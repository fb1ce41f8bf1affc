"""The roll call before JAX starts: every host says who it is and what it runs, the first one answers all of them.

JAX itself ends a process from C++, with a page of addresses, when a host does not come or another one dies, and never
notices that two hosts run different code. So the hosts meet first at the coordinator's address, which is free until
then, and each leaves with one line that says what is wrong, or with none.

One JSON object a line over TCP: hello {process, processes, host, prints} -> {token} -> {seen} -> {error}.
"""
import collections
import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from softmask_jax.io.files import write_json

MEETING = Path("hosts") / "meeting.json"
_PATIENCE = 5.0  # seconds for one line of a host that is there
_SHARE_SECONDS = 40.0  # what a network file system may keep of a folder that it has looked into before
_LINE = 1 << 20


class Host(NamedTuple):
    """process: index of this host among `processes`; host: its name; prints: what must be the same on all hosts."""

    process: int
    processes: int
    host: str
    prints: dict[str, str]


def split_address(address: str) -> tuple[str, int]:
    """host:port as a pair; ValueError for another form."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"The coordinator's address '{address}' is not of the form HOST:PORT.")
    return host.strip("[]"), int(port)


def answer(address: str, me: Host, *, seconds: float, folder: str | os.PathLike) -> None:
    """Return when all hosts are there and fit together.

    Args:
      address: host:port of the first host; free on it.
      seconds: how long the others may take to come.
      folder: of the run, which all hosts must share.

    Raises:
      RuntimeError: one line, the same on all hosts that are there: who did not come, or what differs and where.
      OSError: the folder cannot be written.
    """
    if me.process == 0:
        with contextlib.closing(_Leader(address, me, seconds)) as leader:
            error = leader.call(Path(folder))
    else:
        error = _follow(address, me, seconds, Path(folder))
    if error:
        raise RuntimeError(error)


def differences(prints: Mapping[int, Mapping[str, str]], names: Mapping[int, str], most: int = 4) -> str:
    """What differs between hosts, in words: "" or the key, the odd value with its hosts, and what the most have."""
    found = []
    for key in sorted({key for entry in prints.values() for key in entry}):
        values = {process: entry.get(key, "absent") for process, entry in sorted(prints.items())}
        (usual, _), *others = collections.Counter(values.values()).most_common()
        for value, _ in others:
            hosts = ", ".join(f"{process} ({names[process]})" for process in values if values[process] == value)
            found.append(f"{key} is {_short(value)} on host {hosts}, {_short(usual)} on host {_having(values, usual)}")
    if not found:
        return ""
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return f"The hosts do not run the same: {'; '.join(found[:most])}{more}."


class _Leader:
    """The first host's part."""

    def __init__(self, address: str, me: Host, seconds: float):
        self.me, self.address, self.seconds = me, address, seconds
        self.deadline = time.monotonic() + seconds
        self.lines: dict[int, _Line] = {}
        self.refused: list[_Line] = []
        self.hellos: dict[int, dict] = {0: me._asdict()}
        port = split_address(address)[1]
        try:
            if socket.has_dualstack_ipv6():
                self.server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            else:
                self.server = socket.create_server(("", port))
        except OSError as error:
            raise RuntimeError(
                f"Port {port} of this host, the coordinator's, cannot be used ({error.strerror}): another run? Give "
                "--coordinator another port, the same on all hosts."
            ) from error

    def close(self) -> None:
        for line in (*self.lines.values(), *self.refused):
            with contextlib.suppress(OSError, ValueError):
                # They close first: what closes first keeps the port for a while, and JAX needs it here.
                line.receive(_PATIENCE)
            line.close()
        self.server.close()

    def call(self, folder: Path) -> str:
        error = self._gather() or self._compare() or self._share(folder)
        for line in (*self.lines.values(), *self.refused):
            with contextlib.suppress(OSError):
                line.send({"error": error})
        return error

    def _gather(self) -> str:
        while len(self.hellos) < self.me.processes:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return self._missing()
            self.server.settimeout(left)
            try:
                line = _Line(self.server.accept()[0])
            except TimeoutError:
                continue
            try:
                hello = line.receive(_PATIENCE)
                process, processes, host = hello["process"], hello["processes"], hello["host"]
            except (OSError, ValueError, KeyError):  # not one of ours: a port scanner, a health check
                line.close()
                continue
            before = self.lines.get(process)
            if process == 0 or (before is not None and before.is_open()):
                self.refused.append(line)
                other = self.hellos[process]["host"]
                return f"Two processes, on {other} and {host}, say that they are host {process}."
            self.lines[process], self.hellos[process] = line, hello  # one that left may come again
            if processes != self.me.processes or not 0 <= process < processes:
                return (
                    f"Host {process} ({host}) was told that there are {processes} processes, host 0 ({self.me.host}) "
                    f"that there are {self.me.processes}."
                )
        return ""

    def _missing(self) -> str:
        missing = ", ".join(str(i) for i in range(self.me.processes) if i not in self.hellos)
        there = ", ".join(f"{process} ({hello['host']})" for process, hello in sorted(self.hellos.items()))
        return (
            f"Of {self.me.processes} hosts {missing} did not come to {self.address} within {self.seconds:g} s; there: "
            f"{there}. Does the same command run on every host, and may they reach that address?"
        )

    def _compare(self) -> str:
        names = {process: hello["host"] for process, hello in self.hellos.items()}
        return differences({process: hello["prints"] for process, hello in self.hellos.items()}, names)

    def _share(self, folder: Path) -> str:
        token, blind = uuid.uuid4().hex, []
        try:
            (folder / MEETING).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / MEETING, {"token": token})
        except OSError as error:
            return f"Host 0 ({self.me.host}): {error}"
        for line in self.lines.values():
            with contextlib.suppress(OSError):
                line.send({"token": token})
        for process, line in self.lines.items():
            name = f"{process} ({self.hellos[process]['host']})"
            try:
                if not line.receive(_SHARE_SECONDS + _PATIENCE)["seen"]:
                    blind.append(name)
            except (OSError, ValueError, KeyError):
                return f"Host {name} left during the start."
        if blind:
            return f"Host {', '.join(blind)} does not see what host 0 wrote in {folder}: hosts must share --workdir."
        return ""


def _follow(address: str, me: Host, seconds: float, folder: Path) -> str:
    where, deadline, reason = split_address(address), time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = _Line(socket.create_connection(where, timeout=min(left, _PATIENCE)))
        except OSError as error:  # the first host is not up yet, its name not known yet
            reason = error.strerror or str(error)
            time.sleep(min(0.3, left))
            continue
        try:
            line.send(me._asdict())
            reply = line.receive(left + _PATIENCE)
            if "token" in reply:
                line.send({"seen": _sees(folder, reply["token"])})
                reply = line.receive(_SHARE_SECONDS + 2 * _PATIENCE)
            return reply["error"]
        except TimeoutError:
            reason = "it waits for other hosts"
        except (OSError, ValueError, KeyError):
            # Perhaps the coordinator of the attempt before, which is about to end.
            reason = "what listens there is no run that starts"
            time.sleep(min(0.3, left))
        finally:
            line.close()
    return (
        f"Host {me.process}: no answer from host 0 at {address} within {seconds:g} s ({reason}). Does the same command "
        "run there, and is the address right?"
    )


def _sees(folder: Path, token: str) -> bool:
    deadline = time.monotonic() + _SHARE_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((folder / MEETING).read_text("utf-8"))["token"] == token:
                return True
        # A folder that is not there at all is not shared; one without the new file may be a network file system's late
        # news.
        if time.monotonic() > deadline or not (folder / MEETING).parent.is_dir():
            return False
        time.sleep(0.2)


class _Line:
    """JSON objects, one a line, over a socket."""

    def __init__(self, connection: socket.socket):
        self.connection, self.rest = connection, b""

    def send(self, value: dict) -> None:
        self.connection.settimeout(_PATIENCE)
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, seconds: float) -> dict:
        """Raises OSError where the other side is silent or gone, ValueError where it speaks otherwise."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self.rest:
            self.connection.settimeout(max(deadline - time.monotonic(), 0.001))
            more = self.connection.recv(1 << 16)
            if not more:
                raise ConnectionError("closed")
            self.rest += more
            if len(self.rest) > _LINE:
                raise ValueError("no line")
        line, _, self.rest = self.rest.partition(b"\n")
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value

    def is_open(self) -> bool:
        self.connection.settimeout(0)
        try:
            return bool(self.connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self.connection.close()


def _having(values: Mapping[int, str], usual: str) -> str:
    have = [process for process, value in values.items() if value == usual]
    return str(have[0]) if len(have) == 1 else f"{have[0]} and {len(have) - 1} more"


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."
