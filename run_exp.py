"""Fine-tune with LoRA, PiSSA, LoRA-GA or LoRA-One: compose, initialise, train, evaluate, export.

python run_exp.py                                                   the embedded run
python run_exp.py -m init=lora,pissa,lora_ga,lora_one seed=0,1,2    a sweep and its table
python run_exp.py -m ++init.direction=LoRA-One                      as published
python run_exp.py --help                                            all choices
"""

import sys
from pathlib import Path
from typing import Any

from lora_one.harness.cli import launch
from lora_one.harness.config.schema import Config
from lora_one.harness.imports import kept

CONF = Path(__file__).parent / "conf"


def run(config: Config) -> dict[str, Any]:
    """Run one experiment and return its record (the contents of ``run.json``).

    Every stage is a function of its own in ``lora_one.harness``; a configuration that has
    already finished is not run again, one that was stopped goes on from its newest checkpoint.
    """
    # Imported here, so that --help and a mistyped key are answered before torch is loaded.
    with kept():
        from lora_one.harness import stages
    from lora_one.harness.distributed.ranks import is_main
    from lora_one.harness.records.record import RunRecord
    from lora_one.harness.resuming.preemption import watching

    record = RunRecord(config, writes=is_main())
    if record.finished:
        return stages.report_finished(record)

    plan = stages.make_plan(config)
    lease = record.acquire()
    if lease is None:  # another process finished it while this one made its plan
        return stages.report_finished(record)
    with (
        lease,
        stages.tracking(config, stages.open_record(config, plan, record)) as tracker,
        record.closing(),
        watching(config.preemption.margin_seconds),
    ):
        with record.phase("load"):
            base = stages.load(config, plan, record)
        with record.phase("init"):
            reference = stages.take_reference(config, plan, base, record)
            model = stages.initialise(config, plan, base, record, tracker)
        with record.phase("export"):
            stages.rehearse_export(config, plan, model, record)
        with record.phase("train"):
            stages.train(config, plan, model, reference, record, tracker)
        with record.phase("export"):
            stages.export(config, plan, model, record)
        with record.phase("eval"):
            stages.evaluate(config, plan, model, record, tracker)
        stages.describe_export(config, record)

    return stages.report_done(record)


if __name__ == "__main__":
    sys.exit(launch(run, CONF, __file__))
