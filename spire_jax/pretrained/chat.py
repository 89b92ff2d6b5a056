"""Chat templates of checkpoints: messages to the text that the model was trained to answer.

A template is a program that somebody else wrote. It is rendered in Jinja's sandbox, in a process
of its own (`chat_worker`) with limits on time, memory, files and output.
"""

import atexit
import functools
import json
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from spire_jax.pretrained import PretrainedError

SECONDS = 5.0  # a template may take; those of real models take milliseconds
_LOCK = threading.Lock()


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
        worker = _worker()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            print(request, file=worker.stdin, flush=True)
            return json.loads(worker.stdout.readline())
        except BaseException as error:  # it has ended, or we were interrupted: its answer is old
            _worker.cache_clear()
            _end(worker)
            if not isinstance(error, OSError | ValueError):
                raise
            late = worker.returncode == -signal.SIGALRM
            return {"error": f"it takes longer than {SECONDS:g} s" if late else
                    f"its process ended with status {worker.returncode}"}  # fmt: skip


@functools.cache
def _worker() -> subprocess.Popen[str]:
    """The process that renders; it goes with this one."""
    script = pathlib.Path(__file__).with_name("chat_worker.py")
    # -I: neither this directory nor the environment decides what it imports.
    worker = subprocess.Popen(
        [sys.executable, "-I", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,  # a Ctrl-C is for this process
    )  # fmt: skip
    atexit.register(_end, worker)
    return worker


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.communicate()
