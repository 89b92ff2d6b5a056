"""A process that renders chat templates; `chat` starts it and talks to it in lines of JSON.

A template comes with a checkpoint, from anybody. Jinja's sandbox keeps it from Python's
internals; that it also cannot fill the memory, open a file or start a process is left to the
system, whose limits hold for whole processes. How long it may take is for the caller to say, who
ends this process. Nothing of `spire_jax` is imported, so that it starts quickly.
"""

import datetime
import functools
import json
import resource
import sys
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY = 1 << 30  # bytes of address space


class _Generation(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that begin with an underscore."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} begins with an underscore")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: Any = None, sort_keys: bool = False) -> str:  # fmt: skip
    """JSON as it is; Jinja's own filter escapes what HTML would take for tags."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _render(template: str, variables: dict[str, Any], limit: int) -> str:
    parts, length = [], 0
    for part in _compiled(template).generate(**variables):
        parts.append(part)
        length += len(part)
        if length > limit:
            raise jinja2.TemplateError(f"it writes more than {limit} characters")
    return "".join(parts)


def answer(line: str) -> str:
    """The answer to one request, {"template", "variables", "limit"}: {"text"} or {"error"}."""
    try:
        return json.dumps({"text": _render(**json.loads(line))})
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except jinja2.TemplateError as error:
        problem = error.message or type(error).__name__
    except MemoryError:
        problem = f"it needs more than {MEMORY >> 20} MiB of memory"
    except RecursionError:
        problem = "it is nested too deeply, or without end"
    except Exception as error:  # what a template's expressions raise: any of Python's errors
        problem = f"{type(error).__name__}: {error}"
    return json.dumps({"error": problem[:2000]})


# What Python and Jinja import when they first need it: the clock, tracebacks, the codecs.
_WARM_UP = ("{{ x|tojson }}{{ strftime_now('%d %b %Y') }}", "{{ raise_exception('x') }}",
            "{{ 1 / 0 }}", "{% if %}", "{{ x.y.z }}", "{{ ''.__class__ }}",
            "{{ range(10**9) }}")  # fmt: skip


def _main() -> None:
    for template in _WARM_UP:
        answer(json.dumps({"template": template, "variables": {"x": "é"}, "limit": 99}))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # No file is opened, none written, no process started from here on.
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC,
                 resource.RLIMIT_CORE):  # fmt: skip
        resource.setrlimit(kind, (0, 0))
    print("ready", flush=True)
    for line in sys.stdin:
        print(answer(line), flush=True)


if __name__ == "__main__":
    _main()
