"""System calls that a sandboxed program may not make: a filter of the kernel, in the form that bubblewrap takes.

Namespaces leave some things of the host in reach: sockets to a virtual machine's host, keyrings of the kernel, and
memory that is in no process (files without names, System V segments), which nobody would count. The rest is what
programs under test do not need and kernels had flaws in.
"""

from __future__ import annotations

import errno
import platform
import struct

from rlsys.config.errors import UserError

# Numbers as <asm/unistd.h> has them, by machine.
_REFUSED = {
    "x86_64": {
        "shmget": 29, "semget": 64, "msgget": 68, "ptrace": 101, "add_key": 248, "request_key": 249, "keyctl": 250,
        "perf_event_open": 298, "memfd_create": 319, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
        "memfd_secret": 447,
    },
    "aarch64": {
        "ptrace": 117, "msgget": 186, "semget": 190, "shmget": 194, "add_key": 217, "request_key": 218, "keyctl": 219,
        "perf_event_open": 241, "memfd_create": 279, "bpf": 280, "userfaultfd": 282, "io_uring_setup": 425,
        "memfd_secret": 447,
    },
}  # fmt: skip
_SOCKET = {"x86_64": 41, "aarch64": 198}
_FAMILIES = (1, 2, 10, 16)  # AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that a network namespace confines
_MACHINE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…
_OTHER_TABLE = 0x40000000  # x32's numbers begin here

_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # in struct seccomp_data
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000


def program(machine: str | None = None) -> bytes:
    """The filter: an array of ``struct sock_filter`` (seccomp(2)). A refused call fails with EPERM.

    Args:
        machine: as ``uname -m`` says it; None: this one.

    Raises:
        UserError: calls of this machine are not known.
    """
    machine = machine or platform.machine()
    if machine not in _REFUSED:
        raise UserError(
            f"untrusted code is not run: no filter of system calls for {machine}",
            where="sandbox",
            fix=f"run it on {' or '.join(_REFUSED)}",
        )
    families = [word for family in _FAMILIES for word in (_step(_EQUAL, family, no=1), _step(_RETURN, _ALLOW))]
    of_sockets = [_step(_LOAD, _FIRST_ARGUMENT_AT), *families, _step(_RETURN, _REFUSE)]
    return b"".join(
        [
            _step(_LOAD, _MACHINE_AT),
            _step(_EQUAL, _MACHINE[machine], yes=1),
            _step(_RETURN, _KILL),
            _step(_LOAD, _NUMBER_AT),
            _step(_AT_LEAST, _OTHER_TABLE, no=1),
            _step(_RETURN, _REFUSE),
            *(
                word
                for number in _REFUSED[machine].values()
                for word in (_step(_EQUAL, number, no=1), _step(_RETURN, _REFUSE))
            ),
            _step(_EQUAL, _SOCKET[machine], no=len(of_sockets)),
            *of_sockets,
            _step(_RETURN, _ALLOW),
        ]
    )


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """yes, no: how many steps are left out where a comparison holds, or does not."""
    return struct.pack("=HBBI", code, yes, no, value)
