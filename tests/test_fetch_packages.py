"""A corpus of wheels by hash: fetched from a folder of wheels here, with pip and no network."""

import hashlib
import pathlib
import zipfile

import pytest

from launch import fetch_packages
from spire_jax.data.corpus import DataError

FILES = {"one": {"one/a.py": "a = 1\n", "one/b/c.py": "c = 2\n", "one/data.txt": "no Python"},
         "two": {"two/__init__.py": "two = 2\n"}}  # fmt: skip


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> dict[str, str]:
    """Two wheels that pip finds without an index; their hashes."""
    folder, hashes = tmp_path / "wheels", {}
    folder.mkdir()
    for name, files in FILES.items():
        info = f"{name}-1.0.dist-info"
        wheel = folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\n"
                             "Version: 1.0\n")  # fmt: skip
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
                             "Tag: py3-none-any\n")  # fmt: skip
            archive.writestr(f"{info}/RECORD", "")
        hashes[name] = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return hashes


def write_list(path: pathlib.Path, hashes: dict[str, str]) -> pathlib.Path:
    path.write_text("".join(f"{n}==1.0 --hash=sha256:{h}\n" for n, h in hashes.items()))
    return path


def test_python_files_come_by_package_and_once(wheels, tmp_path, capsys):
    given, out = write_list(tmp_path / "list.txt", wheels), tmp_path / "data" / "corpus"
    assert fetch_packages.main([f"--list={given}", f"--out={out}"]) == 0
    assert "3 files of 2 packages" in capsys.readouterr().out
    found = {p.relative_to(out).as_posix(): p.read_text() for p in out.rglob("*.py")}
    assert found == {f"{name}/{path}": text for name, files in FILES.items()
                     for path, text in files.items() if path.endswith(".py")}  # fmt: skip
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    given.write_text(f"# a comment\n\n{given.read_text()}")
    assert fetch_packages.fetch(given, out) == {"one": 2, "two": 1}  # left as it is
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == times
    assert [p.name for p in out.parent.iterdir()] == ["corpus"]


def test_wrong_hashes_and_other_folders_are_refused(wheels, tmp_path):
    bad = write_list(tmp_path / "bad.txt", wheels | {"two": "0" * 64})
    with pytest.raises(DataError, match="pip could not download the wheels"):
        fetch_packages.fetch(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file.py").write_text("mine\n")
    given = write_list(tmp_path / "list.txt", wheels)
    with pytest.raises(DataError, match="exists and was not made from"):
        fetch_packages.fetch(given, tmp_path / "mine")
    assert (tmp_path / "mine" / "file.py").read_text() == "mine\n"
    with pytest.raises(SystemExit) as status:
        fetch_packages.main([f"--list={tmp_path / 'none'}", f"--out={tmp_path / 'out'}"])
    assert status.value.code == 2


def test_the_list_in_the_repository_is_pinned():
    lines = pathlib.Path("configs/python_packages.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 40
    for line in packages:
        name, _, digest = line.partition(" --hash=sha256:")
        assert "==" in name and len(digest) == 64
