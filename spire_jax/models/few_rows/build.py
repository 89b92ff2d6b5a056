"""The kernel's library: compiled once for this machine, kept in the user's cache."""

import functools
import hashlib
import logging
import os
import pathlib
import platform
import shutil
import subprocess

import jax
import jaxlib

LOG = logging.getLogger(__name__)
SOURCE = pathlib.Path(__file__).with_name("products.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")


@functools.cache
def library() -> pathlib.Path | None:
    """Where the compiled library is; None, and a line in the log, where it cannot be compiled.

    The compiler is $CXX, c++ or g++; the place $SPIRE_JAX_CACHE or ~/.cache/spire_jax.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        LOG.warning("no C++ compiler: small batches decode slower on this CPU; install g++, or set "
                    "decode.products=xla")  # fmt: skip
        return None
    cache = os.environ.get("SPIRE_JAX_CACHE") or pathlib.Path.home() / ".cache" / "spire_jax"
    made = pathlib.Path(cache) / f"few_rows-{_identity(compiler)}.so"
    try:
        if not made.exists():
            _compile(compiler, made)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        LOG.warning("%s cannot be compiled (%s): small batches decode slower on this CPU; set "
                    "decode.products=xla", SOURCE.name, said.strip()[:300])  # fmt: skip
        return None
    return made


def _compile(compiler: str, made: pathlib.Path) -> None:
    made.parent.mkdir(parents=True, exist_ok=True)
    partial = made.with_name(f".{os.getpid()}-{made.name}")  # of a process of its own: no half file
    command = [compiler, *FLAGS, f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(partial)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    os.replace(partial, made)


def _identity(compiler: str) -> str:
    """What the library depends on: source, flags, jaxlib's headers, compiler and processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    parts = [SOURCE.read_text(), *FLAGS, jaxlib.__version__, os.path.realpath(compiler),
             platform.machine(), processor]  # fmt: skip
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
