"""What classifiers are judged by, from whole counts: so that it is the same however an evaluation was shared out.

The definitions are scikit-learn's, with a score of 0 where it would divide by 0. No torch, no numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _of_counts(counts: Sequence[tuple[float, float, float]], names: Sequence[str]) -> dict[str, Any]:
    """Of (true positives, false positives, false negatives) by class: precision, recall and F1 of each, their means
    (macro), and those of all counts together (micro)."""
    each = []
    for right, wrongly, missed in counts:
        each.append((_ratio(right, right + wrongly), _ratio(right, right + missed),
                     _ratio(2 * right, 2 * right + wrongly + missed)))  # fmt: skip
    right, wrongly, missed = (sum(column) for column in zip(*counts, strict=True))
    size = len(counts)
    found: dict[str, Any] = {
        "precision_macro": sum(one[0] for one in each) / size,
        "recall_macro": sum(one[1] for one in each) / size,
        "f1_macro": sum(one[2] for one in each) / size,
        "precision_micro": _ratio(right, right + wrongly),
        "recall_micro": _ratio(right, right + missed),
        "f1_micro": _ratio(2 * right, 2 * right + wrongly + missed),
    }
    found["per_class"] = {
        name: {"precision": precision, "recall": recall, "f1": f1, "support": int(counts[index][0] + counts[index][2])}
        for index, (name, (precision, recall, f1)) in enumerate(zip(names, each, strict=True))
    }
    return found


def of_classes(confusion: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Of [classes * classes] counts, true class by true class, as it was taken for each: accuracy, precision, recall,
    F1, and the matrix."""
    size = len(names)
    matrix = [[int(count) for count in confusion[row * size : (row + 1) * size]] for row in range(size)]
    total = sum(map(sum, matrix))
    counts = []
    for index in range(size):
        right = matrix[index][index]
        counts.append((right, sum(row[index] for row in matrix) - right, sum(matrix[index]) - right))
    accuracy = _ratio(sum(matrix[index][index] for index in range(size)), total)
    return {"accuracy": accuracy, **_of_counts(counts, names), "confusion": matrix}


def of_sets(table: Sequence[float], exact: Sequence[float], names: Sequence[str]) -> dict[str, Any]:
    """Of [4 * classes] counts (rightly said, wrongly said, missed, rightly left out, of each class) and how many sets
    were right of how many: accuracy is the share of sets that are right in all classes."""
    size = len(names)
    right, wrongly, missed = (table[part * size : (part + 1) * size] for part in range(3))
    return {"accuracy": _ratio(exact[0], exact[1]), **_of_counts(list(zip(right, wrongly, missed, strict=True)), names)}


def auroc(scores: Sequence[float], targets: Sequence[float], size: int, *, is_binary: bool = False) -> float | None:
    """The area under the ROC curve, the mean over classes, each against the rest (`is_binary`: that of the second of
    two classes); None where a class has no sample, or nothing else has."""
    of = [_area(scores[index::size], targets[index::size]) for index in range(size)]
    of = of[1:] if is_binary else of
    return None if any(each is None for each in of) else sum(each for each in of if each is not None) / len(of)


def _area(scores: Sequence[float], targets: Sequence[float]) -> float | None:
    """By ranks, those of equal scores being their mean (Mann and Whitney 1947)."""
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    positives = int(sum(targets))
    negatives = len(scores) - positives
    if not positives or not negatives:
        return None
    ranks = 0.0
    first = 0
    while first < len(order):
        last = first
        while last + 1 < len(order) and scores[order[last + 1]] == scores[order[first]]:
            last += 1
        mean = (first + last) / 2 + 1
        ranks += mean * sum(targets[order[index]] for index in range(first, last + 1))
        first = last + 1
    return (ranks - positives * (positives + 1) / 2) / (positives * negatives)
