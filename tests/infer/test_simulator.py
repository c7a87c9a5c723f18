"""Simulated users: what they know and say; their episodes against conversations held by hand; a run that is stopped."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath

from ivcr_jax import evaluate as evaluation
from ivcr_jax import simulator
from ivcr_jax.data import compose, prompt
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.data.store import DialogueStore
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.understanding import understand
from ivcr_jax.metrics import interactive, report
from ivcr_jax.simulator import KINDS, WORDING, Fact, User, Wish
from tests.infer.conftest import IDS
from tests.metrics import built

FISH, CAT, DOG, OTHER = IDS


def search(user, video, language="en"):
    return Turn(user, "The best match is video 1.", Intent.VIDEO, language, video, tuple(IDS))


def moment(user, video, language="en"):
    return Turn(user, "It is in video 1 at 0.1s-0.2s.", Intent.MOMENT, language, video, (), (0.1, 0.2))


CHAT = Turn("Hello, what can you do?", "I find videos.", Intent.CHAT, "en")
DIALOGUES = (
    Dialogue("a", "test", 3, (CHAT, search("Find a video of a fish.", FISH), moment("When does it jump?", FISH),
                              search("Not that one, I want the same but red.", CAT))),
    Dialogue("b", "test", 2, (search("Can you find this one? A fish swims.", FISH),
                              moment("Where in this video is this part? the water splashes", FISH),
                              moment("And when exactly is that?", FISH))),
    Dialogue("c", "test", 0, (CHAT,)),
    Dialogue("d", "test", 7, (search("A dog barks.", DOG), search("Now something else. A FISH swims!", FISH),
                              search("Next, please find this one: A silver fish.", FISH))),
    Dialogue("e", "test", 2, (search("找一个小狗的视频。", DOG, "zh"), moment("小狗什么时候跳？", DOG, "zh"))),
    Dialogue("f", "test", 2, (moment("When does it rain?", OTHER), search("A street.", OTHER))),
)  # fmt: skip


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Can you find this one? A fish swims.", "A fish swims."),
        ("a fish swims", "A fish swims."),
        ("I am looking for a video. A fish. It swims.", "A fish. It swims."),
        ("Mr. Bean drives at 3.5 mph.", "Mr. Bean drives at 3.5 mph."),
        ("I am looking for a video of a fish. It swims.", "I am looking for a video of a fish. It swims."),
        ("When does the man open the door?", "The man open the door."),
        ("At what time do we see this? It stops", "It stops."),
        ("And then?", ""),
        ("帮我找一个视频：一只狗在跑", "一只狗在跑。"),
        ("圆形什么时候变成白色？", "圆形变成白色。"),
        ("什么时候能看到这一幕？狗在跑。", "狗在跑。"),
        ("具体是在什么时候？", ""),
    ],
)
def test_what_a_question_says_of_its_video(question, expected):
    assert simulator.statement(question) == expected


def test_of_synthetic_questions_the_caption_is_left():
    for language, caption in (("en", "A red circle: it moves."), ("zh", "红色圆形在移动。")):
        for pattern in ("find", "next", "locate", "locate told"):
            for words in compose.WORDING[language][pattern]:
                expected = caption if "{c}" in words else ""
                assert simulator.statement(words.format(c=caption)) == expected, words


def test_facts_are_what_the_records_say_of_a_video():
    facts = simulator.facts_of(DIALOGUES)
    assert facts == {
        (FISH, "en"): [
            Fact("Find a video of a fish.", "search"),
            Fact("It jump.", "moment"),
            Fact("A fish swims.", "search"),  # and "A FISH swims!" once
            Fact("The water splashes.", "moment"),
            Fact("A silver fish.", "search"),
        ],
        (DOG, "en"): [Fact("A dog barks.", "search")],
        (DOG, "zh"): [Fact("找一个小狗的视频。", "search"), Fact("小狗跳。", "moment")],
        (OTHER, "en"): [Fact("It rain.", "moment")],
    }


def test_who_wants_what():
    facts = simulator.facts_of(DIALOGUES)
    wishes = {dialogue.id: simulator.wish_of(dialogue, facts) for dialogue in DIALOGUES}
    assert wishes["c"] is wishes["f"] is None, "chat, and a moment: it begins with no search"
    assert wishes["a"].first == "Find a video of a fish." and wishes["a"].video == FISH
    assert {fact.text for fact in wishes["a"].facts} == {
        "It jump.", "A fish swims.", "The water splashes.", "A silver fish."
    }  # fmt: skip
    assert {fact.text for fact in wishes["b"].facts} == {  # "A fish swims." is what it begins with
        "It jump.", "The water splashes.", "A silver fish.", "Find a video of a fish."
    }  # fmt: skip
    assert (wishes["d"].video, wishes["d"].facts) == (DOG, ())
    assert (wishes["e"].language, [fact.text for fact in wishes["e"].facts]) == ("zh", ["小狗跳。"])
    orders = {simulator.wish_of(DIALOGUES[0], facts, seed).facts for seed in range(20)}
    assert len(orders) > 3 and simulator.wish_of(DIALOGUES[0], facts) == wishes["a"]
    one = {(FISH, "en"): [Fact("A fish", "search"), Fact("a fish swims", "moment")]}
    kept = [simulator.wish_of(DIALOGUES[0], one, seed).facts for seed in range(20)]
    assert all(facts == (Fact("a fish swims", "moment"),) for facts in kept), "of a fish it has spoken"


def test_a_user_tells_each_fact_once():
    facts = tuple(Fact(f"It has {number} legs.", kind) for number, kind in enumerate(["search", "moment"] * 2))
    wish = Wish("a", "en", FISH, "A fish.", facts)
    user = User(wish, "cooperative")
    said = [user.next("x") for _ in range(4)]
    for message, fact in zip(said, facts, strict=True):
        assert message.endswith(fact.text) and sum(fact.text in other for other in said) == 1
        assert any(message.startswith(words) for words in WORDING["en"]["reject"])
    assert user.next("x") in WORDING["en"]["reject"] and user.next(None) is None
    silent = User(wish, "terse")
    assert all(silent.next("x") in WORDING["en"]["reject"] for _ in range(4)) and silent.next(None) is None
    shown_nothing = User(wish, "cooperative").next(None)
    assert shown_nothing.endswith("It has 0 legs.") and not any(w in shown_nothing for w in WORDING["en"]["reject"])
    assert {User(wish, "cooperative", seed).next("x") for seed in range(20)} == {
        f"{no} {told.format(c=facts[0].text)}" for no in WORDING["en"]["reject"] for told in WORDING["en"]["search"]
    }


@pytest.mark.parametrize(("language", "fact"), [("en", "A dog runs."), ("zh", "一只狗在跑。")])
def test_what_users_say_is_understood(language, fact):
    for no in WORDING[language]["reject"]:
        request = understand(no, True)
        assert (request.intent, request.rejects, request.bare, request.similar) == (Intent.VIDEO, True, True, False)
        for kind in ("search", "moment"):
            for told in WORDING[language][kind]:
                request = understand(f"{no} {told.format(c=fact)}", True)
                assert (request.intent, request.rejects, request.bare) == (Intent.VIDEO, True, False)
                assert request.number is None and not request.similar
    for told in (*WORDING[language]["search"], *WORDING[language]["moment"]):
        assert understand(told.format(c=fact), False).intent in (None, Intent.VIDEO), told
    synthetic = {words for rows in compose.WORDING.values() for every in rows.values() for words in every}
    assert not synthetic & {words for rows in WORDING.values() for every in rows.values() for words in every}


def by_hand(helper, corpus, wish, kind, rounds, candidates):
    """An episode, and its session, one message after the other. The rank is that of a loop over the corpus."""
    session, user, held = Session(helper, corpus, candidates=candidates), User(wish, kind), []
    said, asked, down = wish.first, [], set()
    while said is not None and len(held) < rounds:
        if session.current is None:
            down = set()
        elif held:
            down |= {session.current}
        turn = session.say(said)
        bare = said in WORDING[wish.language]["reject"]
        asked += [] if bare else [said]
        query = helper.embed(prompt.retrieval_query(asked))
        scores = {name: float(corpus.vectors[place] @ query) for place, name in enumerate(IDS)}
        listed = [ranked.id for ranked in turn.ranking]
        behind = [name for name in IDS if name not in listed and name not in down]
        assert not down & {*listed}
        own = scores[wish.video]
        ahead = sum(scores[name] >= own for name in behind)
        rank = listed.index(wish.video) + 1 if wish.video in listed else len(listed) + ahead
        held.append((said, turn.text, turn.video, tuple(listed), tuple(sorted(down)), rank))
        said = None if turn.video == wish.video else user.next(turn.video)
    return held


def transcript(episode):
    return [(r.said, r.answer, r.video, r.shown, r.turned_down, r.rank) for r in episode.rounds]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [1, 10])
def test_an_episode_is_the_conversation_that_it_says(helper, corpus, kind, candidates):
    """Every video is chosen in the end, as others are turned down; there the user stops."""
    facts = [Fact("It swims.", "search"), Fact("The water is blue.", "moment")]
    wishes = [
        Wish(name, "en", name, "Find a video of a fish.", tuple(facts[: place % 3])) for place, name in enumerate(IDS)
    ]
    held = simulator.hold(helper, corpus, wishes, kind, rounds=5, candidates=candidates)
    for wish, episode in zip(wishes, held, strict=True):
        assert (episode.dialogue, episode.language, episode.video, episode.pool) == (wish.dialogue, "en", wish.video, 4)
        assert transcript(episode) == by_hand(helper, corpus, wish, kind, 5, candidates)
        assert episode.success == len(episode.rounds) <= 4 and episode.rounds[-1].rank == 1
        assert all(held.latency.keys() >= {"search", "write"} for held in episode.rounds)
    assert len({episode.success for episode in held}) > 1
    if candidates == 1:
        assert any(each.rank > 2 for episode in held for each in episode.rounds)
    cut = simulator.hold(helper, corpus, wishes, kind, rounds=1, candidates=candidates)
    assert [len(episode.rounds) for episode in cut] == [1] * 4
    assert [transcript(each)[0] for each in cut] == [transcript(each)[0] for each in held]


def test_a_user_who_is_shown_nothing_only_tells_more(helper, corpus, monkeypatch):
    monkeypatch.setattr(helper, "fits", 2.0)  # no cosine is
    wish = Wish("a", "zh", DOG, "找一个小狗的视频。", (Fact("小狗跳。", "moment"),))
    (episode,) = simulator.hold(helper, corpus, [wish], "cooperative", rounds=5)
    assert transcript(episode) == by_hand(helper, corpus, wish, "cooperative", 5, 10)
    told = [words.format(c="小狗跳。") for words in WORDING["zh"]["moment"]]
    assert episode.rounds[1].said in told and len(episode.rounds) == 2 and episode.success is None
    (silent,) = simulator.hold(helper, corpus, [wish], "terse", rounds=5)
    assert len(silent.rounds) == 1 and silent.rounds[0].video is None and DOG in silent.rounds[0].shown


def test_a_round_that_fails_and_a_video_that_is_not_there(helper, corpus):
    wishes = [Wish("a", "en", DOG, " ", (Fact("A dog.", "search"),)), Wish("b", "en", "gone", "A dog.", ())]
    failed, gone = simulator.hold(helper, corpus, wishes, "cooperative", rounds=6)
    assert failed.rounds[0].error.startswith("the message holds nothing") and failed.rounds[0].rank is None
    assert failed.rounds[1].said.endswith("A dog.") and failed.success == len(failed.rounds)
    assert len(gone.rounds) == 5, "all four were turned down, and then there is nothing to say"
    assert all(held.rank is None and not held.error for held in gone.rounds) and gone.success is None
    assert gone.rounds[-1].shown == () and gone.rounds[-1].turned_down == tuple(IDS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The dialogues as a dataset."""
    return built.build_of(tmp_path_factory.mktemp("dialogues"), built.rows_of(DIALOGUES))[1]


@pytest.fixture
def run(helper, export, indexed, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Assistant", lambda *_, **__: helper)

    def run(**options):
        given = {"names": ["simulator"], "batch": 2, "rounds": 3, **options}
        return evaluation.evaluate(export, indexed, data, tmp_path / "out", **given)

    return run


def without_times(path):
    header, episodes = interactive.read(str(path))
    return header, [
        dataclasses.replace(each, rounds=tuple(dataclasses.replace(held, latency={}) for held in each.rounds))
        for each in episodes
    ]


def test_a_run_reports_and_goes_on_where_it_was_stopped(run, helper, data, tmp_path, monkeypatch, capsys):
    run()
    out = tmp_path / "out"
    told = json.loads((out / "report.json").read_text())
    users = told["users"]
    assert told["protocols"] == {} and [*users["kinds"]] == [*KINDS]
    assert users["problems"] == {
        "no_search": {"count": 2, "turns": dict.fromkeys(("c", "f"), "it begins with no search")}
    }
    store = DialogueStore(data, "test")
    wishes = [simulator.wish_of(store[n], simulator.facts_of(DIALOGUES)) for n in range(len(store))]
    wishes = [wish for wish in wishes if wish]
    for kind in KINDS:
        header, held = without_times(out / f"episodes-{kind}-0.jsonl")
        assert [episode.dialogue for episode in held] == [wish.dialogue for wish in wishes]
        named = {"user": kind, "export": helper.fingerprint, "split": "test", "rounds": 3, "seed": 0, "candidates": 10}
        assert header.items() >= named.items()
        reached = interactive.per_round(held, 3)["success"].mean(0)
        shown = [users["kinds"][kind]["by"]["round"][str(number)]["success"]["value"] for number in (1, 2, 3)]
        np.testing.assert_allclose(shown, reached)
        assert held[0].rounds[0].said == wishes[0].first and len(held) == 4
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert "users.png" in (out / "report.md").read_text() and (out / "users.png").exists()
    file = out / "episodes-cooperative-0.jsonl"
    whole, expected = file.read_bytes(), without_times(file)
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    monkeypatch.setattr(simulator, "results", lambda *_: None)
    whole_hold, groups = simulator.hold, []
    monkeypatch.setattr(
        simulator,
        "hold",
        lambda *args, **named: groups.append([w.dialogue for w in args[2]]) or whole_hold(*args, **named),
    )
    for size in (0, ends[0] // 2, ends[0], ends[1], ends[1] + 9, ends[2] - 1, ends[3] + 1):
        file.write_bytes(whole[:size])
        run()
        assert without_times(file) == expected, size
        assert file.read_bytes().startswith(whole[: max(end for end in (0, *ends) if end <= size)])
    assert {*map(tuple, groups)} == {("a", "b"), ("d", "e")}, "numbers depend on who is beside whom"
    monkeypatch.setattr(simulator, "hold", None)  # nothing is left to hold
    run()
    with pytest.raises(ValueError, match="episodes-cooperative-0.jsonl: was made with rounds 3 and not 4"):
        run(rounds=4)


def test_where_no_dialogue_begins_with_a_search_there_is_no_figure(helper, corpus, data, tmp_path):
    store, chat = DialogueStore(data, "test"), [DIALOGUES[2]]
    simulator.run(helper, corpus, store, chat, epath.Path(tmp_path), {}, rounds=2, candidates=10, batch=2)
    users = simulator.results(epath.Path(tmp_path), 1, chat, IDS)
    assert users.kinds["terse"].overall == {} and users.comparisons == {} and [*users.problems.no_search] == ["c"]
    report.write(str(tmp_path), report.Report({}, {}, {}, users=users))
    assert "| no_search | 1 | c |" in (tmp_path / "report.md").read_text()


def test_several_processes_share_the_users(helper, corpus, data, tmp_path):
    store = DialogueStore(data, "test")
    for process in range(2):
        simulator.run(
            helper, corpus, store, DIALOGUES, epath.Path(tmp_path), {}, rounds=1, candidates=10, batch=2,
            process=(process, 2),
        )  # fmt: skip
    held = [interactive.read(str(tmp_path / f"episodes-terse-{process}.jsonl"))[1] for process in range(2)]
    assert [[episode.dialogue for episode in each] for each in held] == [["a", "d"], ["b", "e"]]
    users = simulator.results(epath.Path(tmp_path), 2, DIALOGUES, IDS[1:])
    assert users.kinds["terse"].overall["success"].n == 4
    assert users.problems.outside == dict.fromkeys(("a", "b"), f"video: {FISH}")
