"""Taking the network away from this process and all that it starts, for good; on Linux alone."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from contextlib import suppress
from pathlib import Path

_NEW_USER, _NEW_PID, _NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # the latter answers with EPERM
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
# Machine -> its number, and those of its calls that open a socket, or reach into another process that has one:
# socket, io_uring_setup, ptrace, process_vm_readv, process_vm_writev, pidfd_getfd.
_CALLS = {
    "x86_64": (0xC000003E, (41, 425, 101, 310, 311, 438)),
    "aarch64": (0xC00000B7, (198, 425, 117, 270, 271, 438)),
}
_OTHER_NUMBERS = 0x40000000  # of x86's x32 calls


def take_network() -> bool:
    """Whether the network could be taken away: by a namespace without one, by a filter of system calls, or by both.

    To be called while the process has one thread, that is before torch is imported. Processes started afterwards are in
    a namespace of their own too, and end with the first of them. The filter refuses sockets that are files as well.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    apart = libc.unshare(_NEW_USER | _NEW_PID | _NEW_NET) == 0
    if apart:
        with suppress(OSError):  # then the user has no name within, as some libraries ask for
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    return _filter(libc) or apart


def _filter(libc: ctypes.CDLL) -> bool:
    """Refuses the calls of `_CALLS` from here on. False where the system has no filters, or the machine is unknown."""
    if platform.machine() not in _CALLS:
        return False
    machine, calls = _CALLS[platform.machine()]
    last = len(calls) + 5  # the instruction that refuses; jumps count from the next one
    program = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, last - 2, machine),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, last - 4, 0, _OTHER_NUMBERS),
        *((_EQUAL, last - 5 - i, 0, call) for i, call in enumerate(calls)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    about = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return False
    return libc.prctl(_SECCOMP, _FILTER, about, 0, 0) == 0
