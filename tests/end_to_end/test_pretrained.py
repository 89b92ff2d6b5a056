"""From somebody else's checkpoint to decoded prompts: draft, evaluation, export, decoder."""

import json

import jax
import numpy as np
import pipelines
import pretrained_models
import pytest
from tokenizers import AddedToken

from spire_jax import export, run
from spire_jax.config.files import load
from spire_jax.data.tokenizer import train_bpe
from spire_jax.pretrained.exported_draft import import_draft
from spire_jax.serving import command
from spire_jax.training.workdir import WorkDir

ROWS = 300  # of the embedding
VALUES = {
    "drafts.spire.n_layers": 1,
    "drafts.spire.window": 8,
    "drafts.spire.head_tokens": 40,
    "continuations.rows": 5,
    "continuations.prompt": 4,
    "continuations.batch_size": 2,
    "drafts.magicdec.window": 8,
    "train.steps": 4,
    "train.batch_size": 2,
    "train.seq_len": 16,
    "train.checkpoint_every": 2,
    "eval.contexts": 2,
    "eval.context_lengths": "12",
    "eval.output_length": 6,
    "eval.batch_size": 2,
    "eval.bootstrap": 50,
    "eval.timing_repeats": 1,
    "eval.examples": 1,
    "eval.heldout_rows": 2,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama of random numbers, tied, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny-llama"
    sizes, tensors = pretrained_models.tiny("llama3", vocab_size=ROWS)
    pretrained_models.write_safetensors(folder, sizes, tensors)
    bpe = train_bpe([" ".join(pipelines.WORDS)] * 50, ROWS - 3)
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False)
                            for token in ("<|end|>", "<|begin|>")])  # fmt: skip
    bpe.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config = {"eos_token": "<|end|>", "bos_token": "<|begin|>", "add_bos_token": True,
              "chat_template": template}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def flags(checkpoint, tmp_path_factory):
    corpus = pipelines.write_corpus(tmp_path_factory.mktemp("data") / "corpus")
    values = {"pretrained.path": checkpoint, "data.source": corpus, **VALUES}
    return ["--config=configs/pretrained.py", *(f"--config.{k}={v}" for k, v in values.items())]


@pytest.fixture(scope="module")
def workdir(flags, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("work") / "run"
    assert run.main([*flags, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(flags, workdir):
    out = workdir / "exported"
    assert export.main([*flags, f"--workdir={workdir}", "--draft=spire", f"--out={out}"]) == 0
    return out


def config_of(flags):
    return load("configs/pretrained.py", [flag.removeprefix("--config.") for flag in flags[1:]])


def outputs(flags, tmp_path, name, *more):
    """Answers by id of decoding three prompts, and a question and what follows it, greedily."""
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / f"{name}.jsonl"
    lines = [{"prompt": "def x if y"}, {"messages": [{"role": "user", "content": "class self"}]},
             {"prompt": "while"}, {"turns": ["class self", "if x"]}]  # fmt: skip
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [*flags, f"--prompts={prompts}", f"--out={out}", "--temperature=0", "--chunk=8",
                 "--max-tokens=12", "--batch-size=2", "--width=64", *more]  # fmt: skip
    assert command.main(arguments) == 0
    records = map(json.loads, out.read_text().splitlines())
    return {(r["id"], i): turn for r in records for i, turn in enumerate(r.get("turns", [r]))}


def test_the_report_compares_every_method(workdir):
    summary = json.loads((workdir / "report" / "summary.json").read_text())
    assert set(summary["methods"]) == {"autoregressive", "spire", "magicdec"}
    assert all(1 <= m["tau"] <= 5 for m in summary["methods"].values())


def test_the_sizes_are_the_checkpoints(flags):
    target = config_of(flags).target
    assert (target.n_layers, target.d_model, target.n_tokens) == (2, 64, ROWS)
    assert target.tied and target.rope_scaling == 8.0


def test_a_draft_stores_its_own_parameters_alone(workdir, flags):
    stored = {path.name for path in (workdir / "target").glob("*")}
    assert not stored, "nothing was trained"
    at = WorkDir(config_of(flags), workdir)
    with jax.set_mesh(at.mesh):
        target = at.target()
        draft = at.draft("spire", target)
    assert draft["embedding"] is target["embedding"]
    assert draft["unembedding"].shape == (64, 40) and draft["head_ids"].shape == (40,)


def test_a_second_run_makes_nothing_anew(workdir, flags):
    before = {p: p.stat().st_mtime_ns for p in (workdir / "drafts").rglob("*") if p.is_file()}
    rows = (workdir / "continuations" / "tokens.npy").stat().st_mtime_ns
    assert run.main([*flags, f"--workdir={workdir}"]) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert (workdir / "continuations" / "tokens.npy").stat().st_mtime_ns == rows


def test_an_export_is_the_trained_draft_bit_for_bit(workdir, exported, flags):
    at = WorkDir(config_of(flags), workdir)
    with jax.set_mesh(at.mesh):
        trained = at.draft("spire")
    found = import_draft(exported, at.target_sha256)
    assert found.trained_on["steps"] == 4 and found.draft == config_of(flags).draft("spire")
    own = found.load()
    assert set(own) == set(trained) - {"embedding"}
    jax.tree.map(np.testing.assert_array_equal, own, {key: trained[key] for key in own})


def test_all_that_the_target_reads_begins_with_its_begin_token(workdir, exported, flags):
    at = WorkDir(config_of(flags), workdir)
    begin = at.corpus.tokenizer.encode_prompt("")
    assert at.corpus.tokenizer.decode(begin) == "<|begin|>"
    rows = (at.dataset[0]["tokens"], *np.load(workdir / "continuations" / "tokens.npy"))
    assert [row[:1].tolist() for row in rows] == 6 * [begin.tolist()]
    evaluation = json.loads((workdir / "eval" / "evaluation.json").read_text())
    assert all(e["context_text"].startswith("<|begin|>") for e in evaluation["examples"])
    # What it was, is said.
    said = json.loads((exported / "config.json").read_text())["trained_on"]["corpus"]
    assert evaluation["corpus"]["begin_token"] == said["begin_token"] == begin[0]


def test_what_nothing_is_trained_for_is_not_exported(flags, workdir, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match="2"):
        export.main([*flags, f"--workdir={workdir}", "--draft=magicdec", f"--out={out}"])
    assert "of kind 'magicdec' nothing is trained" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("source", ["workdir", "exported", "without a config"])
def test_prompts_are_decoded_as_the_target_writes(
    source, workdir, exported, flags, checkpoint, tmp_path
):
    """With the draft, from either place, and without: the same texts, greedily."""
    flags = [f"--target={checkpoint}"] if source == "without a config" else flags
    alone = outputs(flags, tmp_path, "alone", "--method=autoregressive")
    where = f"--workdir={workdir}" if source == "workdir" else f"--draft={exported}"
    drafted = outputs(flags, tmp_path, "drafted", "--method=spire", where)
    second = alone[3, 1]["prompt_tokens"]  # on top of the question, its answer and what ends both
    assert second > alone[3, 0]["prompt_tokens"] + len(alone[3, 0]["tokens"]) and len(alone) == 5
    assert {i: r["tokens"] for i, r in drafted.items()} == {
        i: r["tokens"] for i, r in alone.items()
    }
    assert {r["acceptance"]["drafted"] for r in alone.values()} == {0}
    assert all(r["acceptance"]["drafted"] > 0 for r in drafted.values())


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method=spire"], "give the --workdir where it was trained, or --draft"),
        (["--config.target.d_model=32"], "target.d_model=32, but the checkpoint"),
        (["--config.pretrained.path=nowhere.gguf"], "nowhere.gguf does not exist"),
        (["--config.pretrained.path=", "--config.drafts.spire.head_tokens=0"],
         "give the --target that decodes"),
    ],
)  # fmt: skip
def test_bad_requests_say_what_to_do(more, message, flags, capsys, tmp_path):
    (tmp_path / "p.txt").write_text("x")
    try:
        status = command.main([*flags, f"--prompts={tmp_path / 'p.txt'}", *more])
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_draft_for_another_target_is_refused(exported, flags, checkpoint, tmp_path, capsys):
    other = tmp_path / "other"
    config, tensors = pretrained_models.tiny("llama3", seed=1, vocab_size=ROWS)
    pretrained_models.write_safetensors(other, config, tensors)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((checkpoint / name).read_bytes())
    (tmp_path / "p.txt").write_text("x")
    status = command.main([*flags, f"--config.pretrained.path={other}", f"--draft={exported}",
                          f"--prompts={tmp_path / 'p.txt'}"])  # fmt: skip
    assert status == 2 and "made for another target" in capsys.readouterr().err


def test_another_checkpoint_under_the_same_name_is_another_target(workdir, flags, checkpoint):
    """The draft's identity holds the hash of what it was trained on, not its path."""
    weights = checkpoint / "model.safetensors"
    before = weights.read_bytes()
    try:
        changed = bytearray(before)
        changed[-1] ^= 1
        weights.write_bytes(changed)
        assert run.main([*flags, f"--workdir={workdir}", "--stages=drafts"]) == 2
    finally:
        weights.write_bytes(before)
