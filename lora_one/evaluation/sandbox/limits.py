"""What a program may use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a program may use, its children included.

    "All together" holds where a PID namespace shows all of them: not at the level ``rlimits``.

    Attributes:
        cpu_seconds: Processor time of each process, and of all together.
        wall_seconds: Time from the start of the program to the verdict.
        memory_bytes: Address space of each process, and resident memory of all together.
        processes: Processes and threads at a time.
        file_bytes: Size of a file.
        work_bytes: Size of all files together, where the working folder is a file system.
        output_bytes: What may be printed.
        reply_bytes: Size of a returned value on its way to the tests.
    """

    cpu_seconds: float = 8.0
    wall_seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    work_bytes: int = 64 << 20
    output_bytes: int = 1 << 20
    reply_bytes: int = 16 << 20
