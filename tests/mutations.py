"""What property tests do to valid content, and the bounds and errors that they hold code to."""

import contextlib
import copy
import json
import pathlib
import resource
import signal
import struct

from hypothesis import strategies as st

from spire_jax.config import files

SECONDS = 20


@contextlib.contextmanager
def bounded(mib: int = 512):
    """Whatever an input holds, it takes no more time, nor more memory beside what was taken before.

    The system refuses what is beyond, as a MemoryError; to count it is slow. The stacks of threads
    are memory, too: 8 MiB each.
    """

    def late(*_):
        raise AssertionError(f"it takes longer than {SECONDS} s")

    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_DATA)
    statm = pathlib.Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + mib * 2**20, limits[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@contextlib.contextmanager
def named(*kinds: type[Exception], of: object = "", mib: int = 512):
    """Nothing but these errors, each a line that says something, about `of`; all in bounds."""
    try:
        with bounded(mib):
            yield
    except kinds as error:
        said = files.in_words(error)
        assert said.isprintable() and 20 < len(said) < 3000 and str(of) in said, said


# --- what is done to valid content ---------------------------------------------------------------

EXTREMES = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64 - 1]
NUMBERS = st.one_of(
    st.sampled_from([*EXTREMES, *(-x for x in EXTREMES), 10**400]), st.integers(-9, 9), st.floats()
)
# What Python's own values cannot be, or not without trouble in the test: written when dumped.
DEEP, LONG = "<nested 95 times>", "<5000 digits>"
LEAVES = st.one_of(
    st.sampled_from([None, True, False, DEEP, LONG, "\ud800", "x" * 4000]),
    NUMBERS,
    st.text(max_size=9),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
WHOLE = [b"", b"[]", b"{}", b"null", b'"error"', b"1" * 5000, b"[" * 10**5, b'{"a":' * 10**5]


def dumped(value) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    text = text.replace(f'"{DEEP}"', "[" * 95 + "]" * 95).replace(f'"{LONG}"', "1" * 5000)
    return text.encode(errors="surrogatepass")


@st.composite
def noise(draw, content: bytes, end: int | None = None) -> bytes:
    """Bytes changed, put in, taken out, and the rest cut off, before `end`."""
    out, end = bytearray(content), end or len(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(end, len(out))))
        what = draw(st.sampled_from(["byte", "number", "insert", "remove", "cut"]))
        if what == "byte":
            out[at : at + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x7D]))])
        elif what == "number":
            kind = draw(st.sampled_from(["<I", "<Q", "<d"]))
            value = draw(st.sampled_from(EXTREMES)) % 2 ** (8 * struct.calcsize(kind))
            packed = struct.pack(kind, float(value) if kind == "<d" else value)
            out[at : at + len(packed)] = packed
        elif what == "insert":
            out[at:at] = draw(st.binary(max_size=9))
        elif what == "remove":
            del out[at : at + draw(st.integers(1, 30))]
        elif draw(st.integers(0, 3)) == 0:
            del out[at:]
    return bytes(out)


def places(value, path=()):
    """Every path into nested lists and objects."""
    yield path
    inner = [*value.items()] if isinstance(value, dict) else []
    inner = [*enumerate(value)] if isinstance(value, list) else inner
    for key, item in inner if len(inner) < 40 else inner[:3]:  # of a vocabulary some are as good
        yield from places(item, (*path, key))


@st.composite
def edited(draw, value):
    """Nested JSON with one to three values replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "double"]))
        old = parent[path[-1]]
        if what == "replace":
            near = [-old, old + 1, old * 1000, str(old)] if type(old) is int else [[old], {"": old}]
            parent[path[-1]] = draw(st.sampled_from(near) | JSON)
        elif what == "remove":
            del parent[path[-1]]
        elif what == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=9))] = parent.pop(path[-1])
        elif isinstance(parent, list):
            parent.append(old)
    return value


def changed(value):
    """The JSON of a value, or what is left of it."""
    whole = st.sampled_from(WHOLE) | JSON.map(dumped)
    return edited(value).map(dumped) | edited(value).map(dumped) | noise(dumped(value)) | whole


@contextlib.contextmanager
def replaced(path: pathlib.Path, content: bytes):
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def mutated(path: pathlib.Path, data):
    """Within it a file of JSON is another."""
    return replaced(path, data.draw(changed(json.loads(path.read_text()))))
