"""Rows: every dialogue's tokens, targets and slots, against the dialogue encoded by itself."""

import dataclasses

import numpy as np
import pytest

from ivcr_jax.data import batches, packing, prompt
from ivcr_jax.data.dialogue import LANGUAGES, Dialogue, Intent, Turn
from ivcr_jax.data.encoding import EncodingConfig, encode, show
from ivcr_jax.data.store import VideoStore
from ivcr_jax.data.tokenizer import encode_query
from tests.data import sources
from tests.data.sources import PACK


def plan_of(stores, config=PACK, seed=0, keep_chat=True):
    return packing.make_plan(*stores, config, keep_chat=keep_chat, seed=seed)


def row_of(stores, plan, number, config=PACK, rng=None):
    dialogues, videos, tokenizer = stores
    batch = batches.empty_batch(1, config, batches.BatchShape.of(videos, tokenizer, config))
    content = []
    for record, turns in plan.row(number):
        dialogue = dialogues[record]
        content.append((record, dataclasses.replace(dialogue, turns=dialogue.turns[:turns])))
    for stored, chosen, out in batches.fill_row(batch, 0, content, videos, tokenizer, config, rng):
        videos.decode(stored, chosen, out)
    return {name: array[0] for name, array in batch.items()}, content


@pytest.mark.parametrize("layout", ["isolated", "inline"])
def test_a_row_holds_each_dialogue_as_it_is_alone(stores, layout):
    dialogues, videos, tokenizer = stores
    config = dataclasses.replace(PACK, encoding=dataclasses.replace(PACK.encoding, layout=layout))
    plan = plan_of(stores, config)
    several = 0
    for number in range(len(plan)):
        row, content = row_of(stores, plan, number, config)
        start = turn = 0
        slot_of = {}
        several += len(content) > 1
        for segment, (record, dialogue) in enumerate(content, start=1):
            times = {name: row_times(videos, name, config) for name in dialogue.videos}
            alone = encode(show(dialogue, config.encoding, insert_truth=True), tokenizer, config.encoding, times)
            n = len(alone.tokens)
            here = slice(start, start + n)
            assert (row["tokens"][here] == alone.tokens).all()
            assert (row["positions"][here] == alone.positions).all()
            assert (row["segment_ids"][here] == segment).all()
            assert (row["video_offsets"][here] == alone.offset).all()
            # A target is the next token of the same dialogue; nothing is learnt across the border.
            assert (row["targets"][start : start + n - 1] == alone.tokens[1:]).all()
            assert (row["loss_mask"][start : start + n - 1] == alone.learnt[1:]).all()
            assert not row["loss_mask"][start + n - 1]
            assert not row["loss_mask"][row["targets"] == tokenizer.ids[prompt.VIDEO_TOKEN]].any()
            for name in alone.videos:
                slot_of.setdefault(name, len(slot_of))
            expected = [slot_of[alone.videos[v]] if v >= 0 else -1 for v in alone.video]
            assert row["video_slots"][here].tolist() == expected
            for place, item in enumerate(alone.turns):
                assert row["turn_mask"][turn] and row["turn_records"][turn] == record
                assert (row["turn_numbers"][turn], row["turn_segments"][turn]) == (place, segment)
                assert row["turn_intents"][turn] == dialogue.turns[place].intent
                assert row["turn_languages"][turn] == LANGUAGES.index(dialogue.turns[place].language)
                assert row["turn_states"][turn] == start + item.state
                check_turn(row, turn, dialogue.turns[place], item, slot_of, start)
                turn += 1
            start += n
        assert not row["turn_mask"][turn:].any() and not row["segment_ids"][start:].any()
        check_slots(row, slot_of, videos, config)
    assert several > len(plan) / 2


def check_turn(row, turn, source, item, slot_of, start):
    slots = row["candidate_slots"][turn]
    if source.intent == Intent.VIDEO:
        kept = source.candidates[: PACK.encoding.max_candidates]
        if source.video_id not in kept:
            kept = (*kept[:-1], source.video_id)
        assert slots[slots >= 0].tolist() == [slot_of[name] for name in kept]
        assert slots[row["candidate_targets"][turn]] == slot_of[source.video_id]
        for slot, block in zip(slots, row["candidate_blocks"][turn], strict=True):
            if slot >= 0:
                assert row["video_slots"][block] == slot and row["video_offsets"][block] == 0
    else:
        assert (slots == -1).all() and row["candidate_targets"][turn] == -1
    if source.intent == Intent.MOMENT:
        slot, block = row["moment_slots"][turn], row["moment_blocks"][turn]
        assert slot == slot_of[source.video_id] and row["video_slots"][block] == slot
        assert row["moment_spans"][turn] == pytest.approx(source.span)
    else:
        assert row["moment_slots"][turn] == -1


def check_slots(row, slot_of, videos, config):
    assert row["video_mask"].sum() == len(slot_of) and row["video_mask"][: len(slot_of)].all()
    for name, slot in slot_of.items():
        _, duration, times, array = sources.features_of(int(name.removeprefix("corpus/v")))
        chosen = [0, 1] if len(times) == 2 else [0, 2, 4]  # two frames are all there is; of five, T=3
        count = len(chosen)
        assert row["durations"][slot] == duration
        assert row["frame_mask"][slot].tolist() == [True] * count + [False] * (config.frames - count)
        assert row["frame_times"][slot, :count].tolist() == times[chosen].tolist()
        assert (row["features"][slot, :count] == array[chosen]).all()
        assert not row["features"][slot, count:].any()


def row_times(videos, name, config):
    times = sources.features_of(int(name.removeprefix("corpus/v")))[2]
    return times.tolist() if len(times) == 2 else times[[0, 2, 4]].tolist()


def test_frame_text_is_the_sentence_with_the_time(stores):
    _, videos, tokenizer = stores
    plan = plan_of(stores)
    row, _ = row_of(stores, plan, 0)
    for slot in np.flatnonzero(row["video_mask"]):
        for time, there, ids in zip(
            row["frame_times"][slot], row["frame_mask"][slot], row["frame_text"][slot], strict=True
        ):
            text = tokenizer.decode([i for i in ids if i])
            assert text == (f"<s> This frame is sampled at {time:.1f} second." if there else "")


def test_the_first_stage_reads_what_is_looked_for_or_where(stores):
    """A search with those it refers back to, the last first; of a moment its message alone; of talk nothing."""
    _, videos, tokenizer = stores
    names = tuple(videos.duration)[:3]
    turns = (
        Turn("Find it.", "It is in video 1.", Intent.VIDEO, "en", names[0], names),
        Turn("When?", "In video 1 at 1.0s-2.0s.", Intent.MOMENT, "en", names[0], (), (1.0, 2.0)),
        Turn("Thanks", "Not at all", Intent.CHAT, "en"),
        Turn("Find another.", "It is in video 2.", Intent.VIDEO, "en", names[1], names),
    )
    config = dataclasses.replace(PACK, query_len=40)
    batch = batches.empty_batch(1, config, batches.BatchShape.of(videos, tokenizer, config))
    batches.fill_row(batch, 0, [(0, Dialogue("d", "train", 2, turns))], videos, tokenizer, config, None, tokenizer)
    found = batch["queries"][0]
    expected = [encode_query(text, tokenizer, 40) for text in ("Find it.", "When?", "Find another.\nFind it.")]
    assert (found[[0, 1, 3]] == expected).all() and len({*map(tuple, expected)}) == 3
    assert not found[2].any() and not found[4:].any()


@pytest.mark.parametrize("seed", range(8))
def test_any_order_and_any_frames_fit_the_plan(stores, seed):
    """Lengths are bounds: shuffled candidates and drawn frames never overflow, and lose no turn."""
    plan = plan_of(stores, seed=seed)
    for number in range(len(plan)):
        row, content = row_of(stores, plan, number, rng=np.random.default_rng((seed, number)))
        assert row["turn_mask"].sum() == sum(len(dialogue.turns) for _, dialogue in content)
        for turn in np.flatnonzero(row["candidate_targets"] >= 0):
            # The truth stays the truth wherever it went.
            record, place = row["turn_records"][turn], row["turn_numbers"][turn]
            truth = stores[0][int(record)].turns[place].video_id
            slot = row["candidate_slots"][turn, row["candidate_targets"][turn]]
            first = sources.features_of(int(truth.removeprefix("corpus/v")))[3].flat[0]
            assert int(row["features"][slot].flat[0]) // 1000 * 1000 == first


def test_the_plan_packs_every_dialogue_once_and_within_limits(stores):
    dialogues, videos, tokenizer = stores
    for seed in (None, 0, 1):
        plan = plan_of(stores, seed=seed)
        assert sorted(plan.items[:, 0].tolist()) == list(range(len(dialogues)))
        assert {entry.reason for entry in plan.entries} == {"candidates_over_limit"}
        total = 0
        for number in range(len(plan)):
            row, content = row_of(stores, plan, number)
            used = int((row["segment_ids"] > 0).sum())
            total += used
            assert used <= PACK.seq_len and row["turn_mask"].sum() <= PACK.max_turns
        report = plan.report(PACK.seq_len)
        assert report["turns"] == sum(len(dialogues[i].turns) for i in range(len(dialogues)))
        # The bound is tight: digits of numbers and times are all it may be off by.
        assert total <= plan.used <= total * 1.02
    assert plan_of(stores, seed=1).items.tolist() != plan_of(stores, seed=0).items.tolist()
    assert plan_of(stores, seed=1).items.tolist() == plan_of(stores, seed=1).items.tolist()


class Dialogues(list):
    """Dialogues as a store gives them."""


def test_a_dialogue_is_measured_as_it_is_written(stores):
    """To the token, where numbers and times have as many digits as they can."""
    dialogues, videos, tokenizer = stores
    checked = 0
    for layout in ("isolated", "inline"):
        config = dataclasses.replace(PACK, encoding=dataclasses.replace(PACK.encoding, layout=layout))
        for record in range(len(dialogues)):
            dialogue = dialogues[record]
            if any(videos.duration[turn.video_id] >= 10 for turn in dialogue.turns if turn.intent == Intent.MOMENT):
                continue
            plan = plan_of((Dialogues([dialogue]), videos, tokenizer), config)
            times = {name: row_times(videos, name, config) for name in dialogue.videos}
            alone = encode(show(dialogue, config.encoding, insert_truth=True), tokenizer, config.encoding, times)
            assert plan.used == len(alone.tokens)
            checked += len(dialogue.turns) > 1
    assert checked > 20


def test_the_bound_holds_for_every_place_the_truth_may_take(stores):
    _, videos, tokenizer = stores
    names = tuple(videos.duration)
    assert len(names) == 12  # numbers of one digit and of two
    turns = (
        Turn("Find it.", "It is in video 1.", Intent.VIDEO, "en", names[0], names),
        Turn("When?", "In video 1 at 1.0s-2.0s.", Intent.MOMENT, "en", names[0], (), (1.0, 2.0)),
    )
    dialogue = Dialogue("d", "train", 2, turns)
    config = dataclasses.replace(PACK, encoding=dataclasses.replace(PACK.encoding, max_candidates=12))
    bound = plan_of((Dialogues([dialogue]), videos, tokenizer), config).used
    lengths = {}
    for seed in range(60):
        shown = show(dialogue, config.encoding, insert_truth=True, rng=np.random.default_rng(seed))
        lengths[shown[0].target] = len(encode(shown, tokenizer, config.encoding, {names[0]: [1.0, 2.0]}).tokens)
    assert set(lengths) == set(range(12))
    assert max(lengths.values()) == bound and min(lengths.values()) == bound - 3  # a digit each time it is written


@pytest.mark.parametrize("limits", [{"video_slots": 7}, {"max_turns": 4}, {"seq_len": 400}])
def test_no_row_exceeds_its_limits(stores, limits):
    config = dataclasses.replace(PACK, **limits)
    plan = plan_of(stores, config)
    assert len(plan) > len(plan_of(stores))
    several = 0
    for number in range(len(plan)):
        row, content = row_of(stores, plan, number, config)  # a video or a turn too many would be out of bounds
        assert row["turn_mask"].sum() == sum(len(dialogue.turns) for _, dialogue in content)
        several += len(content) > 1
    assert several


def test_what_does_not_fit_loses_turns_from_its_end_and_is_listed(stores):
    dialogues = stores[0]
    config = dataclasses.replace(PACK, max_turns=2)
    plan = plan_of(stores, config)
    kept = dict(plan.items.tolist())
    cut = {entry.id: entry for entry in plan.entries if entry.action == "cut"}
    for record in range(len(dialogues)):
        dialogue = dialogues[record]
        assert kept[record] == min(len(dialogue.turns), 2)
        assert (dialogue.id in cut) == (len(dialogue.turns) > 2)
    entry = next(iter(cut.values()))
    assert (entry.action, entry.reason, entry.detail) == ("cut", "too_long", "1 turns: 3 turns of 2")
    assert plan.report(config.seq_len)["lost"]["cut: too_long"] == len(cut)


def test_a_first_turn_too_long_drops_the_dialogue(stores):
    dialogues, videos, tokenizer = stores
    config = dataclasses.replace(PACK, video_slots=4)
    plan = plan_of(stores, config)
    wide = {
        dialogues.ids[i]
        for i in range(len(dialogues))
        if len(dialogues[i].turns[0].candidates[: PACK.encoding.max_candidates]) > 4
    }
    rejected = [entry for entry in plan.entries if entry.action == "rejected"]
    assert wide and {entry.id for entry in rejected} == wide
    assert {entry.reason for entry in rejected} == {"first_turn_too_long"}
    with pytest.raises(ValueError, match="none of the .* dialogues fits a row of 8 positions"):
        plan_of(stores, dataclasses.replace(PACK, seq_len=8))


def test_videos_the_store_lacks_are_taken_out_and_listed(stores, tmp_path):
    dialogues, _, tokenizer = stores
    fewer = VideoStore(sources.build_features(tmp_path, range(1, sources.VIDEOS)))
    plan = plan_of((dialogues, fewer, tokenizer))
    lost = {entry.id.split("#")[0] for entry in plan.entries if entry.reason == "video_not_in_store"}
    assert lost == {dialogues.ids[i] for i in range(len(dialogues)) if dialogues[i].turns[0].video_id == "corpus/v0"}
    assert {dialogues.ids[i] for i, _ in plan.items} == set(dialogues.ids) - lost
    assert any(entry.reason == "candidate_not_in_store" for entry in plan.entries)


def test_plain_chat_can_be_left_out(stores, tmp_path):
    dialogues, videos, tokenizer = stores

    class Chat:
        every = 2

        def __len__(self):
            return len(dialogues)

        def __getitem__(self, record):
            dialogue = dialogues[record]
            if record % self.every:
                return dialogue
            turns = tuple(
                dataclasses.replace(turn, intent=Intent.CHAT, video_id="", candidates=(), span=None)
                for turn in dialogue.turns
            )
            return dataclasses.replace(dialogue, turns=turns, type=0)

    with_chat = plan_of((Chat(), videos, tokenizer))
    without = plan_of((Chat(), videos, tokenizer), keep_chat=False)
    assert sorted(with_chat.items[:, 0].tolist()) == list(range(len(dialogues)))
    assert sorted(without.items[:, 0].tolist()) == list(range(1, len(dialogues), 2))
    Chat.every = 1
    with pytest.raises(ValueError, match=f"each of the {len(dialogues)} dialogues is plain chat"):
        plan_of((Chat(), videos, tokenizer), keep_chat=False)


def test_a_tokenizer_that_joins_digits_is_refused(stores):
    dialogues, videos, tokenizer = stores

    class Joining:
        ids = tokenizer.ids

        def splits_digits(self):
            return False

    with pytest.raises(ValueError, match="joins digits"):
        plan_of((dialogues, videos, Joining()))


def test_a_plan_survives_the_disk(stores, tmp_path):
    plan = plan_of(stores, dataclasses.replace(PACK, max_turns=2))
    packing.save_plan(tmp_path / "plan.json", plan)
    loaded = packing.load_plan(tmp_path / "plan.json")
    assert (loaded.starts == plan.starts).all() and (loaded.items == plan.items).all()
    assert (loaded.entries, loaded.used) == (plan.entries, plan.used)


def test_rows_are_well_filled():
    """Best fit on lengths like real ones (a tenth to a half of a row) leaves a few per cent."""
    rng = np.random.default_rng(0)
    items = [
        packing._Measured(record, 2, int(tokens), frozenset({str(record)}))
        for record, tokens in enumerate(rng.integers(400, 2000, 4000))
    ]
    config = PACK.__class__(EncodingConfig(), seq_len=4096, video_slots=64, max_turns=24)
    rows = packing._pack(items, config)
    assert sorted(item.record for row in rows for item in row) == list(range(4000))
    assert all(sum(item.tokens for item in row) <= 4096 for row in rows)
    assert sum(item.tokens for item in items) / (len(rows) * 4096) > 0.95


def test_config_is_checked():
    with pytest.raises(ValueError, match="seq_len is 0; expected at least 1"):
        dataclasses.replace(PACK, seq_len=0)


def test_prompt_style_changes_lengths(stores):
    short = dataclasses.replace(
        PACK, encoding=dataclasses.replace(PACK.encoding, style=prompt.PromptStyle(frame_times=False))
    )
    assert plan_of(stores, short).used < plan_of(stores).used
