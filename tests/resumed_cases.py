"""Two ranks that train every ZeRO stage in every precision, once without a stop and once resumed in the middle.

The one that is resumed also evaluates after step 3, which must leave no trace.
"""

import shutil
from pathlib import Path

from checkpoint_contents import contents, differences
from launching import run_ranks
from test_train import lines, losses

from fcn_dist.checkpoints.store import DEEPSPEED_TAG, checkpoints_dir, open_checkpoint
from fcn_dist.data.packing.run import pack
from fcn_dist.data.synthetic import render

CASES = [f"{precision}-{stage}" for precision in ("fp32", "bf16", "fp16") for stage in range(4)]
CASES_SCRIPT = Path(__file__).with_name("train_cases.py")
TIME_LIMIT = 800.0  # seconds for all cases together


def trained_and_resumed(folder: Path, recipe: str) -> Path:
    """`whole`: four steps of every case on two ranks; `resumed`: those again, continued after 2, evaluated after 3."""
    render(folder / "scenes", training=11, validation=5, size=(48, 64), seed=3)
    pack(folder / "scenes", folder / "packed", samples_per_shard=4)
    evaluated = recipe.replace("evaluate: {at_end: false}", "evaluate: {at_end: false, every: 1}")
    assert evaluated != recipe
    inputs = {}
    for name, text in (("whole", recipe), ("resumed", evaluated)):
        (folder / f"{name}.yaml").write_text(text)
        (folder / name).mkdir()
        inputs[name] = [str(folder / name), str(folder / "packed"), str(folder / f"{name}.yaml")]
    run_ranks(CASES_SCRIPT, [*inputs["whole"], *CASES], 2, folder, TIME_LIMIT)
    for case in CASES:
        shutil.copytree(folder / "whole" / case, folder / "resumed" / case)
        shutil.rmtree(checkpoints_dir(folder / "resumed" / case) / "step-00000004")
    output = run_ranks(CASES_SCRIPT, [*inputs["resumed"], "--resume", *CASES], 2, folder, TIME_LIMIT)
    assert output.count("continuing after step 2") == len(CASES)
    return folder


def assert_resumed_exactly(folder: Path, case: str) -> dict[str, object]:
    """Losses, weights, optimizer state, scaler and buffers of all ranks, bit for bit; returns what was compared."""
    whole, resumed = folder / "whole" / case, folder / "resumed" / case
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 4
    assert [[line["step"] for line in lines(run, "evaluate")] for run in (whole, resumed)] == [[], [3]]
    scales = [line["loss_scale"] for line in lines(whole, "train")]
    assert scales == [line["loss_scale"] for line in lines(resumed, "train")]
    assert scales[0] == (1024 if case.startswith("fp16") else None)
    one, other = (contents(open_checkpoint(run)[0].dir / DEEPSPEED_TAG) for run in (whole, resumed))
    assert differences(one, other) == []
    assert {"exp_avg", "exp_avg_sq", "step"} <= {where.rpartition("/")[2] for where in one}
    return one
