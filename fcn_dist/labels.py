"""The one place that maps labels: raw labels as annotated <-> targets as the network is trained on.

Raw labels are 0..N, where 0 is "other". Targets are output channels, or IGNORE_LABEL where nothing is learned.
"""

from dataclasses import dataclass

from fcn_dist.errors import UserError

OTHER_LABEL = 0
IGNORE_LABEL = 255


@dataclass(frozen=True)
class LabelRule:
    """How N annotated classes become network outputs.

    With `score_other` false (the benchmark's rule) "other" is ignored and the network has N outputs; with it
    true (the TensorFlow FCN's rule) "other" is output 0, an ordinary class, and the network has N + 1.
    """

    num_classes: int
    score_other: bool = False

    def __post_init__(self) -> None:
        # Targets are bytes and 255 means "ignored", so the highest output is 254.
        if self.num_classes < 1 or self.num_outputs > IGNORE_LABEL:
            raise UserError(
                f"{self.num_classes} classes cannot be stored in 8-bit labels; between 1 and "
                f"{IGNORE_LABEL - int(self.score_other)} are needed; merge classes in the objectInfo file"
            )

    @property
    def num_outputs(self) -> int:
        """Channels of the network's scores."""
        return self.num_classes + int(self.score_other)

    @property
    def target_table(self) -> bytes:
        """256 bytes: raw label -> target. Labels above N are damage and are never silently trained: ignored."""
        shift = 0 if self.score_other else 1
        return bytes(label - shift if shift <= label <= self.num_classes else IGNORE_LABEL for label in range(256))

    @property
    def label_table(self) -> bytes:
        """256 bytes: output channel -> raw label; what is no output becomes OTHER_LABEL."""
        shift = 0 if self.score_other else 1
        return bytes(target + shift if target < self.num_outputs else OTHER_LABEL for target in range(256))
