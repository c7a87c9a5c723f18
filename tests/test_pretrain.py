"""Model folders written and read back; pretraining: its labels against drawn pixels, what it may see, its folder."""

import dataclasses
import json
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax import bundle, pretrain, pretrain_text
from ivcr_jax.bundle import BundleConfig
from ivcr_jax.data import scenes, synth
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.store import DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.pretrain import LOOKS
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

VOCAB = 600
VIT = ViTConfig(image_size=48, patch_size=12, width=16, layers=1, heads=2, mlp_width=24, cls_token=False)
QFORMER = QFormerConfig(
    queries=2, width=16, layers=1, heads=2, mlp_width=24, cross_every=1, vocab_size=0, max_text=0, dropout=0.0
)
CONFIG = BundleConfig(
    InterLLaVAConfig(
        vit=VIT,
        qformer=QFORMER,
        video_qformer=QFORMER,
        llama=LlamaConfig(vocab_size=VOCAB, width=16, layers=1, heads=2, kv_heads=2, mlp_width=24),
        lora=LoraConfig(rank=0),
        rank=RankHeadConfig(width=8, heads=2),
        moment=MomentHeadConfig(width=8, layers=1, heads=2),
    ),
    RetrieverConfig(
        vit=dataclasses.replace(VIT, map_head=True),
        text=TextConfig(vocab_size=VOCAB, max_tokens=8, width=16, layers=1, heads=2, mlp_width=24),
    ),
    PromptStyle(frame_times=False),
)
FILES = {"config.json", "model", "retriever", "tokenizer.model", "retriever_tokenizer.model"}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(pretrain, "BATCH", 16)
    monkeypatch.setattr(pretrain_text, "BATCH", 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sixty synthetic videos and what is built from them."""
    folder = tmp_path_factory.mktemp("pretrain")
    synth.generate(folder / "source", videos=60, interactions=300, seconds=5.0, seed=3, workers=1)
    build("ivcr200k", manual_dir=folder / "source", data_dir=folder)
    frames = VideosConfig(frames=4, size=48)
    build("ivcr200k_videos", manual_dir=folder / "source", data_dir=folder, config=frames)
    return folder


@pytest.fixture(scope="module")
def proto(folder):
    """A SentencePiece model of VOCAB ids."""
    texts = [json.loads(line)["video"] for line in (folder / "source" / "truth.jsonl").read_text().splitlines()]
    return train_demo([*texts, (folder / "source" / "truth.jsonl").read_text()], VOCAB).proto


@pytest.fixture(scope="module")
def parameters():
    model, retriever = jax.jit(
        lambda: (
            bundle.weights(InterLLaVA(CONFIG.model, nnx.Rngs(1))),
            bundle.weights(Retriever(CONFIG.retriever, nnx.Rngs(2))),
        )
    )()
    model["encoder.projection.kernel"] = model["encoder.projection.kernel"].astype(jnp.bfloat16)
    return {"model": model, "retriever": retriever}


def pretrained(folder, out, config=CONFIG, seed=0, text_steps=2, **paths):
    built = {"source": folder / "source", "dialogues": folder / "ivcr200k", "videos": folder / "ivcr200k_videos"}
    return pretrain.pretrain(config, **(built | paths), out=out, steps=2, text_steps=text_steps, seed=seed)


def assert_same(module, expected):
    found = bundle.weights(module)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert found[path].dtype == value.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(value), err_msg=path)


def test_a_model_folder_comes_back_bit_for_bit(parameters, proto, tmp_path):
    names = (bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER)
    bundle.save(tmp_path / "a" / "model", CONFIG, **parameters, tokenizers=dict.fromkeys(names, proto))
    assert {path.name for path in (tmp_path / "a" / "model").iterdir()} == FILES
    read = bundle.load(tmp_path / "a" / "model")
    assert read.config == CONFIG
    assert_same(read.model, parameters["model"])
    assert_same(read.retriever, parameters["retriever"])
    assert read.tokenizer.proto == read.retriever_tokenizer.proto == proto
    assert (read.tokenizer.vocab_size, read.retriever_tokenizer.vocab_size) == (VOCAB + 5, VOCAB)


def test_a_part_of_a_model_folder_may_be_absent(parameters, tmp_path):
    config = dataclasses.replace(CONFIG, model=None)
    bundle.save(tmp_path / "model", config, retriever=parameters["retriever"], tokenizers={})
    read = bundle.load(tmp_path / "model")
    assert read.model is read.tokenizer is read.retriever_tokenizer is None
    assert_same(read.retriever, parameters["retriever"])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": None}, "config.model: found no parameters"),
        ({"config": dataclasses.replace(CONFIG, retriever=None)}, "retriever: found parameters, but"),
        ({"tokenizers": {"words.model": b""}}, "found 'words.model', expected tokenizer.model or"),
        ({"tokenizers": {"tokenizer.model": b"no"}}, "^tokenizer.model: .* expected a whole SentencePiece"),
        ({"config": dataclasses.replace(
            CONFIG, retriever=dataclasses.replace(
                CONFIG.retriever, text=dataclasses.replace(CONFIG.retriever.text, vocab_size=VOCAB + 1)
            )
        )}, f"^retriever_tokenizer.model: the tokenizer has {VOCAB} ids; expected {VOCAB + 1}"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_not_written(parameters, proto, tmp_path, change, expected):
    given = {"config": CONFIG, **parameters, "tokenizers": {"retriever_tokenizer.model": proto}} | change
    with pytest.raises(ValueError, match=expected):
        bundle.save(tmp_path / "model", **given)
    assert not [*tmp_path.iterdir()]


def test_a_model_folder_is_never_half_written_and_never_overwritten(parameters, tmp_path):
    def write(path, tree):
        bundle.write_tree(path, tree)
        if path.name == "retriever":
            assert (path.parent / "model").is_dir() and not (tmp_path / "model").exists()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        bundle.save(tmp_path / "model", CONFIG, **parameters, tokenizers={}, write=write)
    assert not [*tmp_path.iterdir()]
    (tmp_path / "model").mkdir()
    with pytest.raises(FileExistsError, match="model exists; a model folder is written to a new one"):
        bundle.save(tmp_path / "model", CONFIG, **parameters, tokenizers={})
    assert [*tmp_path.iterdir()] == [tmp_path / "model"] and not [*(tmp_path / "model").iterdir()]


@pytest.mark.parametrize(("side", "patch"), [(6, 8), (4, 12)])
def test_labels_are_what_was_drawn(side, patch):
    checked = dict.fromkeys(("hidden", "seen", "recoloured", "nothing"), 0)
    for video in synth.invent(40, seed=5, size=(48, 48), fps=8, seconds=4.0):
        scene = video.scene
        pictures = np.stack([*scenes.draw(scene)])
        indices = np.arange(0, scene.frames, 3)
        labels = pretrain.label(scene, indices, side)
        pixels = pretrain.pixels_of(scene, indices)
        for place, index in enumerate(indices):
            # Pixel by pixel: any of the six colours or none.
            colours = [(pictures[index] == colour).all(-1) for colour in scenes.COLOURS.values()]
            np.testing.assert_array_equal(pixels[place], np.any(colours, axis=0))
            for p in range(side * side):
                here = {name: values[place, p] for name, values in labels.items()}
                top, left = p // side * patch, p % side * patch
                if not here["there"]:
                    assert not any(np.any(value) for value in here.values())
                    # The patch's middle is between four pixels: no thing shows in all of them.
                    y, x = top + patch // 2 - 1, left + patch // 2 - 1
                    assert not pixels[place, y : y + 2, x : x + 2].all()
                    checked["nothing"] += 1
                    continue
                x, y = here["offset"] * patch + (left + patch / 2, top + patch / 2) - 0.5
                assert x == pytest.approx(round(x), abs=1e-3) and y == pytest.approx(round(y), abs=1e-3)
                x, y = round(x), round(y)
                assert here["centre"] == (left <= x < left + patch and top <= y < top + patch)
                colour, shape, size = (pretrain.LOOKS[name][here[name]] for name in pretrain.LOOKS)
                (thing,) = (
                    thing
                    for thing in scene.things
                    if (thing.shape, thing.size) == (shape, size)
                    and colour in (thing.colour, thing.second)
                    and (scenes.path(scene, thing)[index] == (x, y)).all()
                )
                covered = (pictures[index, y, x] != scenes.COLOURS[colour]).any()
                checked["hidden" if covered else "seen"] += 1  # hidden by a smaller thing, which its patch may show
                checked["recoloured"] += colour == thing.second
                inside = thing.start - 1e-6 < index / 8 < thing.end - 1e-6
                assert {"appears": inside, "leaves": not inside}.get(thing.event, True)
                assert colour == (thing.second if inside and thing.second else thing.colour)
    assert checked["seen"] > 50 * checked.pop("hidden") and min(checked.values()) > 0, checked


def test_every_visible_thing_has_one_patch_with_its_centre():
    for video in synth.invent(25, seed=6, size=(48, 48), fps=8, seconds=4.0):
        alone = dataclasses.replace(video.scene, things=video.scene.things[:1])
        indices = np.arange(alone.frames)
        (thing,) = alone.things
        inside = scenes.during(alone, thing)
        visible = {"appears": inside, "leaves": ~inside}.get(thing.event, np.ones_like(inside))
        np.testing.assert_array_equal(pretrain.label(alone, indices, 6)["centre"].sum(-1), visible)
        np.testing.assert_array_equal(pretrain.pixels_of(alone, indices).any((1, 2)), visible)


def test_things_are_pasted_where_they_cover_nothing():
    rng = np.random.default_rng(0)
    there = np.zeros((3, 1, 4), bool)  # three frames of four patches, 2 x 2 pixels each
    there[0, 0, 0] = there[1, 0, 3] = there[2, 0, 0] = there[2, 0, 1] = True  # the third overlaps with the first
    pixels = there.reshape(3, 1, 2, 1, 2, 1).repeat(2, 3).repeat(2, 5).reshape(3, 1, 4, 4)
    images = rng.integers(0, 255, (3, 1, 4, 4, 3), dtype=np.uint8)
    labels = {"there": there, "colour": rng.integers(1, 6, there.shape), "offset": rng.random((*there.shape, 2))}
    image, shown = pretrain.crowd(images, pixels, labels)
    np.testing.assert_array_equal(shown["there"][0], [True, False, False, True])
    np.testing.assert_array_equal(
        shown["colour"][0, [0, 1, 2, 3]], [*labels["colour"][0, 0, :3], labels["colour"][1, 0, 3]]
    )
    np.testing.assert_allclose(shown["offset"][0, 3], labels["offset"][1, 0, 3], rtol=1e-6)
    expected = images[0, 0].copy()
    expected[2:, 2:] = images[1, 0, 2:, 2:]
    np.testing.assert_array_equal(image[0], expected)


def test_what_a_frame_shows_of_each_colour():
    colour, shape = LOOKS["colour"].index, LOOKS["shape"].index
    labels = {name: np.zeros((1, 9), np.int32) for name in ("colour", "shape", "size")}
    labels |= {"centre": np.zeros((1, 9), bool), "offset": np.zeros((1, 9, 2), np.float32)}
    for patch, seen, form in ((5, "red", "cross"), (0, "blue", "square"), (8, "blue", "circle")):
        labels["centre"][0, patch] = True
        labels["colour"][0, patch], labels["shape"][0, patch] = colour(seen), shape(form)
    labels["colour"][0, 4] = colour("green")  # a patch that shows a thing, but not its centre
    labels["offset"][0, 5] = 0.25, -0.5
    found = {name: np.asarray(value)[0] for name, value in pretrain.by_colour(labels).items()}
    assert {LOOKS["colour"][place] for place in np.flatnonzero(found["there"])} == {"red", "blue"}
    assert np.flatnonzero(found["one"]).tolist() == [colour("red")]
    assert found["shape"][colour("red")] == shape("cross")
    np.testing.assert_allclose(found["place"][colour("red")], [2.75 / 3, 1 / 3], rtol=1e-6)


def asked_of(dialogues):
    """Ids of the answers of validation and test."""
    asked = set()
    for split in ("validation", "test"):
        stored = DialogueStore(dialogues, split)
        asked |= {turn.video_id for number in range(len(stored)) for turn in stored[number].turns}
    return asked - {""}


def test_the_answers_of_dialogues_held_out_are_held_out_whatever_the_source_says(folder):
    truth = pretrain.read_truth(folder / "source")
    truth = {name: dataclasses.replace(each, kept_out=False) for name, each in truth.items()}
    learnt, held_out = pretrain.divide(truth, folder / "ivcr200k")
    assert {*held_out} == asked_of(folder / "ivcr200k") & {*truth} != set()
    assert learnt == sorted({*truth} - {*held_out}) != []


def test_it_learns_from_no_video_that_is_held_out(folder, tmp_path, monkeypatch):
    seen = []
    train = pretrain.train
    monkeypatch.setattr(pretrain, "train", lambda vit, frames, *rest: seen.append(frames) or train(vit, frames, *rest))
    pretrained(folder, tmp_path / "model")
    rows = [json.loads(line) for line in (folder / "source" / "truth.jsonl").read_text().splitlines()]
    rows = {row["video"].rsplit(".", 1)[0]: row for row in rows}
    asked = asked_of(folder / "ivcr200k")
    out = {name for name, row in rows.items() if row["split"] != "train" or row["held_out"]} | asked & {*rows}
    assert {row["split"] for row in rows.values()} == {"train", "validation", "test"}
    videos = VideoStore(folder / "ivcr200k_videos")
    expected = []
    for name in sorted(rows):
        if name not in out:
            stored = videos.read(name)
            pictures = np.empty((4, 48, 48, 3), np.uint8)
            videos.decode(stored, np.arange(4), pictures)
            expected.append(pictures)
    assert 0 < len(expected) < 48
    np.testing.assert_array_equal(seen[0].images, np.concatenate(expected))
    assert bundle.load(tmp_path / "model").config == CONFIG
    # And what is told of a stored frame is of that very frame: JPEG changes pixels by little.
    colours = np.array([*scenes.COLOURS.values()])
    frames, patches = np.nonzero(seen[0].labels["centre"])
    x, y = (seen[0].labels["offset"][frames, patches] * 12 + np.stack([patches % 4, patches // 4], -1) * 12 + 5.5).T
    shown = seen[0].images[frames, np.rint(y).astype(int), np.rint(x).astype(int)].astype(int)
    nearest = np.linalg.norm(shown[:, None] - colours, axis=-1).argmin(-1)
    assert (nearest == seen[0].labels["colour"][frames, patches]).mean() > 0.97


def test_the_folder_holds_one_tower_and_depends_on_the_seed_alone(folder, tmp_path):
    scores = pretrained(folder, tmp_path / "a")
    looks = {"colour", "shape", "size", "there", "offset_pixels"}
    assert scores.keys() == looks | {"qformer_shape", "pool_shape"}
    assert pretrained(folder, tmp_path / "b") == scores
    read, again = bundle.load(tmp_path / "a"), bundle.load(tmp_path / "b")
    tower = bundle.weights(read.model.encoder.vit)
    assert_same(again.model, bundle.weights(read.model))
    assert_same(again.retriever, bundle.weights(read.retriever))
    mine = bundle.weights(read.retriever.vit)
    assert {path for path in mine if not path.startswith("head.")} == tower.keys()
    for path, value in tower.items():
        np.testing.assert_array_equal(np.asarray(mine[path]), np.asarray(value), err_msg=path)
    assert read.tokenizer.proto == read.retriever_tokenizer.proto == again.tokenizer.proto
    # All but what was trained is as the seed makes it.
    silent = pretrained(folder, tmp_path / "c", text_steps=0)
    assert silent == scores
    for module, fresh, trained in (
        (read.model, InterLLaVA(CONFIG.model, nnx.Rngs(0)), r"encoder\.(vit|vit_norm|qformer)\.|llama\."),
        (
            bundle.load(tmp_path / "c").model,
            InterLLaVA(CONFIG.model, nnx.Rngs(0)),
            r"encoder\.(vit|vit_norm|qformer)\.",
        ),
        (read.retriever, Retriever(CONFIG.retriever, nnx.Rngs(0)), r"vit\."),
    ):
        fresh = bundle.weights(fresh)
        for path, value in bundle.weights(module).items():
            if path == "logit_bias":
                assert value[0] == pretrain.LOGIT_BIAS
            elif not re.match(trained, path):
                np.testing.assert_allclose(value, fresh[path], rtol=1e-5, atol=1e-7, err_msg=path)
            elif path.endswith("kernel"):
                assert np.abs(np.asarray(value) - fresh[path]).max() > 1e-4, path


def test_training_lowers_the_loss_and_depends_on_the_seed(folder):
    truth = pretrain.read_truth(folder / "source")
    frames = pretrain.read_frames(VideoStore(folder / "ivcr200k_videos"), truth, [*truth], VIT)
    some = {name: values[:32] for name, values in frames.labels.items()}

    def trained(steps, seed):
        seer = pretrain.train(CONFIG, frames, steps, seed)
        return float(pretrain.loss(seer(frames.images[:32]), some))

    first = trained(1, 0)
    assert trained(100, 0) < 0.75 * first and trained(1, 1) != first


def test_the_decoder_learns_the_words_of_train_alone(folder, tmp_path, monkeypatch):
    seen = []
    train = pretrain_text.train
    monkeypatch.setattr(pretrain_text, "train", lambda *given: seen.append(given) or train(*given))
    pretrained(folder, tmp_path / "model")
    [(config, tokenizer, words, steps, seed)] = seen
    assert (config, steps, seed) == (CONFIG.model.llama, 2, 0)
    stored = DialogueStore(folder / "ivcr200k", "train")
    turns = [turn for number in range(len(stored)) for turn in stored[number].turns]
    assert words == [f"<s>[INST] {turn.user.strip()} [/INST] {turn.answer.strip()} </s>" for turn in turns] != []
    with pytest.raises(ValueError, match="found no turn in train"):
        train(config, tokenizer, [], 1, 0)


def test_the_decoder_comes_to_say_what_it_was_taught(proto):
    """Texts are known by heart: written greedily, a token at a time, from the message alone."""
    said = {"red square?": "It is there.", "蓝色的圆形？": "它在这里。", "green?": "No."}
    tokenizer = bundle.make_tokenizer(proto, CONFIG, bundle.TOKENIZER)
    words = [f"<s>[INST] {message} [/INST] {answer} </s>" for message, answer in said.items()]
    config = dataclasses.replace(CONFIG.model.llama, width=32, mlp_width=64)

    def answer(llama, message):
        run = nnx.jit(lambda llama, tokens: llama.logits(
            llama(llama.embed(tokens), jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))[0]
        ))  # fmt: skip
        tokens = np.zeros((1, 64), np.int32)
        written = first = len(ids := tokenizer.encode(f"<s>[INST] {message} [/INST]"))
        tokens[0, :first] = ids
        while written < 64 and tokens[0, written - 1] != tokenizer.ids["</s>"]:
            tokens[0, written] = run(llama, tokens)[0, written - 1].argmax()
            written += 1
        return tokenizer.decode(tokens[0, first:written].tolist())

    taught, new = (pretrain_text.train(config, tokenizer, words, steps, 0) for steps in (150, 1))
    for message, wanted in said.items():
        assert answer(taught, message).strip() == f"{wanted} </s>"
        assert answer(new, message).strip() != f"{wanted} </s>"


def with_vit(**changes):
    return dataclasses.replace(
        CONFIG, model=dataclasses.replace(CONFIG.model, vit=dataclasses.replace(VIT, **changes)), retriever=None
    )


@pytest.mark.parametrize(
    ("config", "paths", "expected"),
    [
        (dataclasses.replace(with_vit(mlp_width=32), retriever=CONFIG.retriever), {}, r"differ in \['mlp_width'\]"),
        (dataclasses.replace(CONFIG, model=None, retriever=None), {}, "found neither a model nor a retriever"),
        (with_vit(image_size=24), {}, r"found frames of shape \(48, 48, 3\), expected frames \(24, 24, 3\)"),
        (CONFIG, {"source": "nowhere"}, "truth.jsonl: no such file; expected the folder that"),
        (dataclasses.replace(CONFIG, model=None, retriever=dataclasses.replace(
            CONFIG.retriever, text=dataclasses.replace(CONFIG.retriever.text, vocab_size=50_000)
        )), {}, r"the tokenizer has \d+ ids; expected 50000"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_said_at_once(folder, tmp_path, monkeypatch, config, paths, expected):
    monkeypatch.setattr(pretrain, "train", None)
    with pytest.raises((ValueError, OSError), match=expected):
        pretrained(folder, tmp_path / "model", config, **paths)
    assert not [*tmp_path.iterdir()]


def test_a_store_of_other_videos_and_an_existing_folder_are_refused(folder, tmp_path):
    rows = (folder / "source" / "truth.jsonl").read_text().replace('"video": "', '"video": "Other')
    (tmp_path / "truth.jsonl").write_text(rows)
    with pytest.raises(ValueError, match=r"videos: found none for \d+ of \d+ ids of the source, such as \['Other"):
        pretrained(folder, tmp_path / "model", source=tmp_path)
    with pytest.raises(FileExistsError, match="exists; a model folder is written to a new one"):
        pretrained(folder, folder)


def test_the_command_says_what_is_wrong_in_one_line(folder, tmp_path):
    flags = [f"--source={tmp_path}", f"--dialogues={folder / 'ivcr200k'}", f"--videos={folder / 'ivcr200k_videos'}"]
    command = [sys.executable, "-m", "ivcr_jax.pretrain", "--config=configs/tiny.py", *flags]
    done = subprocess.run([*command, f"--out={tmp_path / 'model'}"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'truth.jsonl'}: no such file")
