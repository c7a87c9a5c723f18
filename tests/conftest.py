"""Fixtures shared by all tests, and the machine they see: 8 virtual CPU devices."""

import atexit
import os
import pathlib
import shutil
import signal
import sys
import tempfile

# Before anything imports jax.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# The models here are tiny, so compiling them is most of the time. Said here, so that a process that a test starts
# computes the same bits as this one.
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
if sys.version_info < (3, 12):  # the jaxlib of newer Pythons has no such flags, and ends the process at one it lacks
    # One part of a program at a time: the processes of the tests keep the cores busy by themselves.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # shared by the processes of this run, and gone with it
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ivcr_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # what one process compiled, no other compiles again

import pytest

REALDATA = pathlib.Path(__file__).resolve().parents[2] / "shared" / "realdata"


def pytest_configure() -> None:
    """A shell that runs the tests in the background has Ctrl-C ignored, and what they start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
