"""A bucket of Google's storage (gs://...): whether it can be written, whether it still answers.

gcsfs reaches it for files, TensorStore for arrays, Google's own client tells Orbax the bucket's
kind; each has credentials, errors and patience of its own.
"""

import contextlib
import logging
import multiprocessing.pool
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Iterator

from etils import epath

from spire_jax.config.schema import ConfigError

SECONDS = 20.0  # until a bucket must have answered all that is asked of it before a run
SILENCE = 10.0  # seconds without a byte, after which gcsfs sends a request again
LOOK_AFTER, PATIENCE = 2.0, 25.0  # seconds: when a save is looked after, and given up
OWNER, LOOK_FOR_OWNER = ".owner", 4.0  # a run's mark in its folder; seconds between two looks
NEEDED = ("roles/storage.objectUser and roles/storage.legacyBucketReader, or "
          "roles/storage.admin, on the bucket")  # fmt: skip
_URL = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]/[^/\0\r\n][^\0\r\n]*")


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is in a bucket."""
    return os.fspath(path).startswith("gs://")


def open_bucket(url: str) -> epath.Path:
    """The path that gs://BUCKET/FOLDER names; nothing is asked of the bucket yet.

    Raises:
        ConfigError: another URL, a name that no bucket can have, or no gcsfs.
    """
    if not _URL.fullmatch(url):
        raise ConfigError(f"--workdir={url}: give a folder, or gs://BUCKET/FOLDER, a bucket's name "
                          f"and a folder in it; no other storage is supported")  # fmt: skip
    # Its own probing of a bucket's kind needs another service, and one more permission.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        import aiohttp
        import fsspec
        import gcsfs  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--workdir={url} needs gcsfs ({error}): pip install gcsfs") from error
    own = {
        "use_listings_cache": False,  # other processes write, too
        "requests_timeout": aiohttp.ClientTimeout(None, sock_connect=SILENCE, sock_read=SILENCE),
    }
    fsspec.config.conf["gcs"] = {**own, **fsspec.config.conf.get("gcs", {})}
    # They log with a traceback what they then raise.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(url.rstrip("/"))


def check_bucket(folder: epath.Path, seconds: float = SECONDS) -> None:
    """Write, read, list and delete an object below `folder`, by all that a run uses for it.

    Raises:
        ConfigError: one of these failed, or took too long; says what to do.
    """
    with watched(folder):  # the end of the process, too
        # A thread that nobody waits for: no request has a time limit over all its repetitions.
        asked = multiprocessing.pool.ThreadPool(1).apply_async(_probe, (folder,))
        try:
            asked.get(seconds)
        except multiprocessing.TimeoutError as error:
            raise ConfigError(f"--workdir={folder}: no answer in {seconds:.0f} s; check that this "
                              f"machine reaches storage.googleapis.com") from error  # fmt: skip
        except Exception as error:
            raise ConfigError(f"--workdir={folder} cannot be written: {_remedy(error)}") from error


def _probe(folder: epath.Path) -> None:
    # Not above, as everything here that only runs in a bucket need.
    import tensorstore as ts
    from google.cloud import storage  # comes with gcsfs

    url = os.fspath(folder)
    probe = folder / f".probe-{secrets.token_hex(4)}"
    probe.write_bytes(b"probe")
    with contextlib.ExitStack() as stack:
        stack.callback(probe.unlink)
        found = ts.KvStore.open(f"{url}/").result().read(probe.name).result()
        if found.value != b"probe" or probe not in list(folder.iterdir()):
            raise OSError("an object that was written is not there")
        storage.Client().get_bucket(url.split("/")[2])


@contextlib.contextmanager
def watched(path: str | os.PathLike[str]) -> Iterator[None]:
    """Within it, a bucket that no longer answers ends the process: a message, and status 2.

    TensorStore, which writes checkpoints, asks again for a quarter of an hour, in threads that the
    end of a process waits for; so an exception does not end the watch. Outside of buckets nothing
    happens.
    """
    if not in_bucket(path):
        yield
        return
    done = threading.Event()
    threading.Thread(target=_watch, args=(os.fspath(path), done), daemon=True).start()
    yield
    done.set()


def _watch(url: str, done: threading.Event) -> None:
    import tensorstore as ts

    while not done.wait(LOOK_AFTER):
        try:
            store = ts.KvStore.open(f"{url}/").result(timeout=PATIENCE)
            store.read(".is-anybody-there").result(timeout=PATIENCE)
        except Exception as error:
            late = isinstance(error, TimeoutError)
            said = f"no answer in {PATIENCE:.0f} s" if late else _remedy(error)
            if not done.is_set():
                _give_up(f"{url}: {said}; what was complete before is intact: start again to "
                         f"resume")  # fmt: skip


def _give_up(message: str) -> None:
    """End the process, whatever other threads wait for."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)


@contextlib.contextmanager
def owned(folder: epath.Path) -> Iterator[None]:
    """Within it, the folder is this run's: of two runs the one that comes later goes on.

    A bucket has no locks that a kill releases. So a run leaves its mark, and ends itself, with a
    message and status 2, when it finds another one's. Whoever finds a mark waits until a run that
    might still be there has seen the new one.
    """
    place, mine, done = folder / OWNER, secrets.token_hex(8), threading.Event()

    def look() -> None:
        while not done.wait(LOOK_FOR_OWNER):
            with contextlib.suppress(Exception):  # `watched` looks after the bucket
                if place.read_text() != mine and not done.is_set():
                    _give_up(f"another run has begun in {folder}, and goes on alone; choose "
                             f"another --workdir")  # fmt: skip

    def leave() -> None:
        with contextlib.suppress(Exception):
            if place.read_text() == mine:
                place.unlink()

    left = place.exists()
    place.write_text(mine)
    if left:
        time.sleep(2 * LOOK_FOR_OWNER)
    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        # Not for long: the bucket may have been what failed.
        leaving = threading.Thread(target=leave, daemon=True)
        leaving.start()
        leaving.join(LOOK_FOR_OWNER)


def trouble(error: BaseException) -> str | None:
    """What to say of an error of the libraries that reach buckets; None of any other."""
    found: BaseException | None = error
    while found is not None:
        if type(found).__module__.split(".")[0] in ("gcsfs", "aiohttp", "google", "requests"):
            return f"the bucket of the work directory failed: {_remedy(found)}"
        found = found.__cause__
    return None


def _remedy(error: BaseException) -> str:
    """What a bucket's error means, and what to do."""
    # TensorStore's messages end with a specification.
    said = re.sub(r"\s+", " ", str(error).split(" [")[0]).strip()[:300] or type(error).__name__
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, FileNotFoundError) or kind.endswith("NotFound"):
        return f"there is no such bucket ({said}); create it, or correct its name"
    if getattr(error, "code", None) == 401 or "Anonymous" in said or kind.startswith("google.auth"):
        return (f"no credentials ({said}); on your machine: gcloud auth application-default login, "
                f"on a VM: give it a service account, and the scope cloud-platform")  # fmt: skip
    if "Project was not passed" in said:
        return "no project; set GOOGLE_CLOUD_PROJECT to the bucket's"
    if "Forbidden" in f"{kind} {said}" or "PERMISSION_DENIED" in said:
        return f"no permission ({said}); give the account {NEEDED}"
    return f"{said}; check bucket, network and credentials"
