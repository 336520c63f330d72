"""Draws docs/stream.svg from the stream itself, so that no number in it is made up: python tests/stream_drawing.py

Twelve samples in three shards, a global batch of eight: the second batch ends one epoch and begins the next.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fcn_dist.data.stream import SampleStream
from fcn_dist.ranks import BatchPlan

DRAWING = Path(__file__).resolve().parents[1] / "docs" / "stream.svg"
SAMPLES, SHARD, BATCH, SEED, STEP, POSITION = 12, 4, 8, 0, 1, 14
CUTS = (
    ("1 rank, 2 micro-batches", BatchPlan(BATCH, 4, 2, 1)),
    ("2 ranks", BatchPlan(BATCH, 4, 1, 2)),
    ("3 ranks", BatchPlan(BATCH, 3, 1, 3)),
)
LEFT, CELL, WIDTH, HEIGHT = 150, 32, 960, 560
STYLE = """
  .page { fill: #ffffff } .ink, text { fill: #1f2328 } .soft { fill: #59636e }
  .line { stroke: #59636e; fill: none } .mark { stroke: #b3261e; fill: none; stroke-width: 2 } .said { fill: #b3261e }
  .s0 { fill: #cfe3ff } .s1 { fill: #ffe0b3 } .s2 { fill: #cdeccb } .cell { stroke: #59636e }
  text { font: 14px system-ui, sans-serif } .soft, .said { font-size: 13px } .middle { text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117 } .ink, text { fill: #f0f6fc } .soft { fill: #9ba5b1 }
    .line, .cell { stroke: #9ba5b1 } .mark { stroke: #ff8a80 } .said { fill: #ff8a80 }
    .s0 { fill: #1f4d86 } .s1 { fill: #78490c } .s2 { fill: #22602e }
  }
"""


class Picture:
    """Pieces of SVG, in the order that they are drawn."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.stream = SampleStream(range(SAMPLES), SEED)

    def text(self, x: float, y: float, words: object, kind: str = "") -> None:
        look = f' class="{kind}"' if kind else ""
        self.pieces.append(f'<text x="{x:g}" y="{y:g}"{look}>{words}</text>')

    def path(self, course: str, kind: str = "line") -> None:
        self.pieces.append(f'<path d="{course}" class="{kind}"/>')

    def sample(self, x: float, y: float, sample: int) -> None:
        """A cell with its number, in the colour of its shard."""
        shape = f'x="{x:g}" y="{y:g}" width="{CELL}" height="{CELL}"'
        self.pieces.append(f'<rect {shape} class="cell s{sample // SHARD}"/>')
        self.text(x + CELL / 2, y + 21, sample, "middle")

    def brace(self, x: float, end: float, y: float, depth: float = 8) -> None:
        """Below what it holds together; above, where it is deep upwards."""
        self.path(f"M{x + 2:g} {y:g}v{depth:g}H{end - 2:g}v{-depth:g}")

    def shards(self, y: float) -> None:
        self.text(16, y + 21, "shards")
        for sample in range(SAMPLES):
            shard, within = divmod(sample, SHARD)
            x = LEFT + shard * (SHARD + 1) * CELL + within * CELL
            self.sample(x, y, sample)
            if not within:
                self.brace(x, x + SHARD * CELL, y + CELL + 4)
                self.text(x + SHARD * CELL / 2, y + CELL + 28, f"training-{shard:06d}.tar", "soft middle")

    def positions(self, y: float) -> None:
        """The stream, with its epochs above and its steps below."""
        self.text(16, y + 21, "stream")
        self.text(16, y - 5, "position p", "soft")
        for position in range(2 * SAMPLES):
            x = LEFT + position * CELL
            self.sample(x, y, self.stream.sample(position))
            self.text(x + CELL / 2, y - 5, position, "soft middle")
        for epoch in range(2):
            x = LEFT + epoch * SAMPLES * CELL
            self.brace(x, x + SAMPLES * CELL, y - 22, -8)
            words = f"epoch {epoch}: every sample once, in the order of (seed, {epoch})"
            self.text(x + SAMPLES * CELL / 2, y - 36, words, "soft middle")
        for step in range(2 * SAMPLES // BATCH):
            x = LEFT + step * BATCH * CELL
            self.brace(x, x + BATCH * CELL, y + CELL + 4)
            self.text(x + BATCH * CELL / 2, y + CELL + 28, f"global batch of step {step}", "middle")

    def cut(self, y: float, name: str, plan: BatchPlan) -> None:
        """The same global batch on so many ranks."""
        self.text(16, y + 21, name)
        x = LEFT + 90.0
        for rank in range(plan.world_size):
            for part in range(plan.accumulation):
                found = plan.positions(rank, STEP * plan.accumulation + part)
                begin = x
                for position in found:
                    self.sample(x, y, self.stream.sample(position))
                    x += CELL
                self.brace(begin, x, y + CELL + 4, 6)
                words = f"rank {rank}" if plan.accumulation == 1 else f"micro-batch {part}"
                self.text((begin + x) / 2, y + CELL + 25, words, "soft middle")
                x += CELL

    def whole(self) -> str:
        begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        title = "<title>How a position of the stream becomes a sample, and a global batch the work of ranks</title>"
        page = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" class="page"/>'
        return "\n".join([begin, title, f"<style>{STYLE}</style>", page, *self.pieces, "</svg>"]) + "\n"


def draw() -> str:
    """The whole drawing."""
    picture = Picture()
    picture.shards(24)
    picture.positions(172)
    resumed = LEFT + (STEP + 1) * BATCH * CELL
    picture.path(f"M{resumed:g} 166v{CELL + 46}", "mark")
    picture.text(resumed + 8, 268, f"a checkpoint after step {STEP} keeps", "said")
    picture.text(resumed + 8, 285, f"one integer of the data: position {(STEP + 1) * BATCH}", "said")
    sample = picture.stream.sample(POSITION)
    epoch, offset = divmod(POSITION, SAMPLES)
    lines: Iterable[str] = (
        f"p = {POSITION}: epoch {epoch}, place {offset} in it, so sample {sample};",
        f"that is record {sample % SHARD} of shard {sample // SHARD}, which names its bytes in the tar.",
    )
    for number, line in enumerate(lines):
        picture.text(LEFT, 268 + 17 * number, line, "soft")
    picture.text(16, 330, f"step {STEP}, its eight samples the same, whoever trains them:")
    for number, (name, plan) in enumerate(CUTS):
        picture.cut(346 + 70 * number, name, plan)
    return picture.whole()


if __name__ == "__main__":
    DRAWING.write_text(draw())
