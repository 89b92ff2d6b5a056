"""A repository, a cloud of files and a PATH of stubs for each test of a launcher."""

import pytest
from pod_place import Place, make_stubs


@pytest.fixture(scope="session")
def stubs(tmp_path_factory):
    return make_stubs(tmp_path_factory.mktemp("pods"))


@pytest.fixture
def place(stubs, tmp_path):
    place = Place(stubs, tmp_path)
    yield place
    assert place.cloud.mistakes() == ""
