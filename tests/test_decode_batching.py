"""Continuous batching: each request's output is its own, whatever goes on beside it."""

import dataclasses
import functools
import itertools
import logging
import queue
import time

import jax
import numpy as np
import pytest
from models import TINY, pair, ragged

from spire_jax.config.schema import MeshConfig
from spire_jax.data.tokenizer import ByteTokenizer
from spire_jax.decoding import DecodeError, generate
from spire_jax.decoding.rounds import NO_LOGITS
from spire_jax.models.sharding import make_mesh, replicated
from spire_jax.serving.batching import PROGRAMS, Inbox, Server, Serving
from spire_jax.serving.records import Failure, Id, Request, Result

SMALL = dataclasses.replace(TINY, n_layers=2, max_len=62)
K, WIDTH = 2, 64
SHAPES = Serving(batch=4, width=WIDTH, chunk=8)
LENGTHS = (1, 2, 5, 8, 9, 20, 33, 16, 40, 7, 1, 25)
BUDGETS = (20, 3, 11, 30, 7, 20, 29, 1, 9, 15, 30, 2)  # the seventh goes to the model's limit


class Letters(ByteTokenizer):
    """Tokens of the tiny models as letters."""

    n_tokens = TINY.n_tokens
    separator = TINY.n_tokens

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in np.asarray(ids).tolist())


def requests(lengths=LENGTHS, budgets=BUDGETS, **options) -> list[Request]:
    return [
        Request(i, prompt, budget, 100 + i, **options)
        for i, (prompt, budget) in enumerate(zip(ragged(lengths), budgets, strict=True))
    ]


def server(kind: str = "spire", depths=(), temperature=1.0, eos=(), k=K, **shapes) -> Server:
    p = pair(kind, SMALL)
    decoder = p.autoregressive(temperature) if k == 0 else p.decoder(k, temperature)
    decoder = dataclasses.replace(decoder, eos=tuple(eos))
    serving = dataclasses.replace(SHAPES, **shapes)
    return Server(decoder, p.weights, Letters(), serving, depths)


@functools.cache
def one_server() -> Server:
    """The SPIRe server of tests that need nothing special."""
    return server()


def served(a_server: Server, wanted, watch=None) -> dict[Id, Result]:
    found: dict[Id, Result] = {}
    for result in a_server.serve(wanted, watch):
        assert isinstance(result, Result), result
        assert result.request.id not in found
        found[result.request.id] = result
    assert len(found) == len(wanted)
    return found


@functools.cache
def alone(kind: str, temperature: float = 1.0, k: int = K) -> list[list[int]]:
    """Each request's output by `generate`, all in one batch."""
    p, wanted = pair(kind, SMALL), requests()
    decoder = p.autoregressive(temperature) if k == 0 else p.decoder(k, temperature)
    state = generate(decoder, p.weights, [r.tokens for r in wanted], BUDGETS,
                     [r.seed for r in wanted], width=WIDTH)  # fmt: skip
    tokens = np.asarray(state.tokens)
    return [tokens[i, n : n + budget].tolist()
            for i, (n, budget) in enumerate(zip(LENGTHS, BUDGETS, strict=True))]  # fmt: skip


# --- what comes out ----------------------------------------------------------------------------


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("vanilla", "magicdec")]


@pytest.mark.parametrize(
    "kind", ["spire", pytest.param("ring", marks=pytest.mark.slow), *SLOW, "autoregressive"]
)
def test_requests_get_what_they_would_get_alone(kind):
    """Twelve through four slots, prompts in chunks while others decode."""
    k, kind = (0, "spire") if kind == "autoregressive" else (K, kind)
    a_server = one_server() if kind == "spire" and k else server(kind, k=k)
    found = served(a_server, requests())
    for i, expected in enumerate(alone(kind, k=k)):
        assert found[i].tokens == expected, f"request {i}"
        assert found[i].finish_reason == "length"
        assert found[i].text == Letters().decode(expected)


def test_a_request_whose_numbers_break_fails_alone_and_leaves_nothing_behind():
    """nan in the target's embedding of a token: in all that four prompts leave in the slots, and in
    what the draft drafts for the others and is not kept."""
    expected, one = alone("spire"), one_server()
    texts = [{*r.tokens.tolist(), *out} for r, out in zip(requests(), expected, strict=True)]
    token = min(range(TINY.n_tokens), key=lambda t: sum(t in text for text in texts))
    embedding = one.weights.target["embedding"].at[token].set(np.nan)
    weights = one.weights._replace(target=one.weights.target | {"embedding": embedding})
    bad = [Request(f"bad {i}", np.full(50, token, np.int32), 9, i, line=i + 1) for i in range(4)]
    good = [r for r, text in zip(requests(), texts, strict=True) if token not in text]
    assert len(good) >= 4 and max(len(r.tokens) for r in good) > SHAPES.chunk
    found = list(Server(one.decoder, weights, Letters(), SHAPES).serve([*bad, *good]))
    failed = [result for result in found if isinstance(result, Failure)]
    assert [f.record() for f in sorted(failed, key=lambda f: f.line)] == [
        {"id": r.id, "line": r.line, "error": NO_LOGITS} for r in bad
    ]
    results = {r.request.id: r.tokens for r in found if isinstance(r, Result)}
    assert results == {r.id: expected[int(r.id)] for r in good}


def test_neither_order_nor_neighbours_nor_pace_matter():
    wanted = requests()
    shuffled = [wanted[i] for i in (7, 3, 11, 0, 9, 4, 1, 8, 10, 2, 6, 5)]
    others = [dataclasses.replace(r, id=100 + r.id, seed=r.seed + 50) for r in wanted[::-1]]
    beside = [r for two in zip(others, shuffled, strict=True) for r in two]
    for found in (served(one_server(), shuffled), served(one_server(), beside),
                  served(server(chunks_per_round=3), wanted)):  # fmt: skip
        for i, expected in enumerate(alone("spire")):
            assert found[i].tokens == expected, f"request {i}"


def test_rounds_are_told_and_counted():
    told = {i: [] for i in range(len(LENGTHS))}
    before = dict(one_server().rounds)
    found = served(
        one_server(),
        requests(),
        lambda r, tokens, accepted, k: told[r.id].append((tokens, accepted, k)),
    )
    for i, result in found.items():
        assert [t for tokens, _, _ in told[i] for t in tokens] == result.tokens
        assert [a + 1 for _, a, _ in told[i]] == result.generation_lengths
        assert result.depths == [K] * len(told[i])
        record = result.record()
        assert record["prompt_tokens"] == LENGTHS[i]
        accepted = sum(result.generation_lengths) - len(told[i])
        assert record["acceptance"]["accepted"] == accepted
        assert record["acceptance"]["drafted"] == K * len(told[i])
        # A round that the budget cut counts whole.
        assert 0 <= sum(result.generation_lengths) - BUDGETS[i] <= K
    most = max(len(rounds) for rounds in told.values())
    assert most <= one_server().rounds[K] - before[K] < sum(map(len, told.values()))


def test_acceptance_by_depth_by_hand():
    result = Result(requests()[0], [], "", [3, 1, 4, 2], [2, 2, 3, 3], "length", 0.0, 0.0, 1.0)
    found = result.record()["acceptance"]
    assert found == {"accepted": 6, "drafted": 10, "by_depth": [0.75, 0.666667, 1.0]}


# --- where requests end ------------------------------------------------------------------------


def test_any_of_several_ends_of_sequence():
    ends = (4, 18)
    found = served(server(eos=ends), requests())
    stopped = 0
    for i, free in enumerate(alone("spire")):
        at = [j for j, token in enumerate(free) if token in ends]
        assert found[i].tokens == (free[: at[0]] if at else free)
        assert found[i].finish_reason == ("eos" if at else "length")
        stopped += bool(at)
    assert {free[j] for free in alone("spire") for j in range(len(free))} >= set(ends)
    assert 3 < stopped < len(LENGTHS)


@pytest.mark.parametrize("size", [1, 3])
def test_a_stop_string_cuts_before_itself(size):
    """Also one that begins in one round and ends in a later one; and the slot is free again."""
    texts = ["".join(Letters().decode(t)) for t in alone("spire")]
    stops = tuple(sorted({text[at : at + size] for text in texts[5:7] for at in (5, 6)}))
    found, across = served(one_server(), requests(stop=stops)), 0
    for i, text in enumerate(texts):
        at = min((a for stop in stops if (a := text.find(stop)) >= 0), default=-1)
        assert found[i].text == (text if at < 0 else text[:at])
        assert found[i].tokens == alone("spire")[i][: None if at < 0 else at]
        assert found[i].finish_reason == ("length" if at < 0 else "stop")
        ends = np.cumsum(found[i].generation_lengths)
        across += at >= 0 and bool(((ends > at) & (ends < at + size)).any())
        assert at < 0 or ends[-1] >= at + size > (ends[-2] if len(ends) > 1 else 0)
    assert 0 < sum(r.finish_reason == "stop" for r in found.values()) < len(texts) + (size == 1)
    assert across or size == 1


def first_complete(text: str, stops) -> int:
    """Where the text ends, letter by letter; -1: nowhere."""
    for end in range(1, len(text) + 1):
        ending = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if ending:
            return min(ending)
    return -1


def test_the_stop_string_that_is_complete_first_wins():
    """Also where a round brings the end of another that began before it."""
    free, wanted, differing = served(one_server(), requests()), [], 0
    for i, request in enumerate(requests()):
        text, stops = free[i].text, ()
        ends = [0, *np.cumsum(free[i].generation_lengths).tolist()]
        for begin, end in itertools.pairwise(ends):
            if end - begin == K + 1 and end <= len(text):
                stops = (text[max(end - 5, 0) : end], text[end - 2])
        differing += first_complete(text, stops) != text.find(stops[0]) if stops else 0
        wanted.append(dataclasses.replace(request, stop=stops))
    found = served(one_server(), wanted)
    for i, request in enumerate(wanted):
        cut = first_complete(free[i].text, request.stop)
        assert found[i].text == free[i].text[: cut if cut >= 0 else None], f"request {i}"
        assert found[i].tokens == free[i].tokens[: len(found[i].text)]
        assert found[i].finish_reason == ("stop" if cut >= 0 else "length")
    assert differing > 2


# --- what cannot be served ---------------------------------------------------------------------


def test_failures_stand_beside_results():
    good = requests()[:3]
    bad = [
        Failure("line", "line 7 is not JSON", 7),
        dataclasses.replace(good[0], id="long", max_tokens=WIDTH, line=3),
        dataclasses.replace(good[0], id="strange", tokens=np.array([TINY.n_tokens], np.int32)),
    ]
    found = {}
    for one in one_server().serve([bad[0], good[0], bad[1], good[1], bad[2], good[2]]):
        found[one.request.id if isinstance(one, Result) else one.id] = one
    assert len(found) == 6
    assert found["line"] == bad[0] and found["long"].line == 3
    assert "prompt 1 + max_tokens 64 = 65 goes beyond the model's" in found["long"].error
    assert "vocabulary of 21" in found["strange"].error
    for i in range(3):
        assert found[i].tokens == alone("spire")[i]


def test_the_models_context_is_a_limit():
    a_server = object.__new__(Server)  # `check` compiles nothing
    p = pair("spire", SMALL)
    narrow = dataclasses.replace(p.target, config=dataclasses.replace(SMALL, max_len=30))
    a_server.decoder = dataclasses.replace(p.decoder(K), target=narrow)
    a_server.serving = SHAPES
    request = requests()[5]
    assert "= 40 goes beyond the model's context of 30" in a_server.check(request)
    assert not a_server.check(dataclasses.replace(request, max_tokens=10))
    assert a_server.check(dataclasses.replace(request, max_tokens=11))
    a_server.serving = dataclasses.replace(SHAPES, width=30)
    error = a_server.check(dataclasses.replace(request, max_tokens=10))
    assert "20 + max_tokens 10 + k 2 = 32 goes beyond the 30 positions" in error
    assert "--width" in error


def test_what_cannot_be_prefilled_in_chunks_is_refused():
    with pytest.raises(DecodeError, match="SnapKV selects over the whole prompt"):
        server("snapkv")


@pytest.mark.parametrize("name", ["batch", "width", "chunk", "rounds_per_call"])
def test_sizes_are_checked(name):
    with pytest.raises(DecodeError, match=f"{name}=0: use 1 or more"):
        server(**{name: 0})


# --- the pace ----------------------------------------------------------------------------------


def test_a_handful_of_programs(caplog):
    """As many as there are depths, and three; none while requests are served."""
    before = sum(f._cache_size() for f in PROGRAMS)
    a_server = server(depths=(1, 2), batch=3)
    assert a_server.compilations == sum(f._cache_size() for f in PROGRAMS) - before == 5
    depths = itertools.cycle((2, 1, 1))
    a_server.controller.choose = lambda: next(depths)
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        served(a_server, requests(stop=("q",)))
        served(a_server, requests((3, 40, 1), (5, 2, 30)))
    assert sum(f._cache_size() for f in PROGRAMS) == before + 5
    assert not [r.message for r in caplog.records if r.message.startswith("Compiling")]
    assert all(a_server.rounds.values()), "a depth was never used"


def test_weights_on_a_mesh_change_nothing():
    """As the command has them: what is placed otherwise at first is compiled for at the start."""
    p, mesh = pair("spire", SMALL), make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        weights = jax.device_put(p.weights, replicated(mesh))
        a_server = Server(p.decoder(K), weights, Letters(), SHAPES)
        programs = sum(f._cache_size() for f in PROGRAMS)
        found = served(a_server, requests())
        assert sum(f._cache_size() for f in PROGRAMS) == programs
    assert [found[i].tokens for i in range(len(LENGTHS))] == alone("spire")


def test_rows_go_on_while_a_prompt_is_read():
    """Of a prompt of five chunks one is read between two rounds; what waits is not late."""
    short, long = requests((2, 40), (30, 3))
    order = []
    watch = lambda r, tokens, accepted, k: order.append(r.id)  # noqa: E731
    found = served(one_server(), [short, long], watch)
    first = order.index(1)
    assert order[:first].count(0) >= 4, "the rounds of the first waited for the second's prompt"
    assert found[1].prefill > 0


def test_the_inbox_does_not_hold_up_what_is_decoded():
    """A request that is still to come is waited for only when there is nothing else to do."""
    gate = queue.Queue()
    first, last = requests()[3], requests()[4]

    def slow():
        yield first
        gate.get(timeout=60)
        yield last

    results = one_server().serve(Inbox(slow()))
    assert next(results).request.id == first.id  # though the source is not at its end
    gate.put(None)
    assert next(results).request.id == last.id
    with pytest.raises(StopIteration):
        next(results)


def test_errors_of_the_inbox_are_raised_where_it_is_read():
    def broken():
        yield requests()[0]
        raise OSError("the pipe broke")

    with pytest.raises(OSError, match="the pipe broke"):
        list(one_server().serve(Inbox(broken())))
    served(one_server(), requests()[:2])  # what was under way is forgotten


def test_after_an_interruption():
    results = one_server().serve(requests())
    next(results)
    results.close()
    one_server().reset()
    found = served(one_server(), requests())
    assert [found[i].tokens for i in range(len(LENGTHS))] == alone("spire")


def test_times_are_of_what_they_say():
    begin = time.perf_counter()
    found = served(one_server(), requests())
    total = time.perf_counter() - begin
    for result in found.values():
        assert min(result.queued, result.prefill, result.decode) >= 0
        assert result.queued + result.prefill + result.decode <= total
        before = result.queued + result.prefill
        assert before < result.first_token <= before + result.decode + 1e-3
    assert max(r.queued for r in found.values()) > min(r.decode for r in found.values())


# --- adaptive depth ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["spire", pytest.param("ring", marks=pytest.mark.slow), *SLOW])
def test_greedy_output_is_the_targets_whatever_the_depths(kind):
    a_server = server(kind, depths=(1, 3), temperature=0.0, width=WIDTH + 1)
    # All depths in turn: what the controller would choose depends on the clock.
    order = itertools.cycle((1, 3, 3, 1, 3, 1, 1))
    a_server.controller.choose = lambda: next(order)
    found = served(a_server, requests())
    expected = alone("spire", 0.0, 0)
    for i in range(len(LENGTHS)):
        assert found[i].tokens == expected[i], f"request {i}"
    assert {k for r in found.values() for k in r.depths} == {1, 3}


@pytest.mark.slow
def test_greedy_output_is_the_targets_whatever_rows_choose():
    """One program of rounds; what a request has verified is its own choice, and is told."""
    p = pair("block", SMALL)
    decoder = dataclasses.replace(p.decoder(3, 0.0), prices=(1.0, 1.3, 1.65, 2.0), widths=(1, 3))
    a_server = Server(decoder, p.weights, Letters(), dataclasses.replace(SHAPES, width=WIDTH + 1),
                      (1, 3))  # fmt: skip
    assert list(a_server.decoders) == [3]
    found = served(a_server, requests())
    for i, expected in enumerate(alone("spire", 0.0, 0)):
        assert found[i].tokens == expected
    depths = {k for r in found.values() for k in r.depths}
    assert depths <= {1, 2, 3} and len(depths) > 1
    lengths = [(n, k) for r in found.values()
               for n, k in zip(r.generation_lengths, r.depths, strict=True)]  # fmt: skip
    assert all(n <= k + 1 for n, k in lengths) and any(n == k + 1 < 4 for n, k in lengths)
