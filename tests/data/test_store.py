"""The stores, against what was put in."""

import pickle
import shutil

import numpy as np
import pytest

from ivcr_jax.data import store
from tests.data import sources


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    sources.build_dialogues(folder, 40)
    sources.build_features(folder)
    return folder


def test_dialogues_come_back_as_they_were_in_the_source(folder):
    seen = {}
    for split in ("train", "validation", "test"):
        dialogues = store.DialogueStore(folder / "data", split)
        assert len(dialogues) == len(dialogues.ids) > 0
        for number, name in enumerate(dialogues.ids):
            dialogue = dialogues[number]
            assert (dialogue.id, dialogue.split) == (name, split)
            seen[name] = dialogue
    assert len(seen) == 40
    for number in range(40):
        raw = sources.raw_dialogue(number, "test" if number % 4 == 3 else "train")
        messages = raw["conversations"]
        dialogue = seen[raw["id"]]
        assert len(dialogue.turns) == len(messages) // 2
        for turn, human, gpt in zip(dialogue.turns, messages[::2], messages[1::2], strict=True):
            assert (turn.user, turn.answer) == (human["value"], gpt["value"])
            assert turn.language == ("zh" if number % 5 == 0 else "en")
            assert turn.video_id == gpt.get("video_id", "").removesuffix(".mp4")
            assert list(turn.candidates) == [c.removesuffix(".mp4") for c in gpt.get("candidate_videos", [])]
            if gpt.get("gt_se", [-1, -1]) == [-1, -1]:
                assert turn.span is None
            else:
                assert turn.span == pytest.approx(gpt["gt_se"], abs=1e-5)


def test_features_come_back_exactly(folder):
    videos = store.VideoStore(folder / "features")
    assert (videos.kind, videos.item_shape, videos.dtype) == ("features", sources.SHAPE, np.float32)
    assert videos.made_by is None
    assert len(videos) == sources.VIDEOS and "corpus/v3" in videos and "corpus/v99" not in videos
    for number in range(sources.VIDEOS):
        name, duration, times, array = sources.features_of(number)
        assert (videos.duration[name], videos.num_frames[name]) == (duration, len(times))
        stored = videos.read(name)
        assert stored.duration == duration and (stored.times == times).all()
        out = np.full((4, *sources.SHAPE), -1, np.float32)
        chosen = np.array([0, len(times) - 1])
        videos.decode(stored, chosen, out)
        assert (out[:2] == array[chosen]).all() and (out[2:] == -1).all()
    with pytest.raises(KeyError, match="corpus/v99"):
        videos.read("corpus/v99")


def test_shards_written_one_by_one_are_one_store_in_their_order(tmp_path):
    numbers = [[4, 0], [1], [3, 2]]
    shards = store.feature_shards(tmp_path, 3)
    kind = {"shape": sources.SHAPE, "dtype": np.float32}
    for path, part in reversed(list(zip(shards, numbers, strict=True))):
        store.write_feature_shard(path, (sources.features_of(n) for n in part), **kind)
    order = [number for part in numbers for number in part]
    rows = [(name, duration, len(times)) for name, duration, times, _ in map(sources.features_of, order)]
    index = dict(zip(("id", "duration", "num_frames"), map(list, zip(*rows, strict=True)), strict=True))
    store.describe_features(tmp_path, index, [2, 1, 2], **kind, fingerprint="x", made_by={"tower": "t", "sizes": [1]})
    videos = store.VideoStore(tmp_path)
    assert (videos.fingerprint, videos.made_by) == ("x", {"tower": "t", "sizes": [1]})
    assert list(videos.duration) == [sources.name_of(number) for number in order]
    for number in order:
        assert (videos.read(sources.name_of(number)).payload == sources.features_of(number)[3]).all()
    with pytest.raises(RuntimeError, match="stopped"):
        store.write_feature_shard(tmp_path / "half", _stopping(), **kind)
    assert not list(tmp_path.glob("*half*")) and not list(tmp_path.glob(".*"))


def _stopping():
    yield sources.features_of(1)
    raise RuntimeError("stopped")


def test_stores_travel_to_other_processes(folder):
    videos = store.VideoStore(folder / "features")
    dialogues = store.DialogueStore(folder / "data", "train")
    first = dialogues[0]
    videos.read("corpus/v1")
    videos, dialogues = pickle.loads(pickle.dumps((videos, dialogues)))
    assert dialogues[0] == first and len(videos.read("corpus/v1").times) == 5


def test_features_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus/v1: features \(5, 2, 3\) at 5 times; expected \(5, 9\)"):
        store.write_feature_shard(tmp_path / "x", [sources.features_of(1)], shape=(9,), dtype=np.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["absent", "empty"])
def test_a_missing_shard_is_not_read_past(folder, tmp_path, fault):
    copy = tmp_path / "features"
    shutil.copytree(folder / "features", copy)
    (shard,) = copy.glob("*array_record*")
    shard.unlink()
    if fault == "empty":
        shard.write_bytes(b"")
    with pytest.raises(store.DatasetNotFound, match="index lists 12 records of corpus, .* a shard is absent"):
        store.VideoStore(copy).read("corpus/v1")


def test_what_is_no_dataset_says_so(folder, tmp_path):
    with pytest.raises(store.DatasetNotFound, match=r"no split 'dev'; it has \['test', 'train', 'validation'\]"):
        store.DialogueStore(folder / "data", "dev")
    with pytest.raises(store.DatasetNotFound, match="no such folder"):
        store.DialogueStore(tmp_path / "gone", "train")
    with pytest.raises(store.DatasetNotFound, match="found: none"):
        store.DialogueStore(tmp_path, "train")
    with pytest.raises(store.DatasetNotFound, match="expected one built dataset at or below it, found: .*, "):
        store.DialogueStore(folder, "train")


@pytest.mark.parametrize(("stored", "wanted"), [(5, 8), (8, 8), (64, 64), (96, 64), (100, 7), (1, 1), (0, 3)])
def test_choose_stored(stored, wanted):
    middle = store.choose_stored(stored, wanted, None)
    assert len(middle) == min(stored, wanted)
    if stored > wanted:
        # Frame i stands for the times [i, i + 1): the middle of each of `wanted` equal intervals.
        assert middle.tolist() == [int((i + 0.5) * stored / wanted) for i in range(wanted)]
    drawn = [store.choose_stored(stored, wanted, np.random.default_rng(seed)) for seed in range(40)]
    for chosen in drawn:
        assert (np.diff(chosen) > 0).all() and (chosen >= 0).all() and (chosen < stored).all()
        if stored > wanted:
            assert all(int(i * stored / wanted) <= c <= (i + 1) * stored / wanted for i, c in enumerate(chosen))
    if stored > wanted:
        assert len({tuple(chosen) for chosen in drawn}) > 1
