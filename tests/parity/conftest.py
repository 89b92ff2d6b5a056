"""Parity with transformers and llama.cpp; only where `launch/parity.sh` has installed them."""

import importlib.util
import os
import pathlib
from collections.abc import Callable

import pytest

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]

_figures: list[tuple[str, str]] = []


@pytest.fixture
def figure() -> Callable[[str, str], None]:
    """`figure(what, value)`: a line of the table at the end."""
    return lambda what, value: _figures.append((what, value))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("parity: what was reached")
        width = max(len(what) for what, _ in _figures)
        for what, value in _figures:
            terminalreporter.write_line(f"{what:{width}}  {value}")


def _given(variable: str) -> pathlib.Path:
    path = pathlib.Path(os.environ.get(variable, ""))
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set; launch/parity.sh sets it")
    return path


@pytest.fixture(scope="session")
def smollm2() -> pathlib.Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return _given("SMOLLM2_GGUF")


@pytest.fixture(scope="session")
def vocabularies() -> pathlib.Path:
    """llama.cpp's vocabularies of real models, with texts and the ids that it gives them."""
    return _given("LLAMA_CPP_VOCABULARIES")
