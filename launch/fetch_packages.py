"""A pinned corpus: the Python files of packages by name, version and hash.

    python -m launch.fetch_packages --list=configs/python_packages.txt --out=data/python_packages

The list is one of pip's, every line ``name==version --hash=sha256:...`` of a pure-Python wheel.
pip downloads and checks the wheels (nothing is installed or run); their ``.py`` files are put into
a folder per package, so that ``data.split="folder"`` splits them by package. The same list gives
the same files everywhere. A folder made from the same list is left as it is.
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence

from spire_jax.config.files import ends_in_a_line
from spire_jax.config.paths import local_path
from spire_jax.config.schema import ConfigError
from spire_jax.data.corpus import DataError
from spire_jax.storage.paths import read_record

STAMP = ".packages.json"  # hidden: no part of the corpus
# Wheels for any platform and any Python 3 from 3.11 on, so that every machine takes the same ones.
PURE = ["--only-binary=:all:", "--platform=any", "--implementation=py", "--abi=none",
        "--python-version=3.11"]  # fmt: skip


def fetch(packages: pathlib.Path, out: pathlib.Path) -> dict[str, int]:
    """Make `out` from the list `packages`; the number of files of each package.

    Raises:
        DataError: a list that is missing, a folder that holds something else, or wheels that pip
            cannot get as listed.
    """
    if not packages.is_file():
        raise DataError(f"--list={packages} is no file; name a list of pip's, such as "
                        f"configs/python_packages.txt")  # fmt: skip
    try:
        text = packages.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--list={packages} is no text ({error}); name a list of pip's") from None
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    listed = "".join(f"{line}\n" for line in lines if line and not line.startswith("#"))
    made_from = hashlib.sha256(listed.encode()).hexdigest()
    if out.exists():
        stamp = out / STAMP
        found = read_record(stamp) if stamp.is_file() else {}
        if found.get("list_sha256") == made_from:
            return found["files"]
        raise DataError(f"--out={out} exists and was not made from {packages}; remove it, or name "
                        f"another folder")  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result, so that the last step is one rename: a folder is whole or not there.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        wheels, folder = pathlib.Path(temporary) / "wheels", pathlib.Path(temporary) / "files"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   "--disable-pip-version-check", "--require-hashes", *PURE,
                   f"--requirement={packages}", f"--dest={wheels}"]  # fmt: skip
        if subprocess.run(command).returncode:
            raise DataError(f"pip could not download the wheels of {packages} (its message is "
                            f"above); is there a network? Then start again")  # fmt: skip
        files = {}
        for wheel in sorted(wheels.glob("*.whl")):
            name = wheel.name.split("-")[0]
            files[name] = unpack(wheel, folder / name)
        stamp_text = json.dumps({"list_sha256": made_from, "files": files}, indent=1)
        (folder / STAMP).write_text(stamp_text)
        shutil.move(folder, out)
    return files


def unpack(wheel: pathlib.Path, folder: pathlib.Path) -> int:
    """Write a wheel's Python files below `folder`; how many there are."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.infolist() if m.filename.endswith(".py")]
        for member in members:
            archive.extract(member, folder)  # never outside `folder`, whatever the name
    return len(members)


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m launch.fetch_packages", None, __doc__, formatter_class=raw
    )
    parser.add_argument("--list", type=local_path, required=True, help="a requirements file")
    parser.add_argument("--out", type=local_path, required=True, help="the corpus's folder")
    args = parser.parse_args(argv)
    with ends_in_a_line(ConfigError, DataError, zipfile.BadZipFile):
        files = fetch(args.list, args.out)
    print(f"{args.out}: {sum(files.values())} files of {len(files)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
