"""Which of two values of a metric is the better one, as far as its name says."""

from __future__ import annotations

import re
from typing import Literal

_LESS = r"loss|perplexity|bits_per_byte|nll|mse|mae|rmse|error|brier|wer|cer|ter|reward_(rejected|undesirable)"
_MORE = (
    r"acc|accuracy|precision|recall|f1|auroc|auc|r2|margin|similarity|reward_(chosen|desirable)|exact_match|em|bleu|"
    r"rouge\w*|chrf|mcc|pass@\w+"
)


def direction_of(metric: str) -> Literal["min", "max"] | None:
    """`min` or `max`; None where that is not known. Of `per_class.spam.f1` and `TASK/acc_norm` the last part counts."""
    name = re.split(r"[./]", metric)[-1]
    for direction, words in (("min", _LESS), ("max", _MORE)):
        if re.search(rf"(^|_)({words})(_|$)", name):
            return direction  # type: ignore[return-value]
    return None
