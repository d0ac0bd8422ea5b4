"""Refuse system calls that no program of a benchmark needs: a seccomp filter, for native code too.

Namespaces leave three kinds of holes that this closes: memory that no process is charged for
(System V segments, anonymous files and shared mappings), sockets that know no network namespace
(VSOCK reaches the host of a virtual machine), and the kernel interfaces in which most holes are
found. Without namespaces it also refuses signals to others, sockets and the execution of programs.
"""

import ctypes
import errno
import os
import struct
import sys

from lora_one.evaluation.sandbox import kernel

# Numbers from the kernel's tables, by machine: (x86-64, AArch64). Equal from 424 on.
_NEVER = {
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "syslog": (103, 116),
}
_NOT_WITHOUT_NAMESPACES = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "socket": (41, 198),
}
_SOCKET = (41, 198)
_KILL, _TGKILL, _PRLIMIT = (62, 129), (234, 131), (302, 261)
_MMAP = (9, 222)
_SHARED_ANONYMOUS = 0x01 | 0x20  # MAP_SHARED and MAP_ANONYMOUS
_FAMILIES = (1, 2, 10, 16)  # Unix, IPv4, IPv6, and netlink, which lists the interfaces
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32 = 0x40000000  # the third interface of x86-64, with numbers of its own

_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
# Offsets in struct seccomp_data; of arguments, eight bytes each, the low halves.
_NUMBER, _MACHINE, _FIRST_ARGUMENT, _FOURTH_ARGUMENT = 0, 4, 16, 40
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | errno.EPERM
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_calls(*, namespaces: bool) -> bool:
    """Install the filter in this process, for it and all it starts; needs ``no_new_privs``.

    Args:
        namespaces: The process has namespaces of its own, so that what it signals, connects to
            and executes is in there as well.

    Returns:
        Whether there is a filter for this machine (Linux on x86-64 or AArch64).

    Raises:
        OSError: The kernel refuses filters.
    """
    machine = os.uname().machine
    if sys.platform != "linux" or machine not in _MACHINES:
        return False
    code = b"".join(struct.pack("=HBBI", *step) for step in _instructions(machine, namespaces))
    program = _Program(len(code) // 8, code)
    kernel.set_process_option(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), what="filter system calls"
    )
    return True


def _instructions(machine: str, namespaces: bool) -> list[_Instruction]:
    column, constant = _MACHINES[machine]
    steps: list[_Instruction] = [
        (_LOAD, 0, 0, _MACHINE),
        (_EQUAL, 1, 0, constant),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _REFUSE),
    ]
    refused = _NEVER if namespaces else _NEVER | _NOT_WITHOUT_NAMESPACES
    for numbers in refused.values():
        steps += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _REFUSE)]
    # Pages of such a mapping stay when no process that has it counts them as resident any more.
    steps += [
        (_EQUAL, 0, 5, _MMAP[column]),
        (_LOAD, 0, 0, _FOURTH_ARGUMENT),
        (_AND, 0, 0, _SHARED_ANONYMOUS),
        (_EQUAL, 0, 1, _SHARED_ANONYMOUS),
        (_RETURN, 0, 0, _REFUSE),
        (_RETURN, 0, 0, _ALLOW),
    ]
    if namespaces:
        steps += _only(_SOCKET[column], _FAMILIES)
    else:
        me = os.getpid()
        steps += _only(_KILL[column], (me,)) + _only(_TGKILL[column], (me,))
        steps += _only(_PRLIMIT[column], (0, me))
    return [*steps, (_RETURN, 0, 0, _ALLOW)]


def _only(number: int, values: tuple[int, ...]) -> list[_Instruction]:
    """Allow a call with one of these first arguments (their low 32 bits), refuse it with others."""
    body: list[_Instruction] = [(_LOAD, 0, 0, _FIRST_ARGUMENT)]
    for value in values:
        body += [(_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
    body.append((_RETURN, 0, 0, _REFUSE))
    return [(_EQUAL, 0, len(body), number), *body]
