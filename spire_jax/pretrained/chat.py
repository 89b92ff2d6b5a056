"""Chat templates of checkpoints: messages to the text that the model was trained to answer.

A template is a program that somebody else wrote. It is rendered in Jinja's sandbox, in a process
of its own (`chat_worker`) with limits on time, memory, files and output. The system holds it to
them; only its memory, where the system bounds none (macOS), is looked at from here, while it works,
and the process is killed beyond the same limit.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from spire_jax.pretrained import PretrainedError

SECONDS = 5.0  # a template may take; those of real models take milliseconds
# Code points that no text holds: they mark places in messages while a template is rendered.
_MARKS = [chr(i) for i in range(0xFDD0, 0xFDF0)]
_SPACE = "\u2003"  # white space that no template writes
LOOK = 0.05  # seconds between two looks at its memory; in one it fills a few hundred MB
WORKER = pathlib.Path(__file__).with_name("chat_worker.py")
_LOCK = threading.Lock()


class _Worker(NamedTuple):
    """The process that renders."""

    process: subprocess.Popen[str]
    memory: int | None  # bytes that it may take and nobody else holds it to; None: the system does


def choose_template(value: Any, where: str) -> str | None:
    """The template for a plain conversation in the `chat_template` of a tokenizer's config.

    `value`: none, one template, or a list of {"name", "template"} of which "default" is taken.
    `where` names the file in errors.
    """
    if value is None or isinstance(value, str):
        return value
    named = None
    if isinstance(value, list):
        value = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
    if isinstance(value, dict):
        named = value.get("default")
    if not isinstance(named, str):
        names = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise PretrainedError(
            f"{where}: the chat_template has none that is called 'default', but {names}; "
            "give one template as a string"
        )
    return named


def text_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with every content a string, which all templates can show.

    What else it may be in the field's requests: a list of text parts becomes its texts in lines,
    as vLLM and llama.cpp have it; the null of an assistant that only called tools, "". Most
    templates would write Python's notation of either into the prompt. PretrainedError, naming the
    message, for a part that is no text and for any other content.
    """
    found = []
    for at, message in enumerate(messages):
        where, content = f"messages[{at}].content", message.get("content")
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, list):
            content = "\n".join(_text(part, f"{where}[{i}]") for i, part in enumerate(content))
        if not isinstance(content, str):
            raise PretrainedError(
                f"{where} is {content!r:.80}; give a string, or a list of text parts"
            )
        found.append({**message, "content": content})
    return found


def _text(part: Any, where: str) -> str:
    kind, text = (part.get("type"), part.get("text")) if isinstance(part, dict) else (None, None)
    if kind == "text" and isinstance(text, str):
        return text
    what = f"of type {kind!r:.80}" if kind not in (None, "text") else f"{part!r:.80}"
    raise PretrainedError(
        f'{where} is {what}; the model reads text alone: give {{"type": "text", "text": ...}}'
    )


def unused_marks(count: int, *values: Any) -> list[str]:
    """Characters that mark places in `values` and are not in them; PretrainedError if all are."""
    spelled = json.dumps(values, ensure_ascii=False, default=str)
    found = [mark for mark in _MARKS if mark not in spelled][:count]
    if len(found) < count:
        raise PretrainedError("the messages hold nearly all of U+FDD0 to U+FDEF; remove those")
    return found


def render_messages(template: str, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
    """`render` of `text_messages`, in parts for a template that looks for texts in nothing else.

    Such a one (Llama Guard 3's) finds nothing in a string and says nothing.
    """
    text = render(template, messages, **extra)
    last = messages[-1]["content"].strip() if messages else ""
    if last in text:
        return text
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    try:
        again = render(template, parts, **extra)
    except PretrainedError:
        return text
    return again if last in again and str(parts[-1]["content"]) not in again else text


def render_unfinished(template: str, messages: Sequence[Mapping[str, Any]], **extra: Any) -> str:
    """`render_messages` up to the end of the last one, for the model to go on with it.

    As `transformers` with `continue_final_message`: white space at the message's end is kept
    where the template keeps it. PretrainedError for a message that cannot be continued.
    """
    *before, last = messages
    (mark,) = unused_marks(1, template, messages, extra)
    content = last["content"]
    marked = {**last, "content": content + mark + _SPACE}
    text = render_messages(template, [*before, marked], add_generation_prompt=False, **extra)
    begin, found, rest = text.rpartition(mark)
    if not found or last.get("tool_calls"):
        raise PretrainedError(
            "the last message is the assistant's, to be continued, and "
            + ("it calls tools; add what they answer" if found else "the chat template does not "
               "show it; end with another message")
        )  # fmt: skip
    if not rest.startswith(_SPACE) and content.strip():  # it was trimmed
        begin = begin.removesuffix(content[len(content.rstrip()) :])
    return begin.replace(mark + _SPACE, "").replace(mark, "")  # of a template that shows it twice


def render(
    template: str,
    messages: Sequence[Any],
    *,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The conversation as text, special tokens spelled out, as `template` has it.

    `messages`: {"role": ..., "content": ...} in order. `extra`: what else the template may use,
    as `bos_token`, `eos_token`, `tools`. All of it is JSON; a template sees nothing else.
    PretrainedError if the template is wrong or refuses the messages (its own words are given),
    if it asks for what the sandbox withholds, or if it goes beyond the limits of `chat_worker`.
    """
    values = {**extra, "messages": messages, "add_generation_prompt": add_generation_prompt}
    reply = _ask(json.dumps([SECONDS, template, values]))
    if "text" not in reply:
        raise PretrainedError(
            f"the chat template cannot be rendered: {reply['error']}; change the messages, or "
            "give the prompt as text"
        )
    return reply["text"]


def _ask(request: str) -> dict[str, str]:
    """The worker's answer to a line."""
    with _LOCK:
        worker, memory = _worker()
        assert worker.stdin is not None and worker.stdout is not None
        beyond: list[str] = []
        try:
            print(request, file=worker.stdin, flush=True)
            with _watched(worker, memory, beyond) if memory else contextlib.nullcontext():
                line = worker.stdout.readline()
            return json.loads("" if beyond else line)
        except BaseException as error:  # it has ended, or we were interrupted: its answer is old
            _worker.cache_clear()
            _end(worker)
            if not isinstance(error, OSError | ValueError):
                raise
            late = worker.returncode == -signal.SIGALRM
            return {"error": f"it takes longer than {SECONDS:g} s" if late else
                    beyond[0] if beyond else
                    f"its process ended with status {worker.returncode}"}  # fmt: skip


@functools.cache
def _worker() -> _Worker:
    """The process that renders; it goes with this one. PretrainedError if it does not start."""
    # -I, -S: neither this directory nor the environment decides what it imports, and it has Jinja
    # from where this process has it, however that came here.
    needed = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {pathlib.Path(spec.origin).parents[1] for spec in needed if spec and spec.origin}
    command = [sys.executable, "-I", "-S", *map(str, [WORKER, *sorted(folders)])]
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,  # a Ctrl-C is for this process
        )  # fmt: skip
    except (OSError, TypeError) as error:  # of no sys.executable, too
        raise PretrainedError(_not_started(str(error))) from error
    atexit.register(_end, process)
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        _end(process)
        raise PretrainedError(_not_started(f"its status is {process.returncode}, its own message "
                                           f"is above"))  # fmt: skip
    told = json.loads(line)
    return _Worker(process, None if told["bounded"] else told["memory"])


def _not_started(why: str) -> str:
    return (f"chat templates are rendered by a process of {sys.executable} with jinja2, which does "
            f"not start ({why}); install jinja2 there, or give prompts as text")  # fmt: skip


@contextlib.contextmanager
def _watched(worker: subprocess.Popen[str], most: int, beyond: list[str]) -> Iterator[None]:
    """Within it the worker is killed beyond `most` bytes of memory; `beyond` gets the reason."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(LOOK):
            used = _memory_of(worker.pid)
            if used is not None and used <= most:
                continue
            if worker.poll() is None:
                beyond.append("its memory cannot be looked at, for which `ps` is needed"
                              if used is None else
                              f"MemoryError: it takes more than {most >> 20} MiB")  # fmt: skip
                worker.kill()
            return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _memory_of(pid: int) -> int | None:
    """Bytes of memory that a process uses; None if that cannot be told."""
    try:
        asked = ["ps", "-o", "rss=", "-p", str(pid)]
        return 1024 * int(subprocess.run(asked, capture_output=True, text=True).stdout)
    except (OSError, ValueError):
        return None


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()
