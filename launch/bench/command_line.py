"""What the benchmarks' command lines share."""

import argparse
import math


def count(text: str) -> int:
    """A whole number, 1 or more."""
    if (found := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}: use 1 or more")
    return found


def minutes(text: str) -> float:
    """Above 0, and finite."""
    if not 0 < (found := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: use a finite number above 0")
    return found


def sizes(text: str) -> tuple[int, ...]:
    """Sizes such as 1,4,16; each 1 or more."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be 1 or more")
    return found
