"""What both kernels take, and the errors that say so."""

HEAD_DIMS = (32, 64, 128, 256)
GPU_HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 16
MAX_TOKENS = 16  # new tokens of a row that decode attention takes
DTYPES = ("bfloat16", "float32")


def unsupported_heads(head_dim: int, q_per_kv: int) -> str:
    """Why the kernels cannot take these heads; nothing if they can."""
    if head_dim not in HEAD_DIMS:
        return f"head dimension {head_dim}: the kernel takes {', '.join(map(str, HEAD_DIMS))}"
    if not 1 <= q_per_kv <= MAX_GROUP:
        return f"{q_per_kv} query heads per KV head: the kernel takes 1 to {MAX_GROUP}"
    return ""


def check_implementation(implementation: str, known: tuple[str, ...]) -> None:
    """ValueError for a name that is none of the implementations."""
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r}; there are {', '.join(known)}")


def check_types(q, k, v) -> None:
    """ValueError unless all three have one type that the kernels take."""
    if len({x.dtype for x in (q, k, v)}) > 1 or str(q.dtype) not in DTYPES:
        raise ValueError(
            f"queries {q.dtype}, keys {k.dtype}, values {v.dtype}: expected one type for all, "
            f"{' or '.join(DTYPES)}"
        )


def check_window(window: int | None, sink: int) -> None:
    """ValueError for a window under 1, and for sinks that no window needs."""
    if window is not None and window < 1:
        raise ValueError(f"window={window}: it counts the query itself, so at least 1; None = all")
    if sink < 0 or (sink and window is None):
        raise ValueError(f"sink={sink}, window={window}: sinks are 0 or more, beyond a window only")
