"""Installs requirements.txt into a notebook's own Python, and leaves its accelerator's jax alone.

    from launch.setup.colab import install
    install()

Colab brings a jax for the accelerator of its runtime. One that satisfies requirements.txt stays;
an older one is brought up to date together with its plugin (jax[cuda12], jax[tpu], ...), since
jax without it would be left with the CPU. Standard library only: it runs before anything is there.
"""

import importlib.metadata
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

ROOT = pathlib.Path(__file__).parent.parent.parent
# The distribution that an accelerator's jax consists of -> the extra that names it.
PLUGINS = {"jax-cuda12-plugin": "cuda12", "jax-cuda13-plugin": "cuda13", "libtpu": "tpu"}


class InstallError(RuntimeError):
    """The packages are not there, or cannot be used yet; the message says what to do."""


def install(root: pathlib.Path = ROOT) -> None:
    """Install what requirements.txt lists; quick when it is there.

    Raises:
        InstallError: pip failed; or packages that this Python has in use were replaced, so that
            it must be started anew.
    """
    before = versions()
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*command, *wanted(root, before)], capture_output=True, text=True)
    if done.returncode:
        raise InstallError(f"pip could not install requirements.txt: {done.stderr[-2000:]}")
    if changed := in_use(before, versions(), sys.modules):
        raise InstallError(
            f"this runtime has loaded {', '.join(changed)}, which requirements.txt has replaced; "
            f"restart it (Runtime > Restart session) and run all cells again, this once"
        )


def versions() -> dict[str, str]:
    """Installed distributions by normalized name."""
    importlib.invalidate_caches()
    return {_normalized(found.name): found.version for found in importlib.metadata.distributions()}


def wanted(root: pathlib.Path, installed: Iterable[str]) -> list[str]:
    """pip's arguments: the list, and jax with the extra of the accelerator's plugin, if any."""
    path = root / "requirements.txt"
    (jax,) = re.findall(r"^jax([<>=~!]\S*)", path.read_text(), flags=re.MULTILINE)
    extras = sorted({extra for name, extra in PLUGINS.items() if name in set(installed)})
    return ["-r", str(path), *([f"jax[{','.join(extras)}]{jax}"] if extras else [])]


def in_use(before: dict[str, str], after: dict[str, str], modules: Iterable[str]) -> Sequence[str]:
    """Distributions with loaded modules whose version is another than when they were loaded."""
    loaded = {name.partition(".")[0] for name in modules}
    owners = importlib.metadata.packages_distributions()
    found = {_normalized(d) for name in loaded for d in owners.get(name, ())}
    return sorted(
        f"{name} {before[name]} (now {after.get(name, 'gone')})"
        for name in found & set(before)
        if after.get(name) != before[name]
    )


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
