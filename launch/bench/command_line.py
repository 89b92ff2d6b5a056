"""What the benchmarks' command lines share."""

import argparse


def sizes(text: str) -> tuple[int, ...]:
    """Sizes such as 1,4,16; each 1 or more."""
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: sizes must be 1 or more")
    return found
