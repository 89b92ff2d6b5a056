"""Work directories in a bucket: what is asked of it before a run, and what is written how."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from buckets import MISSING, Bucket, bucket

from spire_jax.config.schema import ConfigError
from spire_jax.storage.bucket import in_bucket, open_bucket
from spire_jax.storage.paths import locate

# What a process is asked, a line each, it answers with the value of `answer(line)`.
HEAD = """
import json, sys, time
from spire_jax.storage import bucket
from spire_jax.storage.bucket import *
from spire_jax.storage.paths import *
"""
TAIL = """
for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))), flush=True)
"""


@contextlib.contextmanager
def asked(served: Bucket, code: str) -> Iterator[Callable[..., Any]]:
    """A process where `served` is the storage, which is asked as often as one likes."""
    command = [sys.executable, "-c", HEAD + code + TAIL]
    process = subprocess.Popen(command, env=served.environment, text=True, stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def ask(line: Any = None) -> Any:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(line), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline())

    try:
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):  # it has ended by itself
            process.stdin.close()
        process.wait(timeout=60)
        process.stdout.close()


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a", "gs://bucket", "gs://bucket/", "gs:///a", "gs://b/a", "gs://Upper/a",
     "file:///a", "gs://bucket//a"],
)  # fmt: skip
def test_what_is_no_folder_of_a_bucket_is_refused(url):
    with pytest.raises(ConfigError, match="gs://BUCKET/FOLDER"):
        open_bucket(url)


def test_a_folder_stays_what_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate("runs/a") == tmp_path / "runs" / "a" and not in_bucket(locate("runs/a"))
    assert str(locate("gs://bucket/runs/a/")) == "gs://bucket/runs/a"


def test_without_gcsfs_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match="pip install gcsfs"):
        open_bucket("gs://bucket/a")


CHECK = """
def answer(name):
    begin, said = time.monotonic(), ""
    try:
        check_bucket(locate(f"gs://{name}/runs/a"), 2)
    except ConfigError as error:
        said = str(error)
    return said, time.monotonic() - begin
"""


def test_a_bucket_is_tried_before_a_run():
    with bucket() as served, asked(served, CHECK) as ask:
        assert ask("bucket")[0] == "" and served.objects == {}
        for refused in ("POST", "GET", "DELETE", "bucket"):
            served.refused = {refused}
            said, _ = ask("bucket")
            assert "gs://bucket/runs/a cannot be written: no permission (" in said, refused
            assert "roles/storage.objectUser and roles/storage.legacyBucketReader" in said
        served.refused = set()
        said, _ = ask(MISSING)
        assert f"gs://{MISSING}/runs/a cannot be written: there is no such bucket" in said
        served.unknown = True
        said, _ = ask("bucket")
        assert "no credentials (" in said and "gcloud auth application-default login" in said
        served.unknown = False
        for how in ("silent", "dead"):
            setattr(served, how, True)
            said, seconds = ask("bucket")
            assert "gs://bucket/runs/a: no answer in 2 s" in said and seconds < 15


def test_what_is_written():
    """Whole objects; what grows at every push; a folder that is moved over another."""
    code = """
def answer(_):
    here = locate("gs://bucket/run")
    write_whole(here / "a.json", "{}")
    write_whole(here / "report" / "x", "one\\ud800")
    write_whole(here / "report" / "y", "two")
    write_whole(here / "report" / "identity.json", "old")
    with Near(here / "m") as near, (near.path / "l").open("a", buffering=1) as lines:
        lines.write("1\\n2\\n")
        early = (here / "m" / "l").exists()
        near.push()
        lines.write("3\\n")
    write_whole(here / "report-old" / "left", "over")
    move_aside(here / "report", here / "report-old", "identity.json")
    return early
"""
    with bucket() as served, asked(served, code) as ask:
        assert ask() is False
        assert served.objects == {
            "run/a.json": b"{}",
            "run/m/l": b"1\n2\n",
            "run/report-old/x": b"one\\ud800",
            "run/report-old/y": b"two",
            "run/report-old/identity.json": b"old",
        }


def test_a_move_that_is_cut_short_leaves_a_whole_folder():
    """Refused at each of its writes in turn: the old folder with its stamp, or the new one."""
    whole = {"x": b"one", "y": b"two", "identity.json": b"old"}
    code = """
def answer(_):
    here = locate("gs://bucket/run")
    try:
        move_aside(here / "report", here / "kept", "identity.json")
    except OSError:
        return False
    return True
"""
    with bucket() as served, asked(served, code) as ask:
        for writes in range(20):
            served.objects, served.generations = {}, {}
            for name, content in whole.items():
                served.put(f"run/report/{name}", content)
            served.writes_left = writes
            if ended := ask():
                break
            old, new = (
                {name: served.objects.get(f"run/{folder}/{name}") for name in whole}
                for folder in ("report", "kept")
            )
            assert old == whole or (new == whole and old["identity.json"] is None), writes
        assert ended and writes > 2 * len(whole)  # an upload takes two
        assert served.objects == {f"run/kept/{name}": content for name, content in whole.items()}


def test_a_model_counts_when_its_last_object_is_there():
    code = """
import jax.numpy as jnp
from spire_jax.storage.checkpoints import *
here, params, identity = "gs://bucket/run/target/params", {"a": jnp.arange(6.0)}, {"steps": 3}

def answer(save):
    if save:
        save_params(here, params, identity)
    try:
        return has_params(here), load_params(here, expected_identity=identity)["a"].tolist()
    except CheckpointError as error:
        return has_params(here), str(error)
"""
    whole = [True, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]
    with bucket() as served, asked(served, code) as ask:
        assert ask(True) == ask(True) == whole
        del served.objects["run/target/params/commit_success.txt"]
        there, said = ask(False)
        assert not there and said.startswith("there is no model in gs://bucket/run/target/params")
        assert ask(True) == whole


def test_checkpoints_whose_objects_are_missing():
    """Without the last object one was never finished; without another one it is put aside."""
    code = """
import warnings
import jax.numpy as jnp
from spire_jax.storage.checkpoints import *

def answer(steps):
    with warnings.catch_warnings(record=True) as said, Checkpoints(
            "gs://bucket/run/checkpoints", kept=3, identity={"a": 1}) as kept:
        warnings.simplefilter("always")
        for step in steps:
            kept.save(step, {"x": jnp.full(4, step), "n": step})
        found = kept.restore({"x": jnp.zeros(4, int), "n": 0})
        said = [str(warning.message) for warning in said]
        return found and [found[0], found[1]["x"].tolist(), found[1]["n"]], said, kept.steps()
"""
    with bucket() as served, asked(served, code) as ask:
        assert ask([1, 2, 3]) == [[3, [3] * 4, 3], [], [1, 2, 3]]
        del served.objects["run/checkpoints/3/commit_success.txt"]
        assert ask([]) == [[2, [2] * 4, 2], [], [1, 2]]
        for name in [n for n in served.objects if n.startswith("run/checkpoints/2/arrays/d/")]:
            del served.objects[name]
        found, said, steps = ask([])
        assert found == [1, [1] * 4, 1] and steps == [1]
        assert any("checkpoint gs://bucket/run/checkpoints/2 is torn or unreadable" in text
                   for text in said)  # fmt: skip
        assert ask([2]) == [[2, [2] * 4, 2], [], [1, 2]]


def test_rows_of_continuations_in_a_bucket():
    code = """
import numpy as np
from spire_jax.training import continuations as c

def answer(rows):
    here = locate("gs://bucket/run/continuations")
    array = c._Rows(here, c.TOKENS, (200, 3), np.dtype(np.uint16), rows == 0)
    array.write(rows, np.arange(rows * 3, rows * 3 + 150).reshape(50, 3))
    return c._read(here, c.TOKENS).tolist(), str(c._read(here, c.TOKENS).dtype)
"""
    with bucket() as served, asked(served, code) as ask:
        for rows in (0, 50, 100, 150):
            found, kind = ask(rows)
            n = (rows + 50) * 3
            assert [x for row in found for x in row] == [*range(n), *[0] * (600 - n)]
            assert kind == "uint16"


def test_of_two_runs_the_later_one_goes_on():
    code = """
bucket.LOOK_FOR_OWNER = 0.3
held = owned(locate("gs://bucket/run"))

def answer(to_do):
    held.__enter__() if to_do == "begin" else held.__exit__(None, None, None)
    return to_do
"""
    with bucket() as served, asked(served, code) as first, asked(served, code) as second:
        first("begin")
        mark = served.objects["run/.owner"]
        second("begin")
        assert served.objects["run/.owner"] != mark
        with pytest.raises((ValueError, OSError)):  # it has ended
            first("end")
        assert set(served.objects) == {"run/.owner"}
        second("end")
        assert served.objects == {}
