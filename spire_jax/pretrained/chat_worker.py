"""A process that renders chat templates; `chat` starts it and talks to it in lines of JSON.

A template comes with a checkpoint, from anybody. Jinja's sandbox keeps it from Python's
internals; that it cannot fill the memory, go on without end, open a file or start a process is
left to the system, whose limits hold for whole processes. Where the system bounds no memory (macOS
does not), `chat` looks at it from outside; a first line says so. Nothing of `spire_jax` is
imported, so that it starts quickly; the arguments are the folders that Jinja is in.
"""

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

if __name__ == "__main__":
    sys.path.extend(sys.argv[1:])

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 1 << 30  # bytes of address space; where that has no bound, of memory in use
CHARACTERS = 1 << 24  # of a rendered conversation


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
    """JSON as it is; Jinja's own filter escapes what HTML would take for tags."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **how)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment.from_string(template)


def answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """{"text": the conversation}, or {"error": what is wrong with the template}."""
    try:
        text = _compiled(template).render(variables)
    except Exception as error:  # what a template's expressions raise: any of Python's errors
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"error": f"{line}{type(error).__name__}: {error}"[:2000]}
    if len(text) > CHARACTERS:
        return {"error": f"it writes more than {CHARACTERS} characters"}
    return {"text": text}


def bound_process() -> bool:
    """Give up files, output to them and processes; whether the system bounds memory, too."""
    for kind in ("NOFILE", "FSIZE", "NPROC", "CORE"):
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (0, 0))
    if sys.platform == "darwin":  # which refuses RLIMIT_AS, or takes it and holds nobody to it
        return False
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ValueError, OSError):
        return False
    return True


def main() -> None:
    # Codecs, the clock and tracebacks are imported when first needed.
    for template in ("{{ 'x' }}{{ strftime_now('%d %b %Y') }}", "{{ 1 / 0 }}", "{% if %}"):
        answer(template, {})
    print(json.dumps({"bounded": bound_process(), "memory": MEMORY}), flush=True)
    for line in sys.stdin:
        seconds, *request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # ends the process
        reply = json.dumps(answer(*request))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main()
