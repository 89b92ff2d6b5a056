"""The round's benchmark: predictions and goals by hand, what the pieces do, a tiny run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.bench import round as bench_round
from launch.bench import round_pieces, round_report
from launch.bench.round_report import DRAFT, GOALS, SMALL, experiment
from spire_jax.config.schema import ModelConfig
from spire_jax.costs.roofline import VARIANTS
from spire_jax.costs.throughput import round_cost
from spire_jax.decoding import Weights
from spire_jax.models.masks import EMPTY

TINY = dataclasses.replace(
    SMALL,
    name="tiny",
    target=ModelConfig(n_layers=2, d_model=16, n_kv_heads=2, q_per_kv=2, d_head=4, d_ff=24,
                       vocab_size=24, n_tokens=21),
    copied=2**12, product=32, batch=(2,), context=(12,), k=(2,),
)  # fmt: skip
K, BATCH, CONTEXT = 2, 2, 12


def record(**changed):
    """A point whose machine moves 100 bytes/s and computes 1000 FLOP/s."""
    seconds = {"step": 10.0, "draft_step": 1.0, "verification": 20.0, "sampling": 0.5,
               "refresh": 0.5, "round": 25.0}  # fmt: skip
    values = {"batch": 3, "context": 40, "k": 4, "bytes_per_s": 100.0, "flops_per_s": 1000.0,
              "seconds": seconds, "cache_bytes": 1000, "temporary_bytes": 10, "shape": "tiny",
              "dtype": "float32", "hardware": "a machine", "devices": "1 x thing"}  # fmt: skip
    return round_report.with_predictions(experiment(TINY), {**values, **changed})


# --- predictions --------------------------------------------------------------------------------


def test_predictions_are_the_cost_models_at_the_measured_speeds():
    config, at = experiment(TINY), record()
    assert set(at["predicted"]) == set(VARIANTS)
    for variant, predicted in at["predicted"].items():
        cost = round_cost(config, DRAFT, batch=3, context=40, k=4, hoi=10.0, variant=variant)
        assert predicted["delta_t"] == cost.delta_t
        assert predicted["step"] == pytest.approx(cost.target_step / 1000.0)
        assert predicted["draft_step"] == pytest.approx(cost.draft_step / 1000.0)
        assert predicted["round"] == pytest.approx(cost.total / 1000.0)
    assert at["delta_t"] == 2.5


def test_a_step_reads_weights_unembedding_and_cache_once():
    body, head = TINY.target.body_parameters(), 16 * 24
    cache = 3 * 40 * 2 * 2 * 2 * 4
    at = record()
    assert at["step_bytes"] == 4 * (body + head + cache)
    # At a balance of 10 FLOPs per byte, 3 tokens are bound by memory and 15 by it too: 20 x 15.
    assert at["operators"]["step_products"] == pytest.approx(4 * body / 100.0)
    assert at["operators"]["step_attention"] == pytest.approx(4 * cache / 100.0)
    assert at["operators"]["verification_unembedding"] == pytest.approx(4 * head / 100.0)
    honest = at["predicted"]["with_head"]
    for name in ("step", "verification"):
        parts = sum(
            at["operators"][f"{name}_{p}"] for p in ("products", "attention", "unembedding")
        )
        assert honest[name] == pytest.approx(parts)


def test_operators_turn_compute_bound():
    at = record(flops_per_s=10.0)
    assert at["operators"]["verification_products"] == pytest.approx(
        2 * 15 * TINY.target.body_parameters() / 10.0
    )


# --- goals --------------------------------------------------------------------------------------


def ideal():
    """A record that is as predicted."""
    at = record()
    honest = at["predicted"]["with_head"]
    seconds = {name: honest[name] for name in ("step", "draft_step", "verification", "round")}
    return record(seconds={**seconds, "sampling": 0.01 * honest["round"], "refresh": 0.0})


def test_goals_are_met_by_what_was_predicted():
    assert {verdict for _, _, verdict in round_report.judged([ideal()], True)} == {"met"}


@pytest.mark.parametrize(
    ("goal", "piece", "factor"),
    [(0, "step", 1.3), (1, "verification", 0.9), (1, "verification", 1.1), (2, "draft_step", 1.4),
     (3, "sampling", 4.0), (5, "round", 1.2), (5, "round", 0.8)],
)  # fmt: skip
def test_one_point_that_misses_a_goal_is_enough(goal, piece, factor):
    good = ideal()
    seconds = {**good["seconds"], piece: factor * good["seconds"][piece]}
    rows = round_report.judged([good, record(seconds=seconds), good], True)
    assert rows[goal][2] == "not met"
    assert GOALS[goal].figure(good) != pytest.approx(float(rows[goal][1].split()[0]), abs=1e-3)


def test_temporaries_are_held_against_the_caches():
    good = ideal()
    bad = {**good, "temporary_bytes": 30}
    assert round_report.judged([good, bad], True)[4][1:] == ("0.030 (median 0.020)", "not met")


def test_what_was_not_measured_is_said_so():
    elsewhere = round_report.judged([ideal()], False)
    assert {verdict for _, _, verdict in elsewhere} == {"not measured here"}
    assert elsewhere[0][1].startswith("1.000")
    # Verification of 5 tokens is k = 4; without jax's word nothing is known of temporaries.
    rows = round_report.judged([{**record(k=2), "temporary_bytes": None}], True)
    assert [rows[i][1:] for i in (1, 4)] == [("-", "not measured here")] * 2


# --- records ------------------------------------------------------------------------------------


def test_points_are_added_and_replaced(tmp_path):
    round_report.add(tmp_path, [record(), record(k=2)])
    round_report.add(tmp_path, [record(bytes_per_s=200.0), record(hardware="another")])
    kept = round_report.load(tmp_path)
    assert [(r["hardware"], r["k"], r["bytes_per_s"]) for r in kept] == [
        ("a machine", 2, 100.0), ("a machine", 4, 200.0), ("another", 4, 100.0),
    ]  # fmt: skip


def test_figure_shows_every_point():
    records = [record(batch=b, context=c, k=k) for b in (1, 3) for c in (40, 80) for k in (2, 4)]
    panels = round_report.figure(records).axes
    assert [axes.get_title() for axes in panels] == ["k = 2", "k = 4"]
    for axes in panels:
        measured = [line for line in axes.lines if line.get_marker() == "o"]
        assert len(axes.lines) == 6 and len(measured) == 2
        assert all(list(line.get_xdata()) == [40, 80] for line in measured)


# --- pieces -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench():
    return bench_round.Bench(TINY, repeats=1, seconds=0.0)


@pytest.fixture(scope="module")
def store(bench):
    buffers = bench._shared_buffers(BATCH, CONTEXT, K)
    bench._add_buffers(buffers, bench.decoder(K), BATCH, CONTEXT)
    return {name: value for (name, k), value in buffers.items() if (name, k) != ("text", 0)}


def test_weights_are_made_in_the_type_that_is_read(bench):
    model = bench_round.Bench(dataclasses.replace(TINY, dtype="bfloat16")).autoregressive.target
    params = jax.eval_shape(lambda: round_pieces.random_params(model, 0))
    block = params["blocks"][0]
    assert params["embedding"].dtype == params["unembedding"].dtype == jnp.bfloat16
    assert block["query"].dtype == block["down"].dtype == jnp.bfloat16
    assert block["norm_mlp"]["scale"].dtype == jnp.float32
    first, second = (np.asarray(b["gate"]) for b in bench.weights.target["blocks"].values())
    assert np.std(first) == pytest.approx(16**-0.5, rel=0.2)
    assert not np.array_equal(first, second)


def test_ring_holds_what_it_would_after_the_context(bench, store):
    strategy, rings = bench.decoder(K).strategy, store["draft_state"]
    assert len(rings) == strategy.model.config.n_layers
    for ring in rings:
        live = np.asarray(ring.held(jnp.full(BATCH, CONTEXT - 2)))[0]
        assert sorted(live[live < EMPTY]) == list(range(CONTEXT - 1))
        assert np.std(np.asarray(ring.keys)[:, live < EMPTY]) > 0.5


def test_a_round_stays_at_its_context_and_writes_only_its_block(bench, store):
    held = {name: store[name] for name in ("text", "target_cache", "draft_state")}
    after = jax.jit(round_pieces.run_round, static_argnums=0)(
        bench.decoder(K), bench.weights, jnp.int32(0), held
    )
    assert list(after["text"]["lengths"]) == [CONTEXT] * BATCH
    assert not np.any(after["text"]["done"])
    assert list(after["text"]["rounds"]) == [1] * BATCH
    assert int(after["text"]["counts"].sum()) == BATCH
    first, last = after["target_cache"][0], held["target_cache"][0]
    changed = np.any(np.asarray(first.keys != last.keys), -1)
    expected = np.zeros_like(changed)
    expected[:, CONTEXT - 1 : CONTEXT + K] = True
    np.testing.assert_array_equal(changed, expected)
    last = np.asarray(after["text"]["tokens"])[:, [CONTEXT - 1, CONTEXT]]
    np.testing.assert_array_equal(last[:, 0], last[:, 1])


@pytest.mark.parametrize(
    ("body", "names", "out"),
    [
        ("run_draft_step", ("target_cache", "draft_state", "draft_logits"), "draft_logits"),
        ("run_verification", ("target_cache", "logits", "activations"), "logits"),
        ("run_sampling", ("token", "seeds", "draft_logits", "logits"), "token"),
        ("run_refresh", ("target_cache", "draft_state", "activations"), "draft_state"),
    ],
)
def test_every_pass_of_a_piece_depends_on_the_last(bench, store, body, names, out):
    held = {name: store[name] for name in (*names, "lengths", "block")}
    run = jax.jit(getattr(bench_round, body), static_argnums=0)
    seen = []
    for i in range(3):
        held = run(bench.decoder(K), bench.weights, jnp.int32(i), held)
        seen.append(np.concatenate([np.ravel(x) for x in jax.tree.leaves(held[out])]))
    assert not np.array_equal(seen[0], seen[1]) and not np.array_equal(seen[1], seen[2])


def test_a_step_is_a_round_of_depth_0(bench, store):
    text = bench._text(BATCH, CONTEXT, 0, K)
    held = {"text": text, "target_cache": store["target_cache"]}
    after = jax.jit(round_pieces.run_round, static_argnums=0)(
        bench.autoregressive, Weights(bench.weights.target), jnp.int32(0), held
    )
    deep, before = after["target_cache"][1], held["target_cache"][1]
    changed = np.asarray(deep.values != before.values)
    assert np.flatnonzero(changed.any(axis=(0, 2))).tolist() == [CONTEXT - 1]
    assert after["text"]["counts"].tolist() == [[1]] * BATCH


# --- the command --------------------------------------------------------------------------------


def test_tiny_run(monkeypatch, tmp_path, capsys):
    shallow = dataclasses.replace(TINY, target=dataclasses.replace(TINY.target, n_layers=1))
    monkeypatch.setattr(bench_round, "SMALL", shallow)
    bench_round.main(["--small", "--no-operators", "--repeats=1", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    (kept,) = json.loads((tmp_path / "rounds.json").read_text())
    assert (kept["batch"], kept["context"], kept["k"]) == (BATCH, CONTEXT, K)
    assert set(kept["seconds"]) == set(round_report.PIECES)
    assert all(value > 0 for value in kept["seconds"].values())
    assert kept["delta_t"] == kept["seconds"]["round"] / kept["seconds"]["step"]
    assert kept["bytes_per_s"] > 0 and kept["flops_per_s"] > 0
    assert (tmp_path / "delta_t.png").stat().st_size > 1000
    assert printed.count("not measured here") == len(GOALS)


def test_what_does_not_fit_is_left_out_and_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_round, "SMALL", TINY)
    monkeypatch.setattr(bench_round, "device_bytes", lambda: 1e3)
    bench_round.main(["--small", "--batch=2,4", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    assert "left out: B = 4, L = 12 (needs 0 GB" in printed and "nothing was measured" in printed


def test_sizes_are_checked(capsys):
    for bad in ("--batch=0", "--k=2,x"):
        with pytest.raises(SystemExit):
            bench_round.main([bad])
    with pytest.raises(SystemExit):
        bench_round.main(["--small", "--context=1"])
    assert "--context=1 must be 2 or more" in capsys.readouterr().err
