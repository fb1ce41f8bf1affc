"""Enter the sandbox, or only set limits, and become the interpreter that runs one program: `enter.py SPEC`.

It starts anew for every program, so it imports little. SPEC: `running._spec`, marshalled, in hex. A failure writes
"error: ..." to the report file. Three processes, each killed with its parent: this one, PID 1 of the namespaces, whose
end kills all in them, and the program."""
import ctypes
import marshal
import os
import resource
import select
import signal
import sys

NEW_MOUNT, NEW_CGROUP, NEW_UTS, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USER, NEW_PID, NEW_NET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SETUID, NO_DEVICES, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DEATH_SIGNAL, NO_NEW_PRIVILEGES, SECCOMP, FILTER = 1, 38, 22, 2
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, CURRENT_FOLDER, WHOLE_TREE, DETACH = 442, -100, 0x8000, 2
# The program's user inside; outside, if root starts it, nobody: the limit on threads does not hold for root.
USER, NOBODY = 1, 65534
REPORT = 3

libc = ctypes.CDLL(None, use_errno=True)


def called(name: str, *arguments) -> int:
    """Call a function of the C library. OSError with its name if it fails."""
    value = getattr(libc, name)(*(part.encode() if isinstance(part, str) else part for part in arguments))
    if value < 0:
        number = ctypes.get_errno()
        shown = " ".join([name, *(part for part in arguments if isinstance(part, str))])
        raise OSError(number, f"{shown}: {os.strerror(number)}")
    return value


def die_with_parent() -> None:
    called("prctl", DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def enter_namespaces() -> None:
    """Enter every kind of namespace, as root of the user namespace; the next child is the first process in them."""
    me, root = os.getpid(), os.geteuid() == 0
    maps = {"uid_map": os.geteuid(), "gid_map": os.getegid()}
    ready, go = os.pipe()
    # Only a process outside can map another user.
    helper = os.fork() if root else 0
    if root and not helper:
        os.close(go)
        os.read(ready, 1)
        try:
            for name in maps:
                write(f"/proc/{me}/{name}", f"0 0 1\n{USER} {NOBODY} 1\n")
        except OSError:
            os._exit(1)
        os._exit(0)
    called("unshare", NEW_USER | NEW_MOUNT | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP)
    os.close(go)
    os.close(ready)
    if not root:
        write("/proc/self/setgroups", "deny")
        for name, own in maps.items():
            write(f"/proc/self/{name}", f"{USER} {own} 1\n")
    elif os.waitpid(helper, 0)[1]:
        raise OSError("the user namespace's map was refused")


def build_root(spec: dict) -> None:
    """Make an almost empty file system the only one: read-only binds, and /scratch in memory."""
    called("mount", "none", "/", None, RECURSIVE | PRIVATE, None)
    called("mount", "tmpfs", "/tmp", "tmpfs", NO_SETUID | NO_DEVICES, "size=1m,mode=755")
    os.mkdir("/tmp/old")
    called("syscall", PIVOT_ROOT[os.uname().machine], "/tmp", "/tmp/old")
    os.chdir("/")
    for source, target in spec["binds"]:
        bind(source, target, locked=True)
    for name in ("null", "zero", "random", "urandom"):
        bind(f"/dev/{name}", f"/dev/{name}", locked=False)
    os.mkdir("/scratch")
    options = f"size={spec['disk']}m,nr_inodes=1k,mode=1777"
    called("mount", "tmpfs", "/scratch", "tmpfs", NO_SETUID | NO_DEVICES, options)
    if not os.path.lexists("/tmp"):
        os.symlink("/scratch", "/tmp")
    called("umount2", "/old", DETACH)
    os.rmdir("/old")
    called("mount", "none", "/", None, REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES, None)


def bind(source: str, target: str, locked: bool) -> None:
    """Bind the old root's `source` to `target`; locked: read-only, with all mounts in it."""
    old = "/old" + source
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    if os.path.isdir(old):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    called("mount", old, target, None, BIND | RECURSIVE, None)
    if locked:
        attributes = (ctypes.c_uint64 * 4)(READ_ONLY | NO_SETUID | NO_DEVICES, 0, 0, 0)
        called("syscall", MOUNT_SETATTR, CURRENT_FOLDER, target, WHOLE_TREE, attributes, ctypes.sizeof(attributes))


def set_limits(limits: dict) -> None:
    """Set limits by name, none above its present hard limit."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def set_filter(text: str) -> None:
    """Refuse system calls by a filter in hexadecimal digits, and new privileges, for good."""
    lines = bytes.fromhex(text)
    code = ctypes.create_string_buffer(lines, len(lines))

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("lines", ctypes.c_void_p)]

    called("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    filters = Filter(len(lines) // 8, ctypes.cast(code, ctypes.c_void_p))
    called("prctl", SECCOMP, FILTER, ctypes.byref(filters), 0, 0)


def become_program(spec: dict) -> None:
    os.set_inheritable(REPORT, True)
    os.closerange(REPORT + 1, 1 << 16)
    if spec["isolated"] and os.getuid() != USER:
        os.setgroups([])
        os.setresgid(USER, USER, USER)
        os.setresuid(USER, USER, USER)
    os.chdir(spec["work"])
    os.umask(0o022)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    set_limits(spec["limits"])
    try:
        set_filter(spec["filter"])
    except OSError:
        # Without a sandbox the filter is optional.
        if spec["isolated"]:
            raise
    os.execve(spec["python"], ["python", *spec["arguments"]], spec["environment"])


def exit_like(pid: int) -> None:
    """Wait for a child and exit with its status, or 128 + the signal that killed it."""
    # The pipes should close when the program ends.
    os.closerange(0, REPORT + 1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def first_process(spec: dict, alive: int) -> None:
    """First process in the namespaces. alive: a pipe that ends with the process outside."""
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)
    build_root(spec)
    program = os.fork()
    if not program:
        become_program(spec)
    exit_like(program)


def main(spec: dict) -> None:
    die_with_parent()
    if os.getppid() != spec["parent"]:
        return
    if spec["report"] != REPORT:
        os.dup2(spec["report"], REPORT)
        os.close(spec["report"])
    # The first victim of the OOM killer.
    write("/proc/self/oom_score_adj", "1000")
    if not spec["isolated"]:
        become_program(spec)
    enter_namespaces()
    alive, held = os.pipe()
    first = os.fork()
    if not first:
        os.close(held)
        first_process(spec, alive)
    exit_like(first)


if __name__ == "__main__":
    try:
        main(marshal.loads(bytes.fromhex(sys.argv[1])))
    except BaseException as error:
        os.write(REPORT, f"error: {error}".encode())
        os._exit(1)
