"""Export a trained draft as a folder to pass on: config.json and model.safetensors.

    python -m spire_jax.export --config=configs/smollm2_135m.py --workdir=runs/smollm2 \\
        --draft=quarter --out=smollm2-quarter

The folder names the hash of the target's weights, and serves that target alone:

    python -m spire_jax.decode --config=configs/smollm2_135m.py --draft=smollm2-quarter ...
"""

import argparse
import logging
import pathlib
import sys
from collections.abc import Sequence

from spire_jax.config.files import command_line, ends_in_a_line
from spire_jax.config.paths import local_path, path_or_url
from spire_jax.config.schema import ConfigError, ExperimentConfig
from spire_jax.config.values import to_dict
from spire_jax.pretrained.exported_draft import export_draft
from spire_jax.training.tasks import draft_task
from spire_jax.training.workdir import ERRORS, WorkDir


def export(config: ExperimentConfig, workdir: str, name: str, out: str | pathlib.Path) -> str:
    """Export the draft `name` of a work directory to the folder `out`; what was exported, in words.

    Raises:
        ConfigError: no such draft, or one that is not trained.
        PretrainedError: `out` holds something else.
    """
    draft = config.draft(name)
    if (of := config.weights(name)) not in ("", name):
        raise ConfigError(f"--draft={name} drafts with the weights of {of}; export that one")
    if not of:
        raise ConfigError(f"--draft={name}: of kind {draft.kind!r} nothing is trained, so that "
                          f"there is nothing to export; name it in a config")  # fmt: skip
    at = WorkDir(config, workdir)
    task, params = draft_task(config, name), at.draft(name)
    own = {key: value for key, value in params.items() if key not in task.shared}
    trained_on = {
        "steps": task.steps,
        "k": draft.rollout(config.train),
        "tokens": task.steps * config.train.batch_size * config.train.seq_len,
        "train": to_dict(config.train),
        "continuations": to_dict(config.continuations),
        "corpus": at.corpus.summary(),
    }
    made = export_draft(out, own, draft, config.target, at.target_sha256, trained_on)
    return f"{made}: {name}, for the target {at.target_sha256[:16]}"


def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m spire_jax.export", None, __doc__,
                                     formatter_class=raw)  # fmt: skip
    parser.add_argument("--workdir", type=path_or_url, required=True,
                        help="where the draft was trained")  # fmt: skip
    parser.add_argument("--draft", required=True, help="its name in the config")
    parser.add_argument("--out", type=local_path, required=True, help="the folder to write")
    args, config = command_line(parser, argv)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with ends_in_a_line(*ERRORS):
        print(export(config, args.workdir, args.draft, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
