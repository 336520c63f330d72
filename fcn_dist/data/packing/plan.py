"""The pairs of one split and the options in; out, which pair goes into which shard. Decided from names and sizes alone.

Every machine that packs a part of the set comes to the same plan by itself.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import PIL

import fcn_dist
from fcn_dist.data.scenes.listing import Pair
from fcn_dist.data.scenes.pairs import DEFAULT_MAX_PIXELS, DEFAULT_QUALITY, PairRules
from fcn_dist.errors import UserError

DEFAULT_SAMPLES_PER_SHARD = 256
_LONG_NAME = 95  # bytes of a key that fits an ordinary tar header with its suffix
_LONG_NAME_BYTES = 3 * tarfile.BLOCKSIZE  # what a longer one takes more


@dataclass(frozen=True)
class PackOptions:
    """What decides the bytes of a shard set, besides the scenes."""

    samples_per_shard: int | None = None
    shard_size: int | None = None  # bytes; neither given: DEFAULT_SAMPLES_PER_SHARD
    seed: int = 0
    keep_order: bool = False
    short_side: int | None = None
    quality: int = DEFAULT_QUALITY
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.shard_size is not None:
            raise UserError(
                f"--samples-per-shard is {self.samples_per_shard} and --shard-size {self.shard_size}; one of them "
                "decides how much a shard holds; leave the other out"
            )
        for option in ("samples_per_shard", "shard_size", "short_side", "max_pixels"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise UserError(f"--{option.replace('_', '-')} is {value}; at least 1 is needed")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; JPEG qualities are 1 to 100, and 95 is the default")

    def rules(self, num_classes: int) -> PairRules:
        """What a single pair must keep to."""
        return PairRules(num_classes, self.max_pixels, self.short_side, self.quality)

    def recorded(self) -> dict[str, Any]:
        """What the index says of them; it has a field of its own for `max_pixels`."""
        options = {name: value for name, value in vars(self).items() if name != "max_pixels"}
        if self.shard_size is None:
            options["samples_per_shard"] = self.samples_per_shard or DEFAULT_SAMPLES_PER_SHARD
        return options


class Part(NamedTuple):
    """One of several runs that pack a set together; numbers from 1."""

    number: int
    total: int

    @classmethod
    def of(cls, number: int, total: int) -> "Part":
        """Raises UserError unless 1 <= number <= total."""
        if not 1 <= number <= total:
            raise UserError(f"--part is {number}/{total}; I/N with I from 1 to N is needed, such as 1/2 and 2/2")
        return cls(number, total)

    def has(self, shard_number: int) -> bool:
        """Whether this part packs that shard."""
        return shard_number % self.total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


@dataclass(frozen=True)
class ShardPlan:
    """One shard that shall be."""

    name: str  # of the tar file
    pairs: tuple[Pair, ...]
    content: str  # what it is made of and how; equal on all machines with the same scenes
    inputs: str  # the same with the files' times, so that a file that was changed is noticed

    @property
    def num_bytes(self) -> int:
        """About what it takes on the disk."""
        return sum(_tar_bytes(pair) for pair in self.pairs)


@dataclass(frozen=True)
class SplitPlan:
    """What a split shall become."""

    split: str
    options: PackOptions
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    shards: tuple[ShardPlan, ...]

    def noted(self) -> dict[str, Any]:
        """All that the index needs besides the receipts of the shards, as JSON keeps it."""
        shards = [{"name": shard.name, "nsamples": len(shard.pairs), "content": shard.content} for shard in self.shards]
        facts = {
            "split": self.split,
            "made_with": made_with(),
            "options": self.options.recorded(),
            "max_pixels": self.options.max_pixels,
            "classes": self.classes,
            "colours": self.colours,
            "shards": shards,
        }
        return dict(json.loads(json.dumps(facts)))


def plan_shards(split: str, pairs: list[Pair], options: PackOptions, rules: PairRules) -> tuple[ShardPlan, ...]:
    """Cut the pairs of a split, in the order that `options` ask for, into shards."""
    ordered = pairs if options.keep_order else sorted(pairs, key=lambda pair: _draw(options.seed, pair.key))
    return tuple(
        _shard_plan(f"{split}-{number:06d}.tar", tuple(group), rules)
        for number, group in enumerate(_groups(ordered, options))
    )


def made_with() -> dict[str, str]:
    """The versions on which the bytes of converted images can depend."""
    return {"fcn_dist": fcn_dist.__version__, "opencv": cv2.__version__, "pillow": PIL.__version__}


def _draw(seed: int, key: str) -> bytes:
    # Sorting by a hash is a permutation that no library's random generator can change between versions.
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


def _groups(pairs: list[Pair], options: PackOptions) -> Iterator[list[Pair]]:
    if options.shard_size is None:
        step = options.samples_per_shard or DEFAULT_SAMPLES_PER_SHARD
        yield from (pairs[start : start + step] for start in range(0, len(pairs), step))
        return
    group: list[Pair] = []
    # A tar ends with two empty blocks, and in a whole record.
    whole = options.shard_size // tarfile.RECORDSIZE * tarfile.RECORDSIZE - 2 * tarfile.BLOCKSIZE
    room = whole
    for pair in pairs:
        needed = _tar_bytes(pair)
        if group and needed > room:
            yield group
            group, room = [], whole
        group.append(pair)
        room -= needed
    if group:
        yield group


def _tar_bytes(pair: Pair) -> int:
    header = tarfile.BLOCKSIZE + _LONG_NAME_BYTES * (not pair.key.isascii() or len(pair.key) > _LONG_NAME)
    return sum(header + file.size + -file.size % tarfile.BLOCKSIZE for file in (pair.image, pair.mask))


def _shard_plan(name: str, pairs: tuple[Pair, ...], rules: PairRules) -> ShardPlan:
    making = [name, made_with(), vars(rules)]
    content = _digest([making, [(pair.key, pair.image.size, pair.mask.size) for pair in pairs]])
    inputs = _digest([content, [(pair.image.mtime_ns, pair.mask.mtime_ns) for pair in pairs]])
    return ShardPlan(name, pairs, content, inputs)


def _digest(facts: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
