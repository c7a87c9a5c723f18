"""Fixtures shared by all tests."""

import pathlib

import pytest

REALDATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "realdata"


@pytest.fixture(scope="session")
def realdata() -> pathlib.Path:
    """The folder of real clips, annotations and tokenizers, which is not part of the repository."""
    if not REALDATA.is_dir():
        pytest.skip(f"the folder of real media is absent: {REALDATA}")
    return REALDATA
