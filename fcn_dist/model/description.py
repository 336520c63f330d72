"""What a network is besides its weights: enough to build it, feed it and read its answers."""

from dataclasses import asdict, dataclass
from typing import Any

from fcn_dist.config import ModelConfig
from fcn_dist.labels import LabelRule
from fcn_dist.model.fcn import FCN
from fcn_dist.model.preprocess import Preprocessing


@dataclass(frozen=True)
class ModelDescription:
    """Architecture, classes and preprocessing; stored with every checkpoint and model file."""

    config: ModelConfig
    preprocessing: Preprocessing
    classes: tuple[str, ...]  # names of labels 1..N
    colours: tuple[tuple[int, int, int], ...]  # RGB of labels 1..N
    score_other: bool

    @property
    def label_rule(self) -> LabelRule:
        """How outputs become labels."""
        return LabelRule(len(self.classes), self.score_other)

    def build(self) -> FCN:
        """A network of this description, its weights random."""
        return FCN(self.label_rule.num_outputs, self.config, self.preprocessing)

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "preprocessing": self.preprocessing.as_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelDescription":
        """From JSON form; raises KeyError, TypeError, ValueError or UserError if it is not one."""
        colours = tuple((int(r), int(g), int(b)) for r, g, b in values["colours"])
        if len(colours) != len(values["classes"]):
            raise ValueError(f"{len(values['classes'])} classes, but {len(colours)} colours")
        return cls(
            ModelConfig(**values["config"]),
            Preprocessing.from_dict(values["preprocessing"]),
            tuple(str(name) for name in values["classes"]),
            colours,
            bool(values["score_other"]),
        )
