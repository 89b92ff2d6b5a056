"""The soak finds what it looks for, and nothing where there is nothing."""

import dataclasses
import json

import pytest

from launch.bench import soak
from spire_jax.serving.batching import Server

pytestmark = pytest.mark.slow  # six servers are compiled


def test_nothing_is_found_where_nothing_is_wrong(tmp_path, monkeypatch, capsys):
    out = tmp_path / "soak.json"
    assert soak.main(["--minutes=0", "--seed=3", f"--out={out}"]) == 0
    figures = json.loads(out.read_text())
    assert figures["waves"] == 3 and figures["requests"] == 3 * 24 * 6
    assert figures["alone"] > 30 and figures["found"] == []
    assert figures["compilations_after_warm_up"] == 0
    assert min(figures["rounds"].values()) > 0 and "wave 3" in capsys.readouterr().out


def test_a_neighbours_token_in_an_output_is_found(monkeypatch):
    """Once in a while, with several requests side by side."""
    made, result = soak.servers(soak.build(soak.CONFIG)), Server._result

    def mixed(self, slot, *more):
        found = result(self, slot, *more)
        if sum(s is not None for s in self._slots) > 1:
            return dataclasses.replace(found, tokens=[*found.tokens[:-1], 0])
        return found

    monkeypatch.setattr(Server, "_result", mixed)
    looking = soak.Soak({"spire": made["spire"]}, 0)
    for _ in range(soak.WARM + 1):
        looking.wave(12, 0.5)
    looking.check()
    assert looking.found and all(text.startswith("spire: Request(") for text in looking.found)


def test_memory_and_programs_that_grow_are_found():
    looking = soak.Soak({}, 0)
    looking.memory = [2**30, 2**29, *[2**29 + i * 2**20 for i in range(40)]]
    looking.arrays, looking.compiled = [9, 9, 10], [1, 5, 7]
    looking.check()
    assert [text.split()[0] for text in looking.found] == ["2", "arrays", "memory:"]
