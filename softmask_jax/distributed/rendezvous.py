"""Roll call before JAX starts: every host reports what it runs, and the first one answers all of them.

JAX ends a process from C++ with a page of addresses if a host is missing, and never notices different code. So hosts
first meet at the coordinator's address, still free then, and fail with one line that says what is wrong.

One JSON object per line over TCP: hello {process, processes, host, prints} -> {token} -> {seen} -> {error}."""
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
from softmask_jax.io.paths import to_path

MEETING = Path("hosts") / "meeting.json"
_PATIENCE = 5.0  # seconds per line of a connected host
_SHARE_SECONDS = 40.0  # seconds for which a network file system may show old listings
_LINE = 1 << 20


class Host(NamedTuple):
    process: int
    processes: int
    host: str  # name
    prints: dict[str, str]  # fingerprints that must agree

    def __str__(self):
        return f"{self.process} ({self.host})"


def split_address(address: str) -> tuple[str, int]:
    """host:port as a pair; ValueError for another form."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"The coordinator's address '{address}' is not of the form HOST:PORT.")
    return host.strip("[]"), int(port)


def answer(address: str, me: Host, *, seconds: float, folder: str | os.PathLike) -> None:
    """Return once all hosts have met at `address` (host:port, free on the first host) and agree.

    seconds: timeout for the others. folder: of the run, shared by all hosts. OSError if it is not writable.
    RuntimeError: one line, equal on all hosts that came, naming the missing host or what differs and where."""
    if me.process == 0:
        with contextlib.closing(_Leader(address, me, seconds)) as leader:
            error = leader.call(to_path(folder))
    else:
        error = _follow(address, me, seconds, to_path(folder))
    if error:
        raise RuntimeError(error)


def differences(hosts: Mapping[int, Host], most: int = 4) -> str:
    """Up to `most` differences: key, odd value with its hosts, commonest value; "" if none."""
    lines = []
    for key in sorted({key for host in hosts.values() for key in host.prints}):
        owners = collections.defaultdict(list)
        for _, host in sorted(hosts.items()):
            owners[host.prints.get(key, "absent")].append(host)
        (usual, (first, *more)), *others = sorted(owners.items(), key=lambda item: -len(item[1]))
        having = f"{first.process} and {len(more)} more" if more else first.process
        for value, odd in others:
            names = ", ".join(map(str, odd))
            lines.append(f"{key} is {_short(value)} on host {names}, {_short(usual)} on host {having}")
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return f"The hosts do not run the same: {'; '.join(lines[:most])}{more}." if lines else ""


class _Leader:
    """The first host's part."""

    def __init__(self, address: str, me: Host, seconds: float):
        self.me, self.address, self.seconds = me, address, seconds
        self.deadline = time.monotonic() + seconds
        self.hosts = {0: me}
        self.lines: dict[int, _Line] = {}
        self.refused: list[_Line] = []
        port = split_address(address)[1]
        options = dict(family=socket.AF_INET6, dualstack_ipv6=True) if socket.has_dualstack_ipv6() else {}
        try:
            self.server = socket.create_server(("", port), **options)
        except OSError as error:
            raise RuntimeError(f"Port {port} of this host, the coordinator's, cannot be used ({error.strerror}): "
                               "another run? Give --coordinator another port, the same on all hosts.") from error

    def close(self) -> None:
        for line in (*self.lines.values(), *self.refused):
            with contextlib.suppress(OSError, ValueError):
                # Let them close first: the closing side keeps the port for a while, and JAX needs it here.
                line.receive(_PATIENCE)
            line.connection.close()
        self.server.close()

    def call(self, folder: Path) -> str:
        error = self._gather() or differences(self.hosts) or self._share(folder)
        for line in (*self.lines.values(), *self.refused):
            with contextlib.suppress(OSError):
                line.send({"error": error})
        return error

    def _gather(self) -> str:
        while len(self.hosts) < self.me.processes:
            if (left := self.deadline - time.monotonic()) <= 0:
                return self._missing()
            self.server.settimeout(left)
            try:
                line = _Line(self.server.accept()[0])
            except TimeoutError:
                continue
            try:
                hello = line.receive(_PATIENCE)
                host = Host(*(hello[field] for field in Host._fields))
            except (OSError, ValueError, KeyError):  # a port scanner, a health check
                line.connection.close()
                continue
            if error := self._admit(host, line):
                return error
        return ""

    def _admit(self, host: Host, line: "_Line") -> str:
        before = self.lines.get(host.process)
        if host.process == 0 or (before is not None and before.is_open()):
            self.refused.append(line)
            other = self.hosts[host.process].host
            return f"Two processes, on {other} and {host.host}, say that they are host {host.process}."
        self.lines[host.process], self.hosts[host.process] = line, host  # hosts may reconnect
        if host.processes == self.me.processes and 0 <= host.process < host.processes:
            return ""
        return (f"Host {host} was told that there are {host.processes} processes, host {self.me} that there are "
                f"{self.me.processes}.")

    def _missing(self) -> str:
        missing = ", ".join(str(process) for process in range(self.me.processes) if process not in self.hosts)
        there = ", ".join(str(host) for _, host in sorted(self.hosts.items()))
        return (f"Of {self.me.processes} hosts {missing} did not come to {self.address} within {self.seconds:g} s; "
                f"there: {there}. Does the same command run on every host, and may they reach that address?")

    def _share(self, folder: Path) -> str:
        token, blind = uuid.uuid4().hex, []
        try:
            (folder / MEETING).parent.mkdir(parents=True, exist_ok=True)
            write_json(folder / MEETING, {"token": token})
        except OSError as error:
            return f"Host {self.me}: {error}"
        for line in self.lines.values():
            with contextlib.suppress(OSError):
                line.send({"token": token})
        for process, line in self.lines.items():
            host = self.hosts[process]
            try:
                if not line.receive(_SHARE_SECONDS + _PATIENCE)["seen"]:
                    blind.append(str(host))
            except (OSError, ValueError, KeyError):
                return f"Host {host} left during the start."
        text = f"Host {', '.join(blind)} does not see what host 0 wrote in {folder}: hosts must share --workdir."
        return text if blind else ""


def _follow(address: str, me: Host, seconds: float, folder: Path) -> str:
    where, deadline, reason = split_address(address), time.monotonic() + seconds, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = _Line(socket.create_connection(where, timeout=min(left, _PATIENCE)))
        except OSError as error:  # the first host is not up or not resolvable yet
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
            # Perhaps the previous attempt's coordinator, about to end.
            reason = "what listens there is no run that starts"
            time.sleep(min(0.3, left))
        finally:
            line.connection.close()
    return (f"Host {me.process}: no answer from host 0 at {address} within {seconds:g} s ({reason}). Does the same "
            "command run there, and is the address right?")


def _sees(folder: Path, token: str) -> bool:
    deadline = time.monotonic() + _SHARE_SECONDS
    while True:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads((folder / MEETING).read_text("utf-8"))["token"] == token:
                return True
        # A missing folder is not shared; a missing file may be an old listing of a network file system.
        if time.monotonic() > deadline or not (folder / MEETING).parent.is_dir():
            return False
        time.sleep(0.2)


class _Line:
    """JSON objects, one per line, over a socket."""

    def __init__(self, connection: socket.socket):
        self.connection, self.rest = connection, b""

    def send(self, value: dict) -> None:
        self.connection.settimeout(_PATIENCE)
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, seconds: float) -> dict:
        """OSError if the other side is silent or gone, ValueError for anything but a JSON object."""
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


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}..."
