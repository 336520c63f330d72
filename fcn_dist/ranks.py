"""Rank arithmetic: who this process is, and which share of a global batch is its own."""

import os
from dataclasses import dataclass

from fcn_dist.errors import UserError


def env_int(name: str, default: int) -> int:
    """An integer from the environment, as launchers set them."""
    value = os.environ.get(name, "")
    try:
        return int(value) if value else default
    except ValueError:
        raise UserError(f"environment variable {name} is {value!r}; an integer is needed; unset it") from None


@dataclass(frozen=True)
class Rank:
    """This process among `world_size` processes, `local` on its node."""

    index: int = 0
    world_size: int = 1
    local: int = 0
    local_world_size: int = 1

    @classmethod
    def from_environment(cls) -> "Rank":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE (deepspeed) or LOCAL_WORLD_SIZE (torchrun)."""
        world_size = env_int("WORLD_SIZE", 1)
        local_world_size = env_int("LOCAL_SIZE", env_int("LOCAL_WORLD_SIZE", world_size))
        return cls(env_int("RANK", 0), world_size, env_int("LOCAL_RANK", 0), local_world_size)


def cores_of(rank: Rank) -> int:
    """The CPU cores that are this rank's own; with more threads, ranks of a node would wait for each other.

    OMP_NUM_THREADS, where it is set, is the user's own answer.
    """
    return env_int("OMP_NUM_THREADS", max(1, len(os.sched_getaffinity(0)) // rank.local_world_size))


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is cut: into world_size ranks x accumulation micro-batches, their sizes equal or one apart.

    Step k trains positions [k * global_batch, (k + 1) * global_batch). Sorted by lane (position mod `lanes`), rank r
    owns a contiguous run of them, and that run is cut into `accumulation` micro-batches in order. So neighbouring
    ranks, which a launcher puts on one node, read neighbouring lanes: with the ranks of a node comes its share of the
    lanes, whatever the number of either.
    """

    global_batch: int
    micro_batch: int  # the largest
    accumulation: int
    world_size: int
    lanes: int = 1

    def __post_init__(self) -> None:
        assert self.chunks <= self.global_batch
        assert self.micro_batch == -(-self.global_batch // self.chunks)
        if self.global_batch % self.lanes:
            raise UserError(
                f"data.lanes {self.lanes} does not divide the global batch {self.global_batch}, so that lanes would "
                "run dry at different times; choose a global batch that is a multiple of it, or other lanes"
            )

    @property
    def chunks(self) -> int:
        """Micro-batches of a global batch, over all ranks."""
        return self.world_size * self.accumulation

    @property
    def nominal_batch(self) -> int:
        """The global batch, were all micro-batches as large as the largest: what DeepSpeed is told.

        It only averages over ranks and accumulation with it, whatever the number of images in each.
        """
        return self.micro_batch * self.chunks

    def positions(self, rank: int, micro_step: int) -> tuple[int, ...]:
        """Stream positions of the micro-batch that `rank` trains as its `micro_step`-th since step 0."""
        step, part = divmod(micro_step, self.accumulation)
        chunk = rank * self.accumulation + part
        first, last = (place * self.global_batch // self.chunks for place in (chunk, chunk + 1))
        of_a_lane = self.global_batch // self.lanes
        places = (divmod(place, of_a_lane) for place in range(first, last))
        return tuple(step * self.global_batch + row * self.lanes + lane for lane, row in places)


def plan_batches(
    global_batch: int | None, micro_batch: int | None, accumulation: int | None, world_size: int
) -> BatchPlan:
    """Resolve the batch sizes of a new run from those given; None means "auto".

    Raises UserError if what is given cannot be cut evenly.
    """
    if global_batch is None:
        if micro_batch is None:
            raise UserError(
                "neither the global batch nor the micro-batch is given; one is needed: set train.global_batch in "
                "the recipe or train_micro_batch_size_per_gpu in the DeepSpeed configuration"
            )
        accumulation = accumulation or 1
        return BatchPlan(micro_batch * accumulation * world_size, micro_batch, accumulation, world_size)
    if micro_batch is None:
        accumulation = accumulation or 1
        micro_batch, rest = divmod(global_batch, accumulation * world_size)
        if rest or not micro_batch:
            unit = accumulation * world_size
            raise UserError(
                f"the global batch {global_batch} does not divide over {world_size} ranks x accumulation "
                f"{accumulation}; choose a global batch that is a multiple of {unit}"
            )
        return BatchPlan(global_batch, micro_batch, accumulation, world_size)
    unit = micro_batch * world_size * (accumulation or 1)
    found, rest = divmod(global_batch, micro_batch * world_size)
    if rest or not found or (accumulation is not None and accumulation != found):
        steps = f" x accumulation {accumulation}" if accumulation else ""
        raise UserError(
            f"micro-batch {micro_batch}{steps} does not divide the global batch {global_batch} over {world_size} "
            f"ranks; choose a global batch that is a multiple of {unit}, or another micro-batch"
        )
    return BatchPlan(global_batch, micro_batch, found, world_size)


def cut_anew(global_batch: int, micro_batch: int, world_size: int, lanes: int = 1) -> BatchPlan:
    """The cut of a global batch that is given over other ranks: micro-batches of at most `micro_batch`, as few as fit.

    Raises UserError if there would be more of them than images.
    """
    accumulation = -(-global_batch // (micro_batch * world_size))
    chunks = accumulation * world_size
    if chunks > global_batch:
        raise UserError(
            f"the global batch {global_batch} cannot be cut for {world_size} ranks: micro-batches of at most "
            f"{micro_batch} need accumulation {accumulation}, and some of the {chunks} micro-batches would be empty; "
            "choose fewer ranks, or a larger train_micro_batch_size_per_gpu in --deepspeed_config"
        )
    return BatchPlan(global_batch, -(-global_batch // chunks), accumulation, world_size, lanes)
