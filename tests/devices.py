"""Several devices of the host platform: they need a process of their own."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

TESTS = pathlib.Path(__file__).parent


def of(n: int) -> dict[str, str]:
    """The environment of a process with `n` devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={n}"}


def found_by(file: str, n: int, folder: pathlib.Path, *arguments: object) -> dict[str, Any]:
    """What a file of tests, run as `python FILE RESULTS *arguments` with `n` devices, writes to
    RESULTS, as JSON; and what it said, under "stderr"."""
    results = folder / "found.json"
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, file, str(results), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path} | of(n), capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(results.read_text()) | {"stderr": process.stderr}
