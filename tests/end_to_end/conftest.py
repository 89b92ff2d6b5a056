"""One finished run, shared by the tests that only look at it or copy it."""

import pipelines
import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return pipelines.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert pipelines.main(corpus, workdir) == 0
    return workdir
