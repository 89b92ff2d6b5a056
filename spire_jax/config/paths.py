"""Paths as users write them: `~` is the home folder, on a command line and in a config file.

A shell reads `~` at the beginning of a word alone, so not in `--out=~/runs`. These are the `type`
of every option that names a path, and what `build` of files.py reads a config's paths by; beyond,
a path is what it says.
"""

import argparse
import os
import pathlib
import re

from spire_jax.config.checks import ConfigError

_TYPO = re.compile(r"(gs|s3|file|https?):(?!//)")


class PathError(ConfigError, argparse.ArgumentTypeError):
    """A path that cannot be meant; the message names it and the remedy."""


def path_or_url(text: str) -> str:
    """A file or folder, or the URL of one in a bucket.

    Raises:
        PathError: nothing at all, nobody's home, a URL that lacks a slash or is of this machine.
    """
    if not text:
        raise PathError("the path is empty; name one (is a variable of the shell not set?)")
    path = os.path.expanduser(text)
    if path == text and text.startswith("~"):
        raise PathError(f"{text}: there is no such home folder; write ./{text} for a file here")
    if found := _TYPO.match(text):
        raise PathError(f"{text}: is a slash missing? write {found[1]}://..., or ./{text} for a "
                        f"file here")  # fmt: skip
    if text.startswith("file://"):
        raise PathError(f"{text}: write {text.removeprefix('file://')}, without file://")
    return path


def local(text: str) -> str:
    """A file or folder of this machine. PathError as of `path_or_url`, and for a URL."""
    if "://" in (path := path_or_url(text)):
        raise PathError(f"{text} is no path of this machine; copy it here, and name the copy")
    return path


def local_path(text: str) -> pathlib.Path:
    """`local`, as a path."""
    return pathlib.Path(local(text))
