"""Bring here, and tokenise, all that a machine without internet needs to run an experiment.

    python scripts/prepare.py dataset=meta_math model=llama
    python scripts/prepare.py -m dataset=sst2,mnli,qnli model=t5base seed=0,1,2
    HF_HUB_OFFLINE=1 python run_exp.py dataset=meta_math model=llama         # later, elsewhere

Takes the command line of ``run_exp.py``, official spellings and sweeps included; of a sweep it
prepares everything that any point needs, once. See docs/offline.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lora_one.harness.cli import launch_together
from lora_one.harness.config.schema import Config

CONF = Path(__file__).resolve().parent.parent / "conf"


def prepare(configs: list[Config]) -> None:
    """Prepare for these runs."""
    # Imported here, so that a mistyped key is answered before torch is loaded.
    from lora_one.harness.data.prepare import prepare_all

    prepare_all(configs)


if __name__ == "__main__":
    sys.exit(launch_together(prepare, CONF))
