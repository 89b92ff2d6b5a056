"""Who may import whom (pyproject.toml, importlinter): the order of the folders, and no circle."""

import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def lint(folder: pathlib.Path) -> tuple[int, str]:
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(folder), "PATH": ""},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    "file, planted, said",
    [
        (None, "", ""),
        ("spire_jax/config/checks.py", "import spire_jax.models.masks\n", "A folder imports only"),
        ("spire_jax/models/masks.py", "import spire_jax.models.caches\n", "No circle"),
        ("pallas_kernels/heads.py", "import spire_jax\n", "Kernels import nothing"),
    ],
)
def test_the_order_of_the_house(tmp_path, file, planted, said):
    for name in ("spire_jax", "pallas_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if file:
        with open(tmp_path / file, "a") as source:
            source.write(planted)
    status, output = lint(tmp_path)
    assert (status == 0) == (file is None), output
    assert f"{said}" in output and (not file or f"{said}" in output.split("BROKEN")[0]), output
