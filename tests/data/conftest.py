"""Fixtures of the data tests."""

import pytest

from ivcr_jax.data.store import DialogueStore, VideoStore
from tests.data import sources


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """The dialogues of train, the feature store and the tokenizer of the small source made in code."""
    folder = tmp_path_factory.mktemp("stores")
    sources.build_dialogues(folder, 120)
    sources.build_features(folder)
    return DialogueStore(folder / "data", "train"), VideoStore(folder / "features"), sources.tokenizer()
