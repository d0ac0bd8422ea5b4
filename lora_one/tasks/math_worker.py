"""The process behind ``math_equivalence``: reads ``[gold, answer]`` a line, writes true or false.

Run as ``python -m lora_one.tasks.math_worker <bytes of memory>``.
"""

import json
import logging
import resource
import sys


def main() -> None:
    """Limit memory, import math-verify, say "ready", and compare until standard input ends."""
    limit = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it logs every answer that it cannot parse
    answers = sys.stdout
    sys.stdout = sys.stderr  # whatever a library prints is no verdict
    print('"ready"', file=answers, flush=True)
    for line in sys.stdin:
        gold, answer = json.loads(line)
        try:
            verdict = verify(parse(f"${gold}$"), parse(f"${answer}$"))
        except MemoryError:
            verdict = False
        print(json.dumps(bool(verdict)), file=answers, flush=True)


if __name__ == "__main__":
    main()
