"""Programs that try to get out of the sandbox, or to take more than is theirs, or to pass without being right.

Each sets `reached` to what it got hold of; its test passes if it reached something. NAMES are replaced: CANARY is a file
outside, SOCKET a socket that listens outside, PARENT the number of the process that runs the tests.
"""
TESTS = "assert reached, 'it got nowhere'"
NOWHERE = "AssertionError: it got nowhere"
# Helpers of all: `tried(f, ...)` is whether a call succeeded.
HEAD = '''
import contextlib, ctypes, mmap, os, socket, sys, threading, time
reached = []
def tried(call, *arguments):
    try:
        value = call(*arguments)
    except (OSError, MemoryError, RuntimeError, ValueError):
        return False
    return True
def refused_number(*call):
    return ctypes.CDLL(None, use_errno=True).syscall(*call) < 0
'''

# name: (program, what it ends with). A kind alone, or with the detail after a colon; several are separated by |.
PROGRAMS = {
    "a fork bomb": ("""
def bomb():
    while True:
        if os.fork():
            reached.append("a process")
for call in (bomb, os.forkpty):
    tried(call)
""", NOWHERE),
    "processes by system calls that the library hides": ("""
for number in (57, 58, 435) if os.uname().machine == "x86_64" else (435,):
    if not refused_number(number, 0, 0, 0, 0, 0):
        reached.append(number)
if not refused_number(56 if os.uname().machine == "x86_64" else 220, 17, 0, 0, 0, 0):
    reached.append("clone")
""", NOWHERE),
    "a shell": ("""
import subprocess
for command in (["/bin/sh", "-c", "true"], [sys.executable or "python", "-c", "pass"]):
    if tried(subprocess.run, command) or tried(os.posix_spawn, command[0], command, {}):
        reached.append(command)
""", NOWHERE),
    "threads without end": ("""
threads = []
def start():
    while len(threads) < 1000:
        threads.append(threading.Thread(target=time.sleep, args=(9,), daemon=True))
        threads[-1].start()
threading.stack_size(1 << 16)
if tried(start) or len(threads) > 70:
    reached.append(len(threads))
""", NOWHERE),
    "an endless loop": ("while True: pass", "timed out"),
    "an endless loop within one call of C": ("import itertools\nsum(itertools.repeat(0))", "timed out"),
    "sleep": ("time.sleep(3600)", "timed out"),
    "signals that are ignored, and handlers of them": ("""
import signal
for number in signal.valid_signals():
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_IGN if number % 2 else lambda *_: None)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True: pass
""", "timed out"),
    "an exit that hangs": ("""
import atexit
atexit.register(time.sleep, 3600)
threading.Thread(target=time.sleep, args=(3600,)).start()
sys.exit(0)
""", "timed out"),
    "much memory": ("""
held = []
def take():
    for _ in range(40):
        held.append(bytearray(16 << 20))
if tried(take):
    reached.append(len(held))
held.clear()
""", NOWHERE),
    "memory in files that no folder has": ("""
def shared(): os.ftruncate(os.memfd_create("x"), 1 << 30)
for call in (shared, lambda: mmap.mmap(-1, 1 << 30)):
    if tried(call): reached.append(call)
for number in (29, 64, 68) if os.uname().machine == "x86_64" else (194, 190, 186):
    if not refused_number(number, 0, 1 << 20, 0o1600): reached.append(number)
""", NOWHERE),
    "memory in buffers of sockets": ("""
held, sent = [], 0
def take():
    global sent
    while True:
        held.extend(socket.socketpair())
        with contextlib.suppress(OSError): held[-1].setsockopt(1, socket.SO_SNDBUF, 1 << 30)
        held[-1].setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True: sent += held[-1].send(bytes(1 << 16))
if tried(take) or sent > 64 << 20: reached.append(sent)
""", NOWHERE),
    "a number that does not fit": ("x = 1 << (1 << 40)", "failed:MemoryError"),
    "a full disk": ("""
def fill():
    for number in range(100):
        with open(f"{number}", "wb") as file:
            file.write(bytes(1 << 20))
if tried(fill): reached.append("100 MiB")
""", NOWHERE),
    "very many files": ("""
def fill():
    for number in range(5000): open(f"{number}", "w").close()
if tried(fill): reached.append("files")
""", NOWHERE),
    "a huge file of holes": ("""
if tried(os.truncate, os.open("file", os.O_CREAT | os.O_RDWR) and "file", 1 << 40): reached.append("holes")
""", NOWHERE),
    "very many open files": ("""
held = []
def fill():
    for _ in range(1000): held.append(os.dup(0))
if tried(fill): reached.append(len(held))
for file in held: os.close(file)
""", NOWHERE),
    "writing outside": ("""
for folder in ("/", "/usr", "/usr/lib", "/etc", "/dev", "/home", "/root", "/var/tmp", sys.prefix + "/lib"):
    if tried(open, folder + "/written", "w"): reached.append(folder)
for call in (os.unlink, lambda path: open(path, "a"), lambda path: os.symlink(path, "link") or open("link", "a")):
    if tried(call, CANARY): reached.append("the canary")
""", NOWHERE),
    "writing into the interpreter": ("""
for path in (os.__file__, threading.__file__, "/usr/lib", sys.executable or "/"):
    if tried(os.chmod, path, 0o777) or tried(open, path, "r+") or tried(os.utime, path): reached.append(path)
""", NOWHERE),
    "reading a file outside": ("""
if tried(open, CANARY): reached.append(open(CANARY).read())
""", NOWHERE),
    "a way up and out": ("""
def up():
    for _ in range(50): os.chdir("..")
    reached.extend(set(os.listdir(".")) & {"proc", "sys", "boot", "home", "var", "old"})
up()
for path in ("/proc/1/root", "/proc/self/root", "/proc/self/fd", "/old", "/scratch/../old"):
    if tried(os.listdir, path): reached.append(path)
for file in range(3, 300):
    if tried(os.fchdir, file) or tried(os.fstat, file) and file > 3: reached.append(file)
""", NOWHERE),
    "reading the environment": ("""
for place in (os.environ.values(), ["x"] if tried(os.listdir, "/proc") else []):
    reached.extend(value for value in place if "SECRET" in value or value == "x")
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
if libc.getenv(b"HOSTILE_TEST"): reached.append("C")
""", NOWHERE),
    "a connection to the internet": ("""
kinds = [(family, kind) for family in (2, 10, 16, 17, 40, 44) for kind in (1, 2, 3)]
reached.extend(pair for pair in kinds if tried(socket.socket, *pair))
if tried(socket.create_connection, ("1.1.1.1", 53)): reached.append("TCP")
""", NOWHERE),
    "a connection to a server of the same machine": ("""
for address in (SOCKET, "\\0" + SOCKET):
    if tried(socket.socket(socket.AF_UNIX).connect, address): reached.append(address)
for port in (22, 80, 8080):
    if tried(socket.create_connection, ("127.0.0.1", port)): reached.append(port)
""", NOWHERE),
    "killing the process that started it": ("""
import signal
for number in (os.getppid(), 1, PARENT, -1, 0x7FFFFFFF):
    for what in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        if number not in (0, 1): tried(os.kill, number, what)
        else: tried(os.kill, 1, what)
if tried(os.kill, PARENT, 0): reached.append("the parent")
""", NOWHERE),
    "finding other processes": ("""
reached.extend(number for number in range(3, 5000) if number != os.getpid() and tried(os.kill, number, 0))
for number in (101, 310, 434) if os.uname().machine == "x86_64" else (117, 270, 434):
    if not refused_number(number, 16, 1, 0, 0, 0, 0): reached.append(number)
""", NOWHERE),
    "more rights": ("""
calls = [(os.setuid, 0), (os.setgid, 0), (os.setgroups, [0]), (os.chroot, "/scratch"), (os.mknod, "device", 0o60600, 0x800)]
reached.extend(call for call in calls if tried(*call))
libc = ctypes.CDLL(None)
if not libc.unshare(0x10000000) or not libc.mount(b"none", b"/scratch", b"tmpfs", 0, None) or not libc.umount(b"/scratch"):
    reached.append("a namespace")
if libc.prctl(38, 0, 0, 0, 0) == 0: reached.append("new privileges")
""", NOWHERE),
    "wider limits": ("""
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    if tried(resource.setrlimit, kind, (hard + 1, hard + 1)) or hard < 0: reached.append(name)
""", NOWHERE),
    "the machine's devices": ("""
names = ("mem", "kmsg", "kvm", "fuse", "sda", "vda", "nvidia0", "shm", "pts", "tty", "ptmx", "console", "accel0", "vsock")
reached.extend(name for name in names if tried(os.stat, "/dev/" + name))
""", NOWHERE),
    "changing the machine": ("""
if tried(socket.sethostname, "x") or tried(time.clock_settime, time.CLOCK_REALTIME, 0): reached.append("a name or time")
if tried(os.nice, -5) or tried(os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(50)): reached.append("priority")
""", NOWHERE),
    "deep recursion": ("""
sys.setrecursionlimit(10**9)
def f(): return f() + 1
f()
""", "failed:MemoryError|killed:SIGSEGV|timed out"),
    "deep recursion in C": ("""
sys.setrecursionlimit(10**9)
x = []
for _ in range(10**5): x = [x]
x == x.copy(); repr(x)
""", "failed:RecursionError|killed:SIGSEGV|failed:MemoryError"),
    "an address that is not its own": ("ctypes.string_at(8)", "killed:SIGSEGV"),
    "a core file": ("os.abort()", "killed:SIGABRT"),
    "a flood of output": ("""
while True: sys.stdout.write("x" * 65536)
""", "too much output"),
    "a flood into every open file": ("""
while True:
    for file in range(1, 64):
        with contextlib.suppress(OSError): os.write(file, b"passed\\n" * 1000)
""", "too much output"),
    "a flood of errors": ("raise ValueError('x' * (20 << 20))", "too much output|failed:ValueError|failed:xxxx"),
    "a program that is nothing but depth": ("(" * 90 + ")" * 90 + "\n" + "-" * 50000 + "1", "failed"),
    "a program of no text": ("\0", "failed:"),
}

# Programs that would pass though their tests do not.
CHEATS = {
    "an early exit": "os._exit(0)",
    "a polite early exit": "sys.exit(0)",
    "an exit by exception": "raise SystemExit(0)",
    "an exit of a thread": "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
    "another program in its place": "import glob; os.execv(sys.executable or sys.orig_argv[0], ['python', '-c', ''])",
    "the words of a pass": "print('passed'); print('started'); os.write(3, b'started\\npassed\\n'); os._exit(0)",
    "words to every file": """
for file in range(64):
    tried(os.write, file, b"passed\\n")
os._exit(0)
""",
    "other builtins": """
import builtins
builtins.AssertionError = builtins.exec = builtins.compile = lambda *_, **__: None
os.write = os._exit = lambda *_: None
for name in list(sys.modules): sys.modules[name] = None
""",
    "tests inside its last text": 'x = """',
    "tests after its last condition": "if False:\n    pass\n    #",
    "an exit hook": "import atexit; atexit.register(os.write, 3, b'passed')",
    "an exception hook": "sys.excepthook = lambda *_: os._exit(0)",
    "a trace of its tests": "sys.settrace(lambda *_: None); sys.setprofile(lambda frame, *_: None)",
    "the word, read again": "os.lseek(0, 0, 0); data = os.read(0, 10**6); os.write(3, data); os._exit(0)",
}

# Looks for the secret word, where that is "f00d" over and over, and says it.
SEARCH = """
import gc, re
seen, found, waiting = set(), set(), [sys.modules, gc.get_objects()]
frame = sys._getframe()
while frame:
    waiting += [frame.f_locals, frame.f_globals, frame.f_code, frame]
    frame = frame.f_back
waiting += list(sys._current_frames().values()) + gc.get_referrers(os._exit) + gc.get_referrers(vars(sys.modules["program"]))
while waiting:
    one = waiting.pop()
    if id(one) in seen: continue
    seen.add(id(one))
    if isinstance(one, (str, bytes)):
        found |= set(re.findall(rb"(?:f0+d){16}", one.encode("utf-8", "replace") if isinstance(one, str) else one))
    else:
        waiting += gc.get_referents(one)
for word in found: os.write(3, word)
os._exit(0)
"""
