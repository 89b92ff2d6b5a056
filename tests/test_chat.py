"""Chat templates: rendered as transformers renders them, and harmless whoever wrote them."""

import functools
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import time

import jinja2
import pytest

from spire_jax.pretrained import PretrainedError, chat
from spire_jax.pretrained.chat import (
    choose_template,
    render,
    render_messages,
    render_unfinished,
    text_messages,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 < 2 & 'é' 😀?"},
]
CHATML = (
    "{% for message in messages %}\n"
    "    {% if loop.first and message['role'] != 'system' %}\n"
    "<|im_start|>system\nDefault<|im_end|>\n"
    "    {% endif %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message.content | trim + '<|im_end|>\\n' }}"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_a_conversation_becomes_the_text_of_its_template():
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    user = "<|im_start|>user\n1 < 2 & 'é' 😀?<|im_end|>\n"
    assert render(CHATML, MESSAGES) == system + user + "<|im_start|>assistant\n"
    assert render(CHATML, MESSAGES, add_generation_prompt=False) == system + user
    default = "<|im_start|>system\nDefault<|im_end|>\n"
    assert render(CHATML, MESSAGES[1:], add_generation_prompt=False) == default + user


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ bos_token }}{{ messages[1].content }}", "<s>1 < 2 & 'é' 😀?"),
        ("{{ messages[1]|tojson }}", '{"role": "user", "content": "1 < 2 & \'é\' 😀?"}'),
        ("{{ {'b': 1, 'a': 2}|tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}", "x"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
         "{% endfor %}{{ ns.n }}", "2"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{{ strftime_now('%Y')|int > 2000 }}{{ tools is defined }}", "TrueTrue"),
    ],
)  # fmt: skip
def test_what_templates_may_use(template, text):
    assert render(template, MESSAGES, bos_token="<s>", tools=[]) == text


@pytest.mark.parametrize(
    "template, words",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("x\n{% if %}", "line 2"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ 'a' * (2**24 + 1) }}", "more than 16777216 characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ nothing.at_all }}", "'nothing' is undefined"),
    ],
)
def test_what_templates_may_not(template, words):
    with pytest.raises(PretrainedError, match=words):
        render(template, MESSAGES)
    assert render("still {{ 'here' }}", MESSAGES) == "still here"


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat, "SECONDS", 0.5)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    begin = time.monotonic()
    with pytest.raises(PretrainedError, match=r"longer than 0\.5 s"):
        render(loop, MESSAGES)
    assert time.monotonic() - begin < 5
    monkeypatch.undo()
    assert render("{{ 'again' }}", MESSAGES) == "again"


def test_no_file_is_opened_even_outside_the_sandbox():
    """What a hole in the sandbox would reach: the process itself can open nothing."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1])['main'](); open('/etc/passwd')"
    script = chat.__file__.replace("chat.py", "chat_worker.py")
    run = subprocess.run(
        [sys.executable, "-c", code, script], input="", capture_output=True, text=True
    )
    assert "Too many open files" in run.stderr


def test_contents_become_strings():
    """Parts in lines, as vLLM and llama.cpp give them to a template; a call's null as nothing."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "c"}, call]
    assert text_messages(messages) == [
        {"role": "user", "content": "a\nb"}, {"role": "user", "content": "c"},
        {**call, "content": ""},
    ]  # fmt: skip
    assert messages[0]["content"] is parts


@pytest.mark.parametrize(
    "content, words",
    [
        (5, r"messages\[1\].content is 5; give a string, or a list of text parts"),
        (None, r"messages\[1\].content is None; give a string"),
        ({"type": "text", "text": "a"}, "content is {'type': 'text'"),
        (["a"], r"messages\[1\].content\[0\] is 'a'; the model reads text alone"),
        ([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}],
         r"messages\[1\].content\[1\] is of type 'image_url'; the model reads text alone"),
        ([{"type": "text", "text": None}], r"content\[0\] is {'type': 'text', 'text': None}"),
    ],
)  # fmt: skip
def test_contents_that_are_no_text_are_named(content, words):
    with pytest.raises(PretrainedError, match=words):
        text_messages([MESSAGES[0], {"role": "user", "content": content}])
    with pytest.raises(PretrainedError, match=r"messages\[0\].content is None"):
        text_messages([{"role": "user"}])


GUARD = (
    "{% for m in messages %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ m.role }}: {{ part.text | trim }};{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template, text",
    [
        (GUARD, "system: Be brief.;user: 1 < 2 & 'é' 😀?;"),
        (CHATML.replace("message.content | trim", "message.content[:4]"),
         "<|im_start|>system\nBe b<|im_end|>\n<|im_start|>user\n1 < <|im_end|>\n"),
        ("{{ messages[0].content + '!' }}", "Be brief.!"),
    ],
)  # fmt: skip
def test_a_template_of_parts_is_given_parts(template, text):
    """Where strings say nothing to it, and only there."""
    assert render_messages(template, MESSAGES, add_generation_prompt=False) == text


KEPT = CHATML.replace(" | trim", "")


@pytest.mark.parametrize(
    "template, content, shown",
    [
        (CHATML, "So, ", "So,"), (KEPT, "So, ", "So, "), (CHATML, " So", "So"), (KEPT, "", ""),
        (CHATML, "", ""), (CHATML, "\n", ""), (KEPT, "\n", "\n"), (CHATML, "<|x|>", "<|x|>"),
        # Shown twice: up to the end of the second.
        (CHATML + "{{ messages[1].content }}", "So", "So<|im_end|>\nSo"),
    ],
)  # fmt: skip
def test_a_message_is_left_open(template, content, shown):
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>assistant\n"
    messages = [MESSAGES[0], {"role": "assistant", "content": content}]
    assert render_unfinished(template, messages) == begin + shown
    assert render_unfinished(GUARD, messages).endswith(f"assistant: {content.strip()}")


def test_a_message_that_cannot_be_left_open():
    own = {"role": "assistant", "content": "So"}
    with pytest.raises(PretrainedError, match="the chat template does not show it; end with"):
        render_unfinished("{{ messages[0].content }}", [*MESSAGES, own])
    with pytest.raises(PretrainedError, match="it calls tools; add what they answer"):
        render_unfinished(CHATML, [*MESSAGES, {**own, "tool_calls": [{}]}])


# --- systems that are not like this one ----------------------------------------------------------

SITE = pathlib.Path(jinja2.__file__).parents[1]  # where Jinja is installed
HOLDING = "{% set a = 'a' * (4 * 10**8) %}{% for i in range(99999) %}{{ a[:9] }}" * 3
UNBOUNDED = f"""
    import resource, runpy, sys
    real = resource.setrlimit
    def setrlimit(kind, limits):
        if kind == resource.RLIMIT_AS:
            raise ValueError("current limit exceeds maximum limit")
        real(kind, limits)
    resource.setrlimit = setrlimit
    {{mac}}
    runpy.run_path({str(chat.WORKER)!r}, run_name="__main__")
"""


@pytest.fixture
def worker(monkeypatch, tmp_path):
    """`worker(code)`: the code is the process that renders."""
    before = chat._worker

    def use(code: str, memory: int | None = None) -> None:
        script = tmp_path / "worker.py"
        script.write_text(textwrap.dedent(code))
        monkeypatch.setattr(chat, "WORKER", script)

        def start() -> chat._Worker:
            started = before.__wrapped__()
            return started._replace(memory=memory) if started.memory else started

        monkeypatch.setattr(chat, "_worker", functools.cache(start))

    yield use
    if chat._worker is not before and chat._worker.cache_info().currsize:
        chat._end(chat._worker().process)


@pytest.mark.parametrize("mac", ["", "sys.platform = 'darwin'"])
def test_memory_has_a_bound_where_the_system_sets_none(worker, mac):
    """macOS refuses RLIMIT_AS, or takes it and holds nobody to it."""
    worker(UNBOUNDED.format(mac=mac), memory=1 << 28)
    assert render(CHATML, MESSAGES[1:]).startswith("<|im_start|>system\nDefault")
    with pytest.raises(PretrainedError, match="MemoryError: it takes more than 256 MiB"):
        render(HOLDING + "{% endfor %}" * 3, MESSAGES)
    assert render("still {{ 'here' }}", MESSAGES) == "still here"


def test_memory_that_cannot_be_looked_at_is_none_to_use(worker, monkeypatch):
    worker(UNBOUNDED.format(mac=""), memory=1 << 28)
    monkeypatch.setattr(chat, "_memory_of", lambda pid: None)
    with pytest.raises(PretrainedError, match="cannot be looked at, for which `ps` is needed"):
        render(HOLDING + "{% endfor %}" * 3, MESSAGES)


def test_a_lower_limit_of_ones_own_is_kept():
    bash = ["bash", "-c", 'ulimit -v 900000; exec "$@"', "bash"]
    command = [*bash, sys.executable, "-I", "-S", chat.WORKER, SITE]
    told = subprocess.run(command, input="", capture_output=True, text=True)
    assert json.loads(told.stdout)["bounded"], told.stderr


def test_jinja_is_found_wherever_this_process_has_it(tmp_path):
    """Here by PYTHONPATH alone, which the process that renders does not listen to."""
    code = "from spire_jax.pretrained.chat import render; print(render('{{ 6 * 7 }}', []))"
    root, base = pathlib.Path(chat.__file__).parents[2], getattr(sys, "_base_executable")  # noqa: B009
    python = tmp_path / "bin/python"  # of an environment with no packages
    python.parent.mkdir()
    python.symlink_to(base)
    (tmp_path / "pyvenv.cfg").write_text(
        f"home = {pathlib.Path(base).parent}\ninclude-system-site-packages = false\n"
    )
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True,
        env={"PYTHONPATH": os.pathsep.join(map(str, (root, SITE)))},
    )  # fmt: skip
    assert done.stdout == "42\n", done.stderr


def test_a_process_that_does_not_start_is_named(worker):
    worker("raise SystemExit(3)")
    with pytest.raises(PretrainedError, match=r"does not start \(its status is 3.*install jinja2"):
        render("x", MESSAGES)


def test_the_plain_one_of_several_templates():
    assert choose_template(None, "f") is None
    assert choose_template("x", "f") == "x"
    both = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert choose_template(both, "f") == "d"
    for bad in (both[:1], 3, [], {"default": 4}):
        with pytest.raises(PretrainedError, match="f: the chat_template has none"):
            choose_template(bad, "f")
