"""What one of several processes is asked to write down; a module of its own, so that a forked process finds it."""

import json
import os
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def write_share(config, file):
    """Writes how many frozen numbers of the blocks this process holds, and how many there are.

    Also the same in and behind a forward and a backward pass: the most that it holds while a block is at work, and what it holds then.
    """
    from rankfold.toolkit.data.subjects import find_samples
    from rankfold.training.engine.processes import make_accelerator
    from rankfold.training.subject.task import SubjectTask

    accelerator = make_accelerator(config)
    task = SubjectTask(config, find_samples(config.images), config.base, accelerator)
    denoiser = task.training.model.denoiser
    blocks = [module for module in denoiser.modules() if isinstance(module, FSDPModule) and module is not denoiser]

    def share_of():
        frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)

    at_work = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: at_work.append(share_of()))
    facts = {"begin": share_of(), "all": sum(p.numel() for b in blocks for p in b.parameters() if not p.requires_grad)}
    facts["largest"] = max(sum(p.numel() for p in block.parameters()) for block in blocks)
    loss = task.module(task.batch(0, [0])).mean()
    facts["forward"] = share_of()
    loss.backward()
    facts |= {"backward": share_of(), "at_work": max(at_work)}
    Path(f"{file}{accelerator.process_index}").write_text(json.dumps(facts), encoding="utf-8")
    torch.distributed.destroy_process_group()


def write_work(file):
    """Writes what in_shares gives for five and for no numbers, what was worked on here, and what the first process says."""
    from rankfold.training.engine.processes import broadcast_first, map_distributed

    worked = []
    made = map_distributed(range(5), lambda number: worked.append(number) or number * 10)
    rank = int(os.environ["RANK"])
    facts = {"made": made, "worked": worked, "none": map_distributed([], str), "first": broadcast_first(rank)}
    Path(f"{file}{rank}").write_text(json.dumps(facts), encoding="utf-8")
    torch.distributed.destroy_process_group()
