"""Chat templates of checkpoints: messages to the text that the model was trained to answer.

A template is a program that somebody else wrote. It is rendered in Jinja's sandbox, in a process
of its own (`chat_worker`) with limits on memory, files, time and output.
"""

import atexit
import json
import pathlib
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spire_jax.pretrained import PretrainedError

SECONDS = 5.0  # a template may take; those of real models take milliseconds
START_SECONDS = 60.0  # the process may take to start; it imports Jinja
MAX_CHARACTERS = 1 << 24  # of a rendered conversation
MAX_TEMPLATE = 1 << 20  # characters of a template


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
    if it asks for what the sandbox withholds, or if it goes beyond SECONDS, MAX_CHARACTERS or
    the memory of `chat_worker`.
    """
    if len(template) > MAX_TEMPLATE:
        raise PretrainedError(
            f"the chat template has {len(template)} characters; more than {MAX_TEMPLATE} are no "
            "template: give the prompt as text"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PretrainedError(
                f'message {i} is {message!r:.80}; give an object with "role" and "content"'
            )
    variables = {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    try:
        request = json.dumps(
            {"template": template, "variables": extra | variables, "limit": MAX_CHARACTERS}
        )
    except (TypeError, ValueError) as error:
        raise PretrainedError(f"messages that are no JSON: {error}; use plain values") from None
    reply = _WORKER.ask(request)
    if "text" not in reply:
        raise PretrainedError(
            f"the chat template cannot be rendered: {reply['error']}; change the messages, or "
            "give the prompt as text"
        )
    return reply["text"]


class _Worker:
    """The process that renders: started when first asked, again after it was ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.stop)

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request, wait for the answer; the process ends where there is none in time."""
        with self._lock:
            process = self._process
            if process is None or process.poll() is not None:
                process = self._start()
            lines = b""
            try:
                self._send(process, request.encode() + b"\n")
                lines = self._line(process, SECONDS)
            except TimeoutError:
                self.stop()
                return {"error": f"it takes longer than {SECONDS:g} s"}
            except OSError:
                pass
            if not lines.endswith(b"\n"):
                self.stop()
                return {"error": "its process ended, for want of memory or by a signal"}
            return json.loads(lines)

    def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        script = pathlib.Path(__file__).with_name("chat_worker.py")
        # -I: neither this directory nor the environment decides what it imports.
        self._process = process = subprocess.Popen(
            [sys.executable, "-I", str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for this process
        )  # fmt: skip
        try:
            ready = self._line(process, START_SECONDS)
        except TimeoutError:
            ready = b""
        if ready != b"ready\n":
            self.stop()
            raise PretrainedError(
                "the process that renders chat templates does not start (its message is above); "
                "is jinja2 installed? Give the prompt as text"
            )
        return process

    @staticmethod
    def _send(process: subprocess.Popen[bytes], request: bytes) -> None:
        """Write all of it: the worker reads a whole line before it does anything else."""
        assert process.stdin is not None
        process.stdin.write(request)
        process.stdin.flush()

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
        """Bytes of the output up to a newline, or to its end; TimeoutError after `seconds`."""
        assert process.stdout is not None
        end, parts = time.monotonic() + seconds, [b""]
        while not parts[-1].endswith(b"\n"):
            left = end - time.monotonic()
            readable, _, _ = select.select([process.stdout], [], [], max(left, 0))
            if not readable:
                raise TimeoutError
            parts.append(process.stdout.raw.read(1 << 16))  # type: ignore[attr-defined]
            if not parts[-1]:
                break
        return b"".join(parts)


_WORKER = _Worker()
