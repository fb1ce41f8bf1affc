"""Seccomp filter of the system calls that a program in the sandbox may not make.

Refused: making processes (not threads); network (namespaces don't cover vsock); memory that no limit counts (shared
segments, memory files, message queues, socket buffers); looking into other processes; often attacked parts of the
kernel that no solution needs. Numbers are from the kernel's x86-64 and generic (64-bit Arm) tables."""
import errno
import platform
import struct

# AUDIT_ARCH_*, then the numbers: of calls refused, of clone, and of socket and socketpair.
_COMMON = {
    "clone3": 435, "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "open_tree": 428,
    "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433, "pidfd_open": 434,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_X86_64 = _COMMON | {
    "clone": 56, "fork": 57, "vfork": 58, "socket": 41, "socketpair": 53, "setsockopt": 54, "shmget": 29, "semget": 64,
    "msgget": 68, "ptrace": 101, "syslog": 103, "personality": 135, "vhangup": 153, "modify_ldt": 154, "pivot_root": 155,
    "adjtimex": 159, "chroot": 161, "acct": 163, "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167,
    "swapoff": 168, "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "lookup_dcookie": 212, "clock_settime": 227, "mbind": 237,
    "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256,
    "unshare": 272, "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303,
    "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "memfd_create": 319, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323,
}  # fmt: skip
_AARCH64 = _COMMON | {
    "clone": 220, "socket": 198, "socketpair": 199, "setsockopt": 208, "shmget": 194, "semget": 190, "msgget": 186,
    "ptrace": 117, "syslog": 116, "personality": 92, "vhangup": 58, "pivot_root": 41, "adjtimex": 171, "chroot": 51,
    "acct": 89,
    "settimeofday": 170, "mount": 40, "umount2": 39, "swapon": 224, "swapoff": 225, "reboot": 142, "sethostname": 161,
    "setdomainname": 162, "init_module": 105, "delete_module": 106, "quotactl": 60, "lookup_dcookie": 18,
    "clock_settime": 112, "mbind": 235, "mq_open": 180, "kexec_load": 104, "add_key": 217, "request_key": 218,
    "keyctl": 219, "migrate_pages": 238, "unshare": 97, "move_pages": 239, "perf_event_open": 241, "fanotify_init": 262,
    "name_to_handle_at": 264, "open_by_handle_at": 265, "clock_adjtime": 266, "setns": 268, "process_vm_readv": 270,
    "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "memfd_create": 279, "kexec_file_load": 294, "bpf": 280,
    "userfaultfd": 282,
}  # fmt: skip
MACHINES = {"x86_64": (0xC000003E, _X86_64), "aarch64": (0xC00000B7, _AARCH64)}

LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_BITS, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
# Offsets in `struct seccomp_data`: the call's number, the machine, the lower half of its first argument.
NUMBER, MACHINE, ARGUMENT = 0, 4, 16
CLONE_THREAD, AF_UNIX, X32 = 0x00010000, 1, 0x40000000


def assembled(machine: str = "") -> bytes:
    """The filter as an array of `struct sock_filter`. ValueError for a machine whose numbers are not known."""
    machine = machine or platform.machine()
    if machine not in MACHINES:
        raise ValueError(f"the system calls of {machine} are not known, only those of {' and '.join(MACHINES)}")
    identity, numbers = MACHINES[machine]
    refused, special = ERROR | errno.EPERM, ("clone", "clone3", "socket", "socketpair")
    lines = [(LOAD, 0, 0, MACHINE), (JUMP_EQUAL, 1, 0, identity), (RETURN, 0, 0, KILL), (LOAD, 0, 0, NUMBER)]
    if machine == "x86_64":
        # The x32 ABI: the same calls by other numbers.
        lines += [(JUMP_AT_LEAST, 0, 1, X32), (RETURN, 0, 0, refused)]
    for name, number in numbers.items():
        if name not in special:
            lines += [(JUMP_EQUAL, 0, 1, number), (RETURN, 0, 0, refused)]
    # A filter cannot read clone3's flags; on ENOSYS the C library uses clone, whose flags it can.
    lines += [(JUMP_EQUAL, 0, 1, numbers["clone3"]), (RETURN, 0, 0, ERROR | errno.ENOSYS)]
    lines += [(JUMP_EQUAL, 0, 4, numbers["clone"]), (LOAD, 0, 0, ARGUMENT), (JUMP_BITS, 0, 1, CLONE_THREAD)]
    lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refused)]
    for name in ("socket", "socketpair"):
        lines += [(JUMP_EQUAL, 0, 4, numbers[name]), (LOAD, 0, 0, ARGUMENT), (JUMP_EQUAL, 0, 1, AF_UNIX)]
        lines += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, refused)]
    lines.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("HBBI", *line) for line in lines)
