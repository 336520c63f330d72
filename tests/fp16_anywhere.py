"""launch/train.py on CPUs whose oneDNN lacks fp16, which DeepSpeed then refuses although torch computes it."""

import sys

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from fcn_dist.commands.entry import run_script

CPU_Accelerator.is_fp16_supported = lambda self: True

if __name__ == "__main__":
    sys.exit(run_script("train"))
