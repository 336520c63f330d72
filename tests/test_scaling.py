"""The model on paper of what more GPUs bring, against figures by hand."""

import pytest

from fcn_dist.training.memoryplan import Partition, Weights
from fcn_dist.training.scaling import Links, Work, accumulation_for, advice, largest_useful, step

WEIGHTS = Weights(all=100_000_000, largest=1)  # 200 MB in bf16
LINKS = Links(in_host=1e9, between_hosts=1e8, gpus_per_host=4)
WORK = Work(image=0.01, update=0.08)


def partition(gpus: int, stage: int = 1) -> Partition:
    return Partition(stage, "bfloat16", gpus)


def test_one_gpu_sends_nothing() -> None:
    one = step(WEIGHTS, partition(1), LINKS, WORK, micro_batch=12)
    assert (one.sending, one.efficiency) == (0, 1) and one.seconds == pytest.approx(0.2)
    assert one.images_per_second == pytest.approx(60)


@pytest.mark.parametrize(
    ("stage", "gpus", "computing", "sending"),
    [
        (0, 2, 0.12 + 0.08, 0.2),  # half of the 200 MB goes around twice, at 1 GB/s
        (1, 4, 0.12 + 0.02, 0.3),  # each updates a quarter
        (2, 4, 0.12 + 0.02, 0.3),
        (3, 4, 0.12 + 0.02, 0.45),  # and the weights are gathered a second time
        (1, 8, 0.12 + 0.01, 3.5),  # over the network between hosts, ten times slower
    ],
)
def test_a_step_computes_and_then_sends_over_the_slowest_link(
    stage: int, gpus: int, computing: float, sending: float
) -> None:
    one = step(WEIGHTS, partition(gpus, stage), LINKS, WORK, micro_batch=12)
    assert one.computing == pytest.approx(computing) and one.sending == pytest.approx(sending)
    assert one.images == 12 * gpus and one.efficiency == pytest.approx(computing / (computing + sending))


def test_what_is_accumulated_is_sent_once_in_stage_1_and_each_time_in_stage_2() -> None:
    sending = [step(WEIGHTS, partition(4, stage), LINKS, WORK, 12, micro_batches=5).sending for stage in (1, 2)]
    assert sending == pytest.approx([0.3, 0.9])


def test_enough_is_accumulated_and_no_more() -> None:
    work = Work(image=0.01)
    # 0.12 s to compute and 0.3 s to send: 0.9 of the time takes 2.7 s.
    needed = accumulation_for(WEIGHTS, partition(4), LINKS, work, 12, efficiency=0.9)
    assert needed == 23
    found = [step(WEIGHTS, partition(4), LINKS, work, 12, count).efficiency for count in (needed - 1, needed)]
    assert found[0] < 0.9 <= found[1]
    assert accumulation_for(WEIGHTS, partition(1), LINKS, work, 12, efficiency=0.9) == 1


def test_a_global_batch_is_worth_no_more_gpus_than_it_can_keep_busy() -> None:
    work = Work(image=0.01)
    # 64 images: 0.64 s alone, 0.32 + 0.2 on two, 0.16 + 0.3 on four: the second pair is worth a ninth.
    links = Links(in_host=1e9, between_hosts=1e9, gpus_per_host=64)
    assert largest_useful(WEIGHTS, partition(1), links, work, 64).gpus == 1
    # Ten times as many images: 6.4, 3.2 + 0.2, 1.6 + 0.3, 0.8 + 0.35, 0.4 + 0.375.
    assert largest_useful(WEIGHTS, partition(1), links, work, 640).gpus == 8
    assert largest_useful(WEIGHTS, partition(1), Links(1e15, 1e15, 1), work, 5).gpus == 4, "no GPU without an image"


def test_advice_names_what_it_is_about() -> None:
    lines = advice(WEIGHTS, partition(4), LINKS, Work(image=0.01), micro_batch=12, global_batch=640)
    assert lines[0].startswith("On 4 GPUs with micro-batches of 12, 114 images a second: a GPU computes 29% of")
    assert lines[1].startswith("Accumulating 23 micro-batches makes that 90%, at a global batch of 1,104:")
    assert lines[2].startswith("The recipe's global batch of 640 is worth up to 4 GPUs (337 images a second);")
    (alone,) = advice(WEIGHTS, partition(1), LINKS, Work(image=0.01), micro_batch=12, global_batch=None)
    assert "computes 100% of the time" in alone
