"""One rank of test_parallelism: runs with parallelism=fsdp2, and what each rank saw of them.

torchrun --nproc-per-node 2 fsdp_worker.py <folder> with <folder>/overrides.json, a list of lists.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lora_one.harness import stages
from lora_one.harness.config.compose import compose_config, composer
from lora_one.harness.distributed import fsdp
from lora_one.harness.distributed.peers import together
from lora_one.sharding import is_cut, own_part
from run_exp import CONF, run


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    seen: list[dict] = []
    average, evaluate = fsdp.average_gradients, stages.evaluate

    def averaged(model):
        reduced = []
        send = dist.all_reduce
        dist.all_reduce = lambda tensor, *a, **k: (reduced.append(tensor.numel()), send(tensor))
        average(model)
        dist.all_reduce = send
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        seen[-1]["reduced"].append(reduced)
        seen[-1]["trained"] = sum(p.numel() for p in trained)
        seen[-1]["cut"] = sum(is_cut(p) for p in frozen) / len(frozen)
        own, total = (sum(f(p).numel() for p in frozen) for f in (own_part, lambda p: p))
        seen[-1]["share"] = own / total

    def evaluated(config, plan, model, record, tracker):
        evaluate(config, plan, model, record, tracker)
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                digest.update(name.encode() + parameter.detach().numpy().tobytes())
        seen[-1]["adapter"] = digest.hexdigest()

    fsdp.average_gradients, stages.evaluate = averaged, evaluated
    with together():
        for overrides in json.loads((folder / "overrides.json").read_text()):
            seen.append({"reduced": []})
            with composer(CONF):
                config = compose_config(overrides)
            run(config)
    (folder / f"seen-{dist.get_rank()}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
