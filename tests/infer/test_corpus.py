"""Reading a corpus: what is in it, what is found, and what is refused."""

import io
import json
import os
import pathlib
import shutil
import subprocess
import sys

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax import bundle, index
from ivcr_jax.data import video
from ivcr_jax.infer import corpus as stored
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.infer.conftest import FRAMES, IDS, write_export

ROOT = pathlib.Path(__file__).parents[2]


def near(found, expected):
    """Of the size that rounding to float16 makes."""
    expected = np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * max(1, np.abs(expected).max()))


embed_video = nnx.jit(lambda retriever, frames: retriever.embed_video(frames))
embed_frames = nnx.jit(lambda retriever, frames: retriever.embed_frames(frames))
encode = nnx.jit(lambda encoder, frames, text, mask: encoder(frames, None, text, mask))


def check_against_the_models(export, videos, folder):
    """Every record against each video encoded by itself, without padding."""
    models = bundle.load(export)
    corpus = Corpus.open(folder, bundle.fingerprint(export))
    for row, entry in enumerate(corpus.videos):
        record = corpus.read(entry.id)
        of_retriever, of_model = (
            video.sample_frames(videos / entry.path, FRAMES, size=(side, side)) for side in (16, 24)
        )
        np.testing.assert_array_equal(record.times, of_model.times)
        count = len(record.times)
        assert count == entry.frames
        expected = embed_video(models.retriever, of_retriever.images[None])[0]
        np.testing.assert_allclose(record.video, expected, atol=1e-5)
        np.testing.assert_array_equal(record.video, corpus.vectors[row])
        frames = np.asarray(embed_frames(models.retriever, of_retriever.images[None])[0])
        near(record.frames, frames / np.linalg.norm(frames, axis=-1, keepdims=True))
        text = (None, None)
        if models.tokenizer:
            text = (part[None] for part in models.frame_text(of_model.times))
        encoded = encode(models.model.encoder, of_model.images[None], *text)
        there = record.token_mask
        assert len(there) == 6 and there.sum() == encoded.tokens.shape[1]  # two queries of three windows
        near(record.tokens[there], encoded.tokens[0])
        assert not record.tokens[~there].any()
        near(record.moment_keys, models.model.moment.keys(encoded.frames)[0])
        dtypes = [record.video.dtype, record.frames.dtype, record.tokens.dtype, record.moment_keys.dtype]
        assert dtypes == [np.float32, np.float16, np.float16, np.float16]


def test_records_are_what_the_models_say(export, videos, indexed):
    check_against_the_models(export, videos, indexed)


@pytest.mark.slow
def test_records_of_models_that_read_no_text(videos, tmp_path):
    """And in another batch, on one device."""
    export = write_export(tmp_path / "export", text=False)
    index.add(export, videos, tmp_path / "corpus", batch=3, mesh=make_mesh(MeshConfig(), jax.devices()[:1]))
    check_against_the_models(export, videos, tmp_path / "corpus")


def test_videos_are_described(videos, indexed):
    corpus = Corpus.open(indexed)
    assert [entry.id for entry in corpus.videos] == IDS
    fish, _, d, talk = corpus.videos
    assert (fish.path, fish.source, fish.title) == ("cooking/b_fish.mov", "cooking", "b fish")
    assert (fish.width, fish.height, fish.frames, fish.duration) == (48, 80, 4, pytest.approx(4 / 25, abs=0.01))
    assert (d.source, talk.source, talk.frames, talk.fps) == ("", "2024", FRAMES, pytest.approx(25))
    for entry in corpus.videos:
        status = os.stat(videos / entry.path)
        assert (entry.size, entry.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert corpus.problems == ()


def test_thumbnails_are_jpeg_files_of_the_frames(videos, indexed):
    corpus = Corpus.open(indexed)
    thumbnails = corpus.thumbnails("cooking/b_fish")
    assert len(thumbnails) == 4
    for jpeg in thumbnails:
        (frame,) = av.CodecContext.create("mjpeg", "r").decode(av.Packet(jpeg))
        assert (frame.height, frame.width) == (80, 48)  # upright, and no larger than the video
    of_talk = corpus.thumbnails("talks/2024/a")
    frames = video.sample_frames(videos / "talks/2024/a.mp4", FRAMES, size=(48, 80)).images
    assert np.abs(video.decode_jpegs(of_talk, (48, 80)).astype(int) - frames).mean() < 8


def test_it_is_searched_by_what_it_holds(indexed):
    corpus = Corpus.open(indexed, mesh=make_mesh(MeshConfig()))
    scores, found = corpus.search(corpus.vectors, 2)
    np.testing.assert_array_equal(found[:, 0], range(4))
    np.testing.assert_allclose(scores[:, 0], 1, atol=1e-5)
    _, found = corpus.search(corpus.vectors, 4, corpus.allowed(source="cooking"))
    np.testing.assert_array_equal(np.sort(found), [[-1, -1, 0, 1]] * 4)


def test_filters_say_which(indexed):
    corpus = Corpus.open(indexed)

    def passed(**filters):
        return [entry.id for entry, there in zip(corpus.videos, corpus.allowed(**filters), strict=True) if there]

    assert passed() == IDS
    assert passed(source="cooking") == IDS[:2] and passed(source="") == ["d"] and passed(source="else") == []
    exact = corpus.videos[2].duration
    assert passed(duration=(exact, exact)) == ["d"] and passed(duration=(0.5, 100)) == ["cooking/c", "talks/2024/a"]
    assert passed(ids=["d", "cooking/c"]) == ["cooking/c", "d"] and passed(ids=[]) == []
    assert passed(source="cooking", without=["cooking/c"]) == ["cooking/b_fish"]
    for filters in ({"ids": ["e"]}, {"without": ["e"]}):
        with pytest.raises(ValueError, match="found no video 'e' in .*indexed; expected one of its 4 ids"):
            corpus.allowed(**filters)
    with pytest.raises(ValueError, match="found no video 'e'"):
        corpus.read("e")


def a_corpus_of(vectors, folder):
    """A corpus of these vectors alone, its records empty files."""
    names = [f"v{number:04}" for number in range(len(vectors))]
    (folder / stored.RECORDS).mkdir(parents=True)
    entries = {
        name: stored.Video(name, f"{name}.mp4", "", name, 1.0, 8, 8, 25.0, 1, 0, 1, 1, f"{name}.npz", 0)
        for name in names
    }
    for entry in entries.values():
        (folder / stored.RECORDS / entry.record).touch()
    stored.write_contents(folder, "f", entries, dict(zip(names, vectors, strict=True)), {}, vectors.shape[1])
    return Corpus.open(folder)


def test_groups_are_the_connected_components(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((12, 8), np.float32)[rng.integers(0, 12, 150)]
    step = rng.standard_normal(8).astype(np.float32)
    vectors[100:140] = vectors[100] + 0.02 * np.arange(40)[:, None] * step  # a chain
    vectors[20:40], vectors[60:80] = step, step + 0.01 * vectors[100]  # nearer to their own than to each other
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = vectors @ vectors.T >= 0.999
    expected = np.arange(150)
    for _ in range(150):  # each takes the lowest number of its neighbours until nothing changes
        expected = np.where(near, expected[None], 150).min(1)
    found = a_corpus_of(vectors, tmp_path).groups(0.999)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.int32 and 6 < len({*found.tolist()}) < 60
    assert not near[100, 139] and found[100] == found[139]  # joined by what lies between


def test_a_corpus_of_nothing_is_searched_too(tmp_path):
    corpus = a_corpus_of(np.zeros((0, 5), np.float32), tmp_path)
    scores, found = corpus.search(np.ones((2, 5), np.float32), 3, corpus.allowed(source="x", duration=(0, 1), ids=[]))
    assert corpus.videos == () and scores.shape == found.shape == (2, 0) and corpus.groups(0.9).shape == (0,)


def edit(folder, **changes):
    path = folder / stored.ROOT
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, left):
    path.write_bytes(path.read_bytes()[:left])


def first_record(folder):
    return folder / stored.RECORDS / json.loads((folder / stored.ROOT).read_text())["videos"][0]["record"]


def vectors_of(folder):
    (path,) = folder.glob("vectors-*.npy")
    return path


def save_vectors(folder, array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    vectors_of(folder).write_bytes(buffer.getvalue())


REFUSED = {
    "nothing there": (shutil.rmtree, "found no corpus.json, expected a folder that python -m ivcr_jax.index wrote"),
    "corpus.json cut off": (lambda f: cut(f / stored.ROOT, 300), r"found what is no JSON \(.*expected a whole corpus"),
    "another version": (lambda f: edit(f, version=2), "corpus.json: found format version 2, expected 1; index the"),
    "no corpus at all": (lambda f: (f / stored.ROOT).write_text("[1]"), "found format version None, expected 1"),
    "a field less": (lambda f: edit(f, videos=[{}]), "corpus.json: .*missing 14 required.*; expected the fields of"),
    "another export": (lambda f: edit(f, fingerprint="0" * 64), "was made with the export 000000000000, and this one"),
    "a record gone": (lambda f: first_record(f).unlink(), "found no record of cooking/b_fish .*, expected [0-9]+ byte"),
    "a record cut off": (
        lambda f: cut(first_record(f), 100),
        "found 100 bytes, expected [0-9]+, the record of cooking",
    ),
    "vectors gone": (lambda f: vectors_of(f).unlink(), r"vectors-.*npy: cannot be read \(.*No such file.*, expected"),
    "vectors cut off": (lambda f: cut(vectors_of(f), 150), r"vectors-.*npy: cannot be read \(.*expected the vectors"),
    "too few vectors": (
        lambda f: save_vectors(f, np.zeros((3, 16), np.float32)),
        r"found float32\[3, 16\], expected float32\[4, width\]",
    ),
    "other numbers": (
        lambda f: save_vectors(f, np.zeros((4, 16))),
        r"found float64\[4, 16\], expected float32\[4, width\]",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_no_whole_corpus_is_refused(export, indexed, tmp_path, how):
    folder = tmp_path / "corpus"
    shutil.copytree(indexed, folder)
    Corpus.open(folder, bundle.fingerprint(export))
    spoil, sentence = REFUSED[how]
    spoil(folder)
    with pytest.raises(CorpusError, match=sentence):
        Corpus.open(folder, bundle.fingerprint(export))


def test_a_record_that_was_spoilt_since_is_refused(indexed, tmp_path):
    shutil.copytree(indexed, tmp_path / "corpus")
    corpus = Corpus.open(tmp_path / "corpus")
    cut(first_record(tmp_path / "corpus"), 100)
    for read in (corpus.read, corpus.thumbnails):
        with pytest.raises(CorpusError, match="npz: cannot be read .*expected the record of cooking/b_fish"):
            read("cooking/b_fish")
    corpus.read("d")


def test_an_export_has_one_fingerprint(export, tmp_path):
    fingerprint = bundle.fingerprint(export)
    shutil.copytree(export, tmp_path / "copy")
    (tmp_path / "copy" / "model" / ".DS_Store").touch()
    (tmp_path / "copy" / "README.txt").touch()
    assert bundle.fingerprint(tmp_path / "copy") == fingerprint
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        bundle.fingerprint(tmp_path)


@pytest.mark.parametrize("part", ["model", "retriever"])
def test_any_weight_changes_the_fingerprint(export, tmp_path, part):
    found = bundle.load(export)
    weights = {"model": bundle.weights(found.model), "retriever": bundle.weights(found.retriever)}
    path = sorted(weights[part])[0]
    weights[part][path] = weights[part][path].at[(0,) * weights[part][path].ndim].add(jnp.float32(1e-3))
    shutil.copytree(export, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / part)
    bundle.write_tree(tmp_path / "copy" / part, bundle.nest(weights[part]))
    assert bundle.fingerprint(tmp_path / "copy") != bundle.fingerprint(export)


def test_reading_needs_no_training_library():
    """Nor does indexing, beside absl and tqdm."""
    light = "import ivcr_jax.infer.corpus, ivcr_jax.infer.search, ivcr_jax.infer.embed, ivcr_jax.infer.verify"
    heavy = {"tensorflow_datasets", "grain", "ml_collections", "tensorflow", "torch", "array_record"}
    for imports, unwanted in ((light, heavy | {"tqdm"}), ("import ivcr_jax.index", heavy)):
        code = f"import sys; {imports}; print(*sorted({unwanted} & {{*sys.modules}}))"
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert (run.returncode, run.stdout) == (0, "\n"), run
