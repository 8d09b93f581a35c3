"""What Linux offers beyond resource limits, called through ctypes: namespaces, capabilities and a system call filter.

This file runs inside the sandbox (see ``_sandbox_runner.py``): standard library only. Each function does one thing and
raises ``OSError`` where the system refuses; what a refusal means is decided by the caller.
"""

import ctypes
import errno
import os
import signal
import struct

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# From <linux/sched.h>, <sys/mount.h>, <linux/mount.h> and <linux/prctl.h>.
_NEW_MOUNTS, _NEW_IPC, _NEW_USERS, NEW_PIDS, _NEW_NETWORK = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _BIND, _RECURSIVE, _PRIVATE = 0x1, 0x2, 0x4, 0x8, 0x1000, 0x4000, 0x40000
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_SECCOMP, _SET_SUBREAPER, _SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
_SECCOMP_FILTER = 2
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE, _ATTR_READ_ONLY = 442, -100, 0x8000, 0x1  # 442 on every architecture
_CAPABILITY_VERSION = 0x20080522

# For the two common architectures, the audit number and three sets of system call numbers. Refused to the program:
# sockets (also through io_uring), a look into other processes, leaving the process group, and namespaces and mounts of
# its own. Where it sees the processes of others, it may moreover send signals to, and set limits of, itself only: calls
# whose first argument must be its own id or 0, and calls refused for that reason.
_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {"socket": 41, "io_uring_setup": 425, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311}
        | {"setpgid": 109, "setsid": 112, "unshare": 272, "setns": 308, "mount": 165, "umount2": 166, "keyctl": 250}
        | {"bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
        {"kill": 62, "tgkill": 234, "prlimit64": 302},
        {"tkill": 200, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297, "pidfd_send_signal": 424},
    ),
    "aarch64": (
        0xC00000B7,
        {"socket": 198, "io_uring_setup": 425, "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271}
        | {"setpgid": 154, "setsid": 157, "unshare": 97, "setns": 268, "mount": 40, "umount2": 39, "keyctl": 219}
        | {"bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
        {"kill": 129, "tgkill": 131, "prlimit64": 261},
        {"tkill": 130, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424},
    ),
}


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _prctl(option: int, value: int, what: str) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), what)


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends."""
    _prctl(_SET_PDEATHSIG, signal.SIGKILL, "PR_SET_PDEATHSIG")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, whatever session it is in."""
    _prctl(_SET_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")


def forbid_inspection() -> None:
    """Close this process's memory and environment to others of the same user."""
    _prctl(_SET_DUMPABLE, 0, "PR_SET_DUMPABLE")


def unshare(flags: int) -> None:
    """Move this process into new namespaces; children are meant for pids."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def enter_namespaces(user: int, group: int) -> None:
    """Leave the network, shared memory and the common view of the file system.

    Only root may do so outright; others first become alone in a user namespace, as themselves.
    """
    unshare(_NEW_MOUNTS | _NEW_IPC | _NEW_NETWORK | (0 if user == 0 else _NEW_USERS))
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount(b"none", b"/", b"none", _RECURSIVE | _PRIVATE)  # no mount from here on is seen outside


def _mount(source: bytes, target: bytes, kind: bytes, flags: int, options: bytes = b"") -> None:
    _check(_libc.mount(source, target, kind, ctypes.c_ulong(flags), options), f"mount {target.decode()}")


def open_way_to(library: str, folder: str) -> None:
    """Let other users reach a folder below one that is closed to them, as below ``/root``.

    In this mount namespace the closed folder is covered by an empty one that holds nothing but the way to ``library``
    (and to ``folder``, should it lie there too).
    """
    library = os.path.abspath(library)
    parts = library.split("/")
    ancestors = ["/".join(parts[:count]) for count in range(2, len(parts) + 1)]
    closed = [path for path in ancestors if not os.stat(path).st_mode & 0o001]
    if not closed:
        return
    source = os.open(library, os.O_PATH)
    try:
        _mount(b"tmpfs", os.fsencode(closed[0]), b"tmpfs", _NOSUID | _NODEV, b"mode=0755,size=1m")
        for path in (library, folder):
            os.makedirs(path, exist_ok=True)
        _mount(f"/proc/self/fd/{source}".encode(), os.fsencode(library), b"none", _BIND | _RECURSIVE)
    finally:
        os.close(source)


def make_files_read_only(folder: str, size: int) -> None:
    """Make every file system read-only and put an empty one in memory, of at most ``size`` bytes, on ``folder``.

    Needs a mount namespace. ``/proc`` is renewed where that is allowed, to show the new pid namespace only.
    """
    attributes = struct.pack("=4Q", _ATTR_READ_ONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    _check(
        _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))),
        "mount_setattr",
    )
    options = f"size={size},nr_inodes=10000,mode=0711".encode()
    _mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _NOSUID | _NODEV, options)


def renew_proc() -> None:
    """Mount a ``/proc`` of the pid namespace that this process is in."""
    _mount(b"proc", b"/proc", b"proc", _RDONLY | _NOSUID | _NODEV | _NOEXEC)


def drop_capabilities() -> None:
    """Give up every capability, also those that a user namespace lends, for this process and what it executes."""
    _prctl(_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    _check(_libc.capset(header, bytes(24)), "capset")


def filter_system_calls(*, only_itself: bool) -> None:
    """Refuse sockets and the like (see above) with ``EPERM``, for this process and its descendants.

    Args:
        only_itself: Refuse signals to other processes, too.

    Raises:
        OSError: If the architecture is not a known one or the kernel has no filters.
    """
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no system call numbers for {machine}")
    audit, refused, own_id, to_others = _ARCHITECTURES[machine]
    numbers = [*refused.values(), *(to_others.values() if only_itself else ())]
    checked = [*own_id.values()] if only_itself else []
    lines: list[bytes] = []
    refuse = len(numbers) + len(checked) + 9  # the last line
    check = refuse - 4

    # Classic BPF on struct seccomp_data: the call's number is at byte 0, the architecture at 4, argument 1 at 16.
    def load(offset: int) -> None:
        lines.append(struct.pack("=HBBI", 0x20, 0, 0, offset))

    def jump(condition: int, value: int, *, yes: int | None = None, no: int | None = None) -> None:
        to = [0 if target is None else target - len(lines) - 1 for target in (yes, no)]
        lines.append(struct.pack("=HBBI", condition, *to, value))

    def end(value: int) -> None:
        lines.append(struct.pack("=HBBI", 0x06, 0, 0, value))

    equal, at_least, allow = 0x15, 0x35, 0x7FFF0000
    load(4)
    jump(equal, audit, no=refuse)
    load(0)
    jump(at_least, 0x40000000, yes=refuse)  # the calls of x32
    for number in numbers:
        jump(equal, number, yes=refuse)
    for number in checked:
        jump(equal, number, yes=check)
    end(allow)
    load(16)
    jump(equal, os.getpid(), yes=refuse - 1)
    jump(equal, 0, no=refuse)
    end(allow)
    end(0x00050000 | errno.EPERM)
    assert len(lines) == refuse + 1
    loaded = _Filter(len(lines), b"".join(lines))
    result = _libc.prctl(_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_FILTER), ctypes.byref(loaded), None, None)
    _check(result, "PR_SET_SECCOMP")
