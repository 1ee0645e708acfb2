"""Keeps the files of hypothesis out of the repository."""

import pytest
from hypothesis.configuration import set_hypothesis_home_dir


@pytest.fixture(scope='session', autouse=True)
def hypothesis_home(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp('hypothesis'))
