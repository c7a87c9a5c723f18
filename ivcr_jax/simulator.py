"""Simulated users: one wants one video, and tells more of it until it is chosen.

It begins with the first search of a dialogue. Shown another video it turns that down and, if it is of the cooperative
kind, tells one thing more, in the words that the records have for the video: those of other searches for it and of
questions about moments in it, in the same split and language. No model asks, answers or judges. docs/evaluation.md
defines it.
"""

import collections
import dataclasses
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from etils import epath
from tqdm import tqdm

from ivcr_jax.data.dialogue import HAN, INDEPENDENT_TYPE, Dialogue, Intent, Turn
from ivcr_jax.data.store import DialogueStore
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.session import Session, say_together
from ivcr_jax.infer.turn import Message
from ivcr_jax.infer.turn import Turn as Said
from ivcr_jax.metrics import interactive
from ivcr_jax.metrics.interactive import Episode, Round
from ivcr_jax.protocols import FirstStage

NAME = "simulator"  # among the protocols
Kind = Literal["cooperative", "terse"]  # terse: never tells more than its first message
KINDS: tuple[Kind, ...] = ("cooperative", "terse")

# {c} is a fact. Not the wording that synthetic dialogues are made of, and such that `infer.understanding` takes it for
# a search: a user whose plain words are misread would measure that alone.
WORDING: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "en": {
        "reject": ("Not this one.", "No, that is not it."),
        "search": ("To put it differently: {c}", "In other words: {c}"),
        "moment": ("There is also this in it: {c}", "At one point you can see this: {c}"),
    },
    "zh": {
        "reject": ("不是这个。", "不对，不是它。"),
        "search": ("换句话说：{c}", "也可以这么说：{c}"),
        "moment": ("里面还有这样的画面：{c}", "其中还能看到：{c}"),
    },
}
# What frames a question without telling of the video: clauses of these words alone, and the asking for a time.
_FRAME = re.compile(
    r"\b(?:a|am|an|and|another|any|are|at|can|could|did|do|does|else|exactly|find|for|give|happens?|have|help|here|"
    r"i'm|i|in|is|it|let|like|look|looking|me|moment|more|need|next|now|of|one|part|please|scene|search|see|shown?|shows|"
    r"something|take|that|the|then|there|this|time|to|us|video|want|we|what|when|where|which|with|would|you)\b"
    r"|[帮我找一个视频想这样有没请出符合描述的换吧再另外接下来还需要是什么时间候发生面段在哪位置定到能看见幕里那具体它给你了吗呢]"
    r"|[\W_]",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[^.?!:。？！：]*(?:[?!:。？！：]+|\.(?=\s|$))\s*")
_ASKING = re.compile(
    r"^(?:and\s+|so\s+)?(?:when|at (?:what|which) (?:time|point|moment)|where in (?:the|this) video)\s+"
    r"(?:does|do|did|is|are|was|were|can|could)\s+(?:we see\s+)?|在?(?:什么时候|什么时间|何时)",
    re.IGNORECASE,
)
_ENDS = ".!?。！？…"


@dataclasses.dataclass(frozen=True)
class Fact:
    """Something that can be seen in a video. Attributes: text: a sentence. kind: "search" or "moment", what it was said
    in."""

    text: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a user wants. Attributes: dialogue: its id. language: of all it says. video: the wanted one's id. first: its
    first message. facts: what it can tell besides, in the order in which it does."""

    dialogue: str
    language: str
    video: str
    first: str
    facts: tuple[Fact, ...]


class User:
    """One who says what a wish makes it say. Attributes: wish."""

    def __init__(self, wish: Wish, kind: Kind, seed: int = 0) -> None:
        self.wish = wish
        self._left = list(wish.facts) if kind == "cooperative" else []
        self._rng = random.Random(f"{seed}/{wish.dialogue}/words")

    def next(self, chosen: str | None) -> str | None:
        """What it says to an answer that is not the right one, or None where it has nothing to say.

        Args:
          chosen: the id of the video that it is shown; None where it is shown none, so that it can turn none down.
        """
        wording = WORDING[self.wish.language]
        parts = [self._rng.choice(wording["reject"])] if chosen is not None else []
        if self._left:
            fact = self._left.pop(0)
            parts.append(self._rng.choice(wording[fact.kind]).format(c=fact.text))
        return (" " if self.wish.language == "en" else "").join(parts) or None


def wish_of(dialogue: Dialogue, facts: Mapping[tuple[str, str], Sequence[Fact]], seed: int = 0) -> Wish | None:
    """What the user wants who begins a dialogue; None where that begins with no search. `facts` is of `facts_of`."""
    turn = _first(dialogue)
    if turn is None:
        return None
    known = list(facts.get((turn.video_id, turn.language), ()))
    random.Random(f"{seed}/{dialogue.id}/facts").shuffle(known)
    told, kept = [_key(turn.user)], []
    for fact in known:
        if not any(_key(fact.text) in each for each in told):
            told.append(_key(fact.text))
            kept.append(fact)
    return Wish(dialogue.id, turn.language, turn.video_id, turn.user, tuple(kept))


def facts_of(dialogues: Iterable[Dialogue]) -> dict[tuple[str, str], list[Fact]]:
    """What the records of a split say of each video in each language, in their order, by (video's id, language)."""
    found: dict[tuple[str, str], dict[str, Fact]] = collections.defaultdict(dict)
    for dialogue in dialogues:
        for turn in dialogue.turns:
            whole = turn.intent == Intent.VIDEO and (dialogue.type == INDEPENDENT_TYPE or turn is _first(dialogue))
            # A later search says what it says of the one before it ("the same, but ..."), and not of its video.
            if (whole or turn.intent == Intent.MOMENT) and (text := statement(turn.user)):
                found[turn.video_id, turn.language].setdefault(_key(text), Fact(text, "search" if whole else "moment"))
    return {key: [*facts.values()] for key, facts in found.items()}


def statement(question: str) -> str:
    """What a question says of its video: without "Can you find this one?" before it, and not asked. "" if nothing."""
    text = question.strip()
    while (clause := _CLAUSE.match(text)) and clause.end() < len(text) and not _tells(clause.group()):
        text = text[clause.end() :]
    if not _tells(text):
        return ""
    if asking := _ASKING.search(text):
        text = (text[: asking.start()] + text[asking.end() :]).strip().rstrip("?？")
    text = text[:1].upper() + text[1:]
    return text if text.endswith(tuple(_ENDS)) else text + ("。" if HAN.search(text) else ".")


def _tells(text: str) -> bool:
    return bool(_FRAME.sub("", text))


def _key(text: str) -> str:
    """The same for texts that differ in case and marks alone."""
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _first(dialogue: Dialogue) -> Turn | None:
    """The first turn that is not chat, where it is a search."""
    turn = next((turn for turn in dialogue.turns if turn.intent != Intent.CHAT), None)
    return turn if turn is not None and turn.intent == Intent.VIDEO else None


def hold(
    assistant: Assistant,
    corpus: Corpus,
    wishes: Sequence[Wish],
    kind: Kind,
    *,
    rounds: int,
    candidates: int = 10,
) -> list[Episode]:
    """Episodes side by side, in the order of their wishes.

    Args:
      rounds: how many messages at most. candidates: how many the first stage hands on.
    """
    users = [User(wish, kind) for wish in wishes]
    sessions = [Session(assistant, corpus, candidates=candidates) for _ in wishes]
    held: list[list[Round]] = [[] for _ in wishes]
    words: list[str | None] = [wish.first for wish in wishes]
    for _ in range(rounds):
        here = [place for place, said in enumerate(words) if said is not None]
        messages = [Message(said) for said in words if said is not None]
        answers = say_together([sessions[place] for place in here], messages) if here else []
        for place, message, answer in zip(here, messages, answers, strict=True):
            wish, session = wishes[place], sessions[place]
            held[place].append(_round(FirstStage(assistant, corpus, session), wish, message.text, answer))
            found = session.current == wish.video
            words[place] = None if found else users[place].next(session.current)
    pool = len(corpus.videos)
    return [Episode(w.dialogue, w.language, w.video, pool, tuple(each)) for w, each in zip(wishes, held, strict=True)]


def _round(stage: FirstStage, wish: Wish, said: str, answer: Said | Exception) -> Round:
    if isinstance(answer, Exception):
        return Round(said, video=stage.session.current, error=str(answer))
    searched = answer.intent == Intent.VIDEO
    shown = tuple(ranked.id for ranked in answer.ranking) if searched else ()
    down = tuple(sorted(stage.session.rejected))
    rank = _rank(stage, wish.video, shown, down) if searched else None
    return Round(said, answer.text, answer.intent.name, answer.video, shown, down, rank, answer.timings)


def _rank(stage: FirstStage, video: str, shown: Sequence[str], down: Sequence[str]) -> int | None:
    """The place of a video in the final order of the corpus, but for those that are turned down."""
    rank = stage.rank(video, shown)
    if rank is None or video in shown or not down:
        return rank
    alone = stage.rank(video, ()) or 0
    before = sum((stage.rank(each, ()) or 0) <= alone for each in down)
    return max(alone - before, len(shown) + 1)


def run(
    assistant: Assistant,
    corpus: Corpus,
    store: DialogueStore,
    dialogues: Sequence[Dialogue],
    folder: epath.Path,
    settings: Mapping[str, Any],
    *,
    rounds: int,
    candidates: int,
    batch: int,
    process: tuple[int, int] = (0, 1),
) -> None:
    """Holds the episodes of each kind of user that are not in their files.

    Args:
      store: whose records tell of the videos. dialogues: of it, those that users begin as.
      folder: of the files. settings: what else episodes depend on, by name, for their first lines.
      rounds, candidates: as `hold`. batch: episodes at once.
      process: its number and how many there are; each holds its share.

    Raises:
      ValueError: a file was made with something else.
    """
    facts = facts_of(store[number] for number in range(len(store)))
    wishes = [wish for dialogue in dialogues if (wish := wish_of(dialogue, facts))][process[0] :: process[1]]
    made_with = {
        "export": assistant.fingerprint, "dialogues": store.fingerprint, "split": store.split, "rounds": rounds,
        "seed": 0, "batch": batch, **settings,
    }  # fmt: skip
    for kind in KINDS:
        path = str(_file(folder, kind, process[0]))
        with interactive.growing(path, {"user": kind, **made_with}) as (append, before):
            # Whole groups, those begun too: who is beside whom decides the last bits of numbers.
            groups = range(len(before) // batch * batch, len(wishes), batch)
            for first in tqdm(groups, desc=f"{kind} user", unit="group"):
                group = wishes[first : first + batch]
                held = hold(assistant, corpus, group, kind, rounds=rounds, candidates=candidates)
                for episode in held[max(0, len(before) - first) :]:
                    append(episode)


def results(
    folder: epath.Path, processes: int, dialogues: Sequence[Dialogue], known: Collection[str]
) -> interactive.Users:
    """What is in the files that `run` has written.

    Args:
      folder, dialogues: as `run`. processes: that have held them. known: ids of the corpus.
    """
    order = {dialogue.id: place for place, dialogue in enumerate(dialogues)}
    episodes: dict[str, list[Episode]] = {}
    for kind in KINDS:
        files = [interactive.read(str(_file(folder, kind, process))) for process in range(processes)]
        rounds = files[0][0]["rounds"]
        episodes[kind] = sorted((each for _, file in files for each in file), key=lambda each: order[each.dialogue])
    problems = interactive.Problems(
        {dialogue.id: "it begins with no search" for dialogue in dialogues if _first(dialogue) is None},
        {each.dialogue: f"video: {each.video}" for each in episodes[KINDS[0]] if each.video not in known},
        {
            f"{each.dialogue}#{number}": f"{kind}: {held.error}"
            for kind, of_kind in episodes.items()
            for each in of_kind
            for number, held in enumerate(each.rounds, 1)
            if held.error
        },
    )
    kinds = {kind: interactive.summarise(each, rounds) for kind, each in episodes.items()}
    compared = {}
    if all(episodes.values()):
        first, second = KINDS
        compared[f"{first} against {second}"] = interactive.compare(episodes[first], episodes[second], rounds)
    return interactive.Users(kinds, compared, problems)


def _file(folder: epath.Path, kind: str, process: int) -> epath.Path:
    return folder / f"episodes-{kind}-{process}.jsonl"
