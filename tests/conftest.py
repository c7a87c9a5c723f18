"""Fixtures shared by all tests, and the machine they see: 8 virtual CPU devices."""

import atexit
import os
import pathlib
import shutil
import tempfile

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # shared by the processes of this run, and gone with it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ivcr_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import pytest

REALDATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "realdata"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that of several workers none begins a long one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def realdata() -> pathlib.Path:
    """The folder of real clips, annotations and tokenizers, which is not part of the repository."""
    if not REALDATA.is_dir():
        pytest.skip(f"the folder of real media is absent: {REALDATA}")
    return REALDATA
