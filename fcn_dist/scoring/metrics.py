"""The confusion matrix and the two families of scores read off it.

Shapes: N classes; the matrix is (N + 1, N + 1) int64, rows truth, columns prediction, both raw labels 0..N.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fcn_dist.errors import UserError
from fcn_dist.labels import OTHER_LABEL

Matrix = NDArray[np.int64]


class ConfusionMatrix:
    """Counts of (truth, prediction) pairs of labels. Integers, so sums over ranks are exact in any order."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.counts: Matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)

    def update(self, truth: NDArray[np.uint8], prediction: NDArray[np.uint8]) -> tuple[int, int]:
        """Add the pixels of one image, and say how many of them are labelled right, and labelled at all.

        Both arrays hold raw labels in one shape; "other" in the truth is not labelled, as in the official scores.
        Raises UserError if a label lies above N.
        """
        assert truth.shape == prediction.shape
        for name, labels in (("annotation", truth), ("prediction", prediction)):
            if labels.size and int(labels.max()) > self.num_classes:
                raise UserError(
                    f"an {name} holds label {int(labels.max())}; labels 0..{self.num_classes} are needed; "
                    "check the shards with shards/verify.py"
                )
        side = self.num_classes + 1
        pairs = truth.ravel().astype(np.int64) * side + prediction.ravel()
        counts = np.bincount(pairs, minlength=side * side).reshape(side, side)
        self.counts += counts
        labelled = counts[OTHER_LABEL + 1 :]
        return int(np.trace(labelled, offset=OTHER_LABEL + 1)), int(labelled.sum())


@dataclass(frozen=True)
class OfficialScores:
    """The benchmark's own (SceneParse150 development kit): truth "other" left out, all N classes counted."""

    pixel_accuracy: float
    mean_iou: float  # a class in neither truth nor prediction counts 0
    score: float  # the mean of the two


@dataclass(frozen=True)
class PaperScores:
    """The FCN paper's four (Shelhamer, Long, Darrell 2016, section 5): classes that are absent are skipped."""

    pixel_accuracy: float
    mean_accuracy: float  # over classes in the truth
    mean_iu: float  # over classes in truth or prediction
    frequency_weighted_iu: float


@dataclass(frozen=True)
class ClassScore:
    """One class."""

    label: int
    name: str
    iou: float | None  # None: in neither truth nor prediction
    accuracy: float | None  # None: not in the truth
    truth_pixels: int
    predicted_pixels: int  # over labelled pixels


@dataclass(frozen=True)
class Scores:
    """How good predictions on a shard set are."""

    split: str
    num_samples: int  # that were scored
    set_size: int  # samples of the split
    official: OfficialScores
    paper: PaperScores
    classes: tuple[ClassScore, ...]
    confusion: Matrix
    scenes: Matrix  # (num_samples, 2): right and labelled pixels of each, in the order of the set

    def summary(self) -> dict[str, Any]:
        """The headline figures under the names they are logged by."""
        return {
            "split": self.split,
            "num_samples": self.num_samples,
            "set_size": self.set_size,
            "official": vars(self.official),
            "paper": vars(self.paper),
        }

    def as_dict(self) -> dict[str, Any]:
        """JSON form: the summary, the classes, and the matrix they all come from."""
        return {
            **self.summary(),
            "classes": [vars(score) for score in self.classes],
            "confusion": self.confusion.tolist(),
        }


def score(
    matrix: ConfusionMatrix,
    names: tuple[str, ...],
    split: str,
    scenes: Matrix,
    set_size: int,
    score_other: bool,
) -> Scores:
    """Both families of scores. `score_other` makes "other" a class of the paper's, as it was one in training."""
    counts = matrix.counts
    return Scores(
        split,
        len(scenes),
        set_size,
        official_scores(counts),
        paper_scores(counts if score_other else _without_other(counts), paper_labels(counts, score_other)),
        tuple(_class_scores(counts, names)),
        counts,
        scenes,
    )


def paper_labels(counts: Matrix, score_other: bool) -> slice:
    """The labels that the paper's scores run over."""
    return slice(OTHER_LABEL if score_other else OTHER_LABEL + 1, len(counts))


def official_scores(counts: Matrix) -> OfficialScores:
    """The benchmark's scores of a matrix; 0 where nothing is labelled."""
    labelled = _without_other(counts)
    correct, union = _correct_and_union(labelled)
    classes = slice(OTHER_LABEL + 1, None)
    accuracy = _ratio(correct[classes].sum(), labelled.sum())
    mean_iou = float(np.mean(_ratios(correct, union)[classes]))
    return OfficialScores(accuracy, mean_iou, (accuracy + mean_iou) / 2)


def paper_scores(counts: Matrix, labels: slice) -> PaperScores:
    """The FCN paper's scores of a matrix over `labels`; 0 where no class is present."""
    correct, union = _correct_and_union(counts)
    truth = counts.sum(axis=1)
    correct, union, truth = correct[labels], union[labels], truth[labels]
    iu = _ratios(correct, union)
    return PaperScores(
        _ratio(correct.sum(), counts.sum()),
        _mean(_ratios(correct, truth)[truth > 0]),
        _mean(iu[union > 0]),
        float((truth * iu).sum() / max(1, truth.sum())),
    )


def _class_scores(counts: Matrix, names: tuple[str, ...]) -> list[ClassScore]:
    labelled = _without_other(counts)
    correct, union = _correct_and_union(labelled)
    truth, predicted = labelled.sum(axis=1), labelled.sum(axis=0)
    return [
        ClassScore(
            label,
            name,
            _ratio(correct[label], union[label]) if union[label] else None,
            _ratio(correct[label], truth[label]) if truth[label] else None,
            int(truth[label]),
            int(predicted[label]),
        )
        for label, name in enumerate(names, start=1)
    ]


def _without_other(counts: Matrix) -> Matrix:
    labelled = counts.copy()
    labelled[OTHER_LABEL] = 0
    return labelled


def _correct_and_union(counts: Matrix) -> tuple[Matrix, Matrix]:
    correct: Matrix = np.diag(counts)
    union: Matrix = counts.sum(axis=1) + counts.sum(axis=0) - correct
    return correct, union


def _ratios(part: Matrix, whole: Matrix) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _ratio(part: Any, whole: Any) -> float:
    return float(part / whole) if whole else 0.0


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else 0.0
