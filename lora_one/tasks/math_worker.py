"""The process behind ``math_equivalence``: reads ``[gold, answer, seconds]`` a line, writes a word.

Run as ``python -m lora_one.tasks.math_worker <bytes of memory>``.
"""

import json
import logging
import math
import resource
import sys


def main() -> None:
    """Limit memory, import math-verify, say "ready", and compare until standard input ends.

    A comparison that takes more processor time than its seconds ends the process by SIGXCPU.
    """
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it logs every answer that it cannot parse
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no verdict
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        _allow(seconds)
        try:
            # Its own time limits are wall time, and what is too slow for them just unequal.
            pair = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
            verdict = "equal" if verify(*pair, timeout_seconds=None) else "unequal"
        except MemoryError:
            verdict = "crashed"
        print(json.dumps(verdict), file=answers, flush=True)


def _allow(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    # The limit counts in whole seconds since the start of the process.
    soft = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main()
