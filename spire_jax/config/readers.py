"""Which stages read a config value: said once, on the field itself."""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any


class Reader(enum.StrEnum):
    """What reads config values: a kind of stage."""

    TARGET = "target"  # one that is trained here
    PRETRAINED = "pretrained"  # in its place, one that is given
    CONTINUATIONS = "continuations"
    DRAFT = "draft"
    EVALUATE = "evaluate"
    REPORT = "report"
    STUDY = "study"


STAGES = ("target", "continuations", "drafts", "evaluate", "report", "study")  # as users name them
TARGET, PRETRAINED, CONTINUATIONS, DRAFT, EVALUATE, REPORT, STUDY = Reader


def read_by(
    default: Any,
    *readers: Reader,
    when: Callable[[Any], bool] | None = None,
    as_train: bool = False,
) -> Any:
    """A field, or a section, that these stages read; none: it changes no result.

    Args:
        when: of the section, whether it is read at all.
        as_train: 0 stands for the field of the same name in `train` (`DraftOptions.filled`).
    """
    metadata = {"read_by": readers, "when": when, "as_train": as_train}
    return dataclasses.field(default=default, metadata=metadata)
