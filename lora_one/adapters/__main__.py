"""``python -m lora_one.adapters <command>``: look at stored adapters and make others of them."""

import sys

from lora_one.adapters.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
