"""A made-up split, and runs on it that are right and wrong in every way there is."""

import numpy as np

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics.records import Moment, Prediction

CORPORA = ("ActivityNet", "DiDeMo", "MSR-VTT", "TVQA")


def split(count, seed=0, videos=60, corpora=CORPORA):
    """Dialogues of one to nine turns in both languages and of types 0 to 7; not every search lists its video."""
    rng = np.random.default_rng(seed)
    ids = [f"{corpora[number % len(corpora)]}/v{number}" for number in range(videos)]
    dialogues = []
    for number in range(count):
        language = ("en", "zh")[int(rng.random() < 0.4)]
        turns = []
        for _ in range(min(1 + rng.geometric(0.35), 9)):
            kind = Intent(int(rng.choice(3, p=(0.2, 0.5, 0.3))))
            truth = ids[int(videos * rng.random() ** 2)]
            words = {"en": ("Find it.", "It is video 3."), "zh": ("找出来。", "是视频 3。")}[language]
            if kind == Intent.CHAT:
                turns.append(Turn("Hi.", "Hello there.", kind, language))
            elif kind == Intent.VIDEO:
                listed = [ids[number] for number in rng.choice(videos, 10, replace=False)]
                if rng.random() < 0.85 and truth not in listed:
                    listed[int(rng.integers(10))] = truth
                turns.append(Turn(*words, kind, language, truth, tuple(listed)))
            else:
                start = rng.uniform(0, 30)
                turns.append(Turn(*words, kind, language, truth, span=(start, start + rng.uniform(1, 20))))
        kind = int(rng.integers(0, 8)) if any(turn.video_id for turn in turns) else 0
        dialogues.append(Dialogue(f"d{number}", "test", kind, tuple(turns)))
    return dialogues


def run(dialogues, skill, seed=1, corpus=None):
    """Answers of a run, right about as often as `skill`; some are missing, most of the others differ in every field.

    With a corpus, all of its ids are ranked and moments are in several videos; else a turn's candidates are ranked.
    """
    rng = np.random.default_rng(seed)
    predictions = []
    for dialogue in dialogues:
        for place, turn in enumerate(dialogue.turns):
            if rng.random() < 0.02:
                continue
            latency = {"search": rng.gamma(2, 0.02), "read": rng.gamma(3, 0.1) + 0.03 * place, "write": 0.2}
            intent = turn.intent if rng.random() < 0.7 + 0.3 * skill else Intent(int(rng.integers(3)))
            fields = {"intent": intent, "text": turn.answer if rng.random() < skill else "no idea at all"}
            fields |= {"parsed": bool(rng.random() < 0.95), "latency": latency}
            if intent == Intent.VIDEO and turn.intent == Intent.VIDEO:
                fields |= _ranked(rng, turn, skill, corpus)
            elif intent == Intent.MOMENT and turn.intent == Intent.MOMENT:
                fields["moments"] = _moments(rng, turn, skill, corpus)
                fields["video"] = fields["moments"][0].video
            predictions.append(Prediction(dialogue.id, place, **fields))
    return predictions


def _ranked(rng, turn, skill, corpus):
    pool = list(turn.candidates if corpus is None else corpus)
    ranking = [str(each) for each in rng.permutation(pool)]
    if turn.video_id in ranking and rng.random() < skill:
        ranking.remove(turn.video_id)
        ranking.insert(int(rng.geometric(0.6)) - 1, turn.video_id)
    rank = ranking.index(turn.video_id) + 1 if turn.video_id in ranking else None
    refused = rng.random() < (0.05 if rank else 0.5)
    return {
        "ranking": tuple(ranking[:10]), "pool": len(pool), "rank": rank if corpus else None,
        "video": None if refused else ranking[0],
    }  # fmt: skip


def _moments(rng, turn, skill, corpus):
    found = []
    for score in sorted(rng.uniform(0, 1, 5), reverse=True):
        start, end = turn.span
        length = end - start
        shift = length * (1 - score) * rng.normal(0, 0.6) + (0 if rng.random() < skill else 8)
        video = turn.video_id if corpus is None or rng.random() < 0.8 else corpus[int(rng.integers(len(corpus)))]
        found.append(Moment(video, max(0, start + shift), max(0, end + shift), float(score)))
    return tuple(found)
