"""What one of several processes holds of a base that is shared out; a module of its own, so that a forked process finds it."""

import json
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule


def write_share(config, file):
    """Writes how many frozen numbers of the blocks this process holds, and how many there are."""
    from rankfold.toolkit.data.subjects import find_samples
    from rankfold.training.processes import make_accelerator
    from rankfold.training.subject import SubjectTask

    accelerator = make_accelerator(config)
    task = SubjectTask(config, find_samples(config.images), config.base, accelerator)
    blocks = [module for module in task.model.denoiser.modules() if isinstance(module, FSDPModule)]
    frozen = [p for block in blocks for p in block.parameters() if not p.requires_grad]
    own = sum(parameter.to_local().numel() for parameter in frozen)
    Path(f"{file}{accelerator.process_index}").write_text(json.dumps([own, sum(p.numel() for p in frozen)]))
    torch.distributed.destroy_process_group()
