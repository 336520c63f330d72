"""launch/train.py that writes down what each rank really trains: a line a step to trained-RANK.jsonl beside it.

A line has the step that it ends, and for each image its stream position and a digest of its pixels and targets as
the loader handed them over. On CPUs whose oneDNN lacks fp16, DeepSpeed is told that torch computes it.
"""

import hashlib
import json
import sys
from pathlib import Path

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from fcn_dist.commands.entry import run_script
from fcn_dist.data.loader import Batch
from fcn_dist.training.intake import Agreement, Intake

CPU_Accelerator.is_fp16_supported = lambda self: True
agree = Intake.agree


def agree_and_record(self: Intake, done: int, micro_batches: list[Batch]) -> Agreement:
    """What the loop asks for once a step, with the micro-batches that it then trains."""
    images = {
        position: hashlib.sha256(image.numpy().tobytes() + target.numpy().tobytes()).hexdigest()
        for batch in micro_batches
        for position, image, target in zip(batch.positions, batch.images, batch.targets, strict=True)
    }
    sizes = [len(batch.images) for batch in micro_batches]
    with Path(f"trained-{self.rank.index}.jsonl").open("a") as file:
        file.write(json.dumps({"step": done, "ranks": self.rank.world_size, "sizes": sizes, "images": images}) + "\n")
    return agree(self, done, micro_batches)


Intake.agree = agree_and_record  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(run_script("train"))
