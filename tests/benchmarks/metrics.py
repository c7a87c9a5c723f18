"""Scoring many predictions: `python -m tests.benchmarks.metrics [--predictions=200000]`.

A made-up IVCR-200K.json of test dialogues of three turns, its samples, and a perfect result file; each mode of
`ivcr_jax.metrics.official` in a process of its own, reading the files included. Then the report of a run in our own
format, with BLEU and all plots: dialogues of one to seven turns in both languages, answers as long as the data's,
nearly all of them different. Prints one line of JSON.
"""

import dataclasses
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from absl import app, flags

from ivcr_jax import lines
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import published, raw, records, report, summary, text

FLAGS = flags.FLAGS
TURNS = 3
VIDEOS = [f"{('ActivityNet', 'DiDeMo', 'MSR-VTT', 'TVQA')[number % 4]}/video_{number:05d}" for number in range(12_000)]
SKILL = 0.7  # the share of what a made-up run has right
WORDS = {
    "en": (
        "man woman child dog bird horse crowd river street garden kitchen table window ladder camera guitar bicycle "
        "jacket bottle bridge red blue small tall old wooden bright dark quiet muddy walks runs jumps turns waves "
        "paints throws lifts opens slowly quickly twice again outside suddenly near behind under before while with"
    ).split(),
    "zh": (
        "男人 女人 孩子 小狗 飞鸟 白马 人群 河流 街道 花园 厨房 桌子 窗户 梯子 相机 吉他 单车 外套 瓶子 大桥 "
        "红色 蓝色 很小 高大 古老 木头 明亮 昏暗 安静 泥泞 行走 奔跑 跳起 转身 挥手 画画 抛出 举起 打开 "
        "清洗 慢慢 很快 两次 再次 外面 忽然 旁边 后面 下面 之前 同时 然后"
    ).split(),
}


def dialogue(number: int) -> dict[str, object]:
    """A search, a moment in what was found, another search; every other one in Chinese."""
    messages: list[dict[str, object]] = []
    for turn in range(TURNS):
        listed = [f"Corpus/video_{(number + turn * 7 + place) % 12000:05d}.mp4" for place in range(10)]
        place = (number + turn) % 10
        start = float(number % 60 + turn)
        gt_se = [start, start + 7.5] if turn == 1 else [-1, -1]
        when = f" at {start}s-{start + 7.5}s" if turn == 1 else ""
        wording = "与提问相符的是 video {}{}。" if number % 2 else "The given query happens in video {}{}. It fits."
        answer = {"from": "gpt", "value": wording.format(place + 1, when), "video_id": listed[place], "gt_se": gt_se}
        asked = f"Which shows event {number} of {turn}, or one much like it, seen from the side?"
        messages += [{"from": "human", "value": asked, "text_id": number}, answer | {"candidate_videos": listed}]
    return {"split": "test", "type": [1 + number % 6], "conversations": messages}


def make(paths: dict[str, str], predictions: int) -> None:
    """Writes the three files of the published protocol."""
    published.write_json(paths["raw"], [dialogue(number) for number in range(-(-predictions // TURNS))])
    samples, _ = published.convert(raw.read_rows(paths["raw"]))
    published.write_json(paths["dialogues"], [sample.messages for sample in samples])
    published.write_predictions(paths["predictions"], samples, [sample.messages[-1]["content"] for sample in samples])


def held(predictions: int) -> Iterator[tuple[Dialogue, list[records.Prediction]]]:
    """Dialogues of searches, moments and talk, and what a run said."""
    rng = random.Random(0)
    turns_left = predictions
    for number in range(predictions):
        count = min(1 + number % 7, turns_left)
        turns_left -= count
        turns, found = [], []
        for place in range(count):
            turn = made_turn(
                rng, "zh" if number % 2 else "en", Intent((number + place) % 10 and 1 + (number + place) % 2)
            )
            turns.append(turn)
            found.append(made_prediction(rng, f"d{number}", place, turn))
        yield Dialogue(f"d{number}", "test", 1 + number % 7, tuple(turns)), found
        if not turns_left:
            return


def made_turn(rng: random.Random, language: str, intent: Intent) -> Turn:
    """Its answer has three sentences: 46 English words, or some 60 Chinese characters."""
    listed = tuple(rng.sample(VIDEOS, 10))
    truth = rng.choice(listed)
    begin = round(rng.uniform(0, 60), 1)
    said = [rng.choices(WORDS[language], k=8 if language == "zh" else 11) for _ in range(3)]
    if language == "zh":
        answer = f"是视频 {listed.index(truth) + 1}。" + "".join(f"{''.join(s[:4])}，{''.join(s[4:])}。" for s in said)
    else:
        answer = f"It is video {listed.index(truth) + 1}. " + " ".join(
            f"The {' '.join(s[:5])}, and a {' '.join(s[5:])}." for s in said
        )
    if intent == Intent.CHAT:
        return Turn("Is it?", answer, intent, language)
    if intent == Intent.VIDEO:
        return Turn("Where is it?", answer, intent, language, truth, listed)
    return Turn("When is it?", answer, intent, language, truth, span=(begin, begin + 7.5))


def made_prediction(rng: random.Random, dialogue: str, place: int, turn: Turn) -> records.Prediction:
    """Right about as often as SKILL, in its words too."""
    words = WORDS[turn.language]
    others = {word: rng.choice(words) for word in rng.sample(words, len(words) // 3)}
    answer = turn.answer
    for word, other in others.items():
        answer = answer.replace(word, other)
    stages = {stage: rng.uniform(0.01, 0.3) for stage in ("search", "read", "rank", "write")}
    found = records.Prediction(
        dialogue, place, turn.intent, text=answer, parsed=rng.random() < SKILL, latency=stages
    )  # fmt: skip
    if turn.intent == Intent.VIDEO:
        others_first = sorted(turn.candidates, key=lambda each: each != turn.video_id or rng.random() > SKILL)
        return dataclasses.replace(found, ranking=tuple(others_first), pool=10, video=others_first[0])
    if turn.intent == Intent.MOMENT:
        assert turn.span is not None
        start = turn.span[0] + rng.expovariate(1 / 3)
        moment = records.Moment(turn.video_id, start, start + 7.5, rng.random())
        return dataclasses.replace(found, moments=(moment,), video=turn.video_id)
    return found


def make_run(folder: str, predictions: int) -> None:
    """Writes the dialogues and the run's predictions."""
    header = records.Header("gold", "e", "d", "test")
    said: list[records.Prediction] = []

    def rows() -> Iterator[dict[str, object]]:
        for dialogue, found in held(predictions):
            said.extend(found)
            yield dataclasses.asdict(dialogue)

    lines.write(f"{folder}/dialogues.jsonl", {"dialogues": 1}, rows())
    records.write(f"{folder}/predictions.jsonl", header, said)


def read_dialogue(row: dict, line: int) -> Dialogue:
    """What `make_run` wrote."""
    del line
    turns = [
        Turn(**{**turn, "intent": Intent(turn["intent"]), "candidates": tuple(turn["candidates"])})
        for turn in row.pop("turns")
    ]
    return Dialogue(**row, turns=tuple(turns))


def write_report(folder: str) -> None:
    """The whole report; prints how long processors took for each part, and BLEU."""
    begun, seconds = time.process_time(), {}

    def done(name: str) -> None:
        seconds[name] = round(time.process_time() - begun - sum(seconds.values()), 1)

    _, dialogues = lines.read(f"{folder}/dialogues.jsonl", "dialogues", read_dialogue)
    _, predictions = records.read(f"{folder}/predictions.jsonl")
    done("read")
    pairs, problems = records.match(dialogues, predictions)
    done("match")
    found = summary.summarise(pairs)
    done("summarise")
    words, signatures = text.bleu(pairs)
    done("bleu")
    whole = dataclasses.replace(found, overall=found.overall | words)
    report.write(f"{folder}/report", report.Report(signatures, {"gold": whole}, {"gold": problems}))
    done("write")
    print(json.dumps({"core_seconds_of": seconds, **{name: cell.value for name, cell in words.items()}}))


def measure(arguments: list[str]) -> dict[str, object]:
    """Seconds of the wall and of processors, the peak of memory in MB, and what one run of Python prints last."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, *arguments], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{arguments}: failed")
        wall = time.perf_counter() - begun
        out.seek(0)
        found = json.loads(out.read().splitlines()[-1])
    return {
        "seconds": round(wall, 1),
        "core_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
        **({"r1": found["overall"]["r1"]} if "overall" in found else found),
    }


def main(argv: list[str]) -> None:
    """Prints what was measured."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}.json" for name in ("predictions", "dialogues", "raw")}
        # In processes of their own: a child's peak is never under what its parent holds.
        for target, where in ((make, paths), (make_run, folder)):
            maker = multiprocessing.get_context("spawn").Process(target=target, args=(where, FLAGS.predictions))
            maker.start()
            maker.join()
        arguments = ["-m", "ivcr_jax.metrics.official", *(f"--{name}={path}" for name, path in paths.items())]
        found = {
            "predictions": FLAGS.predictions,
            "mb": {name: round(os.path.getsize(f"{folder}/{name}") / 1e6) for name in sorted(os.listdir(folder))},
            "corrected": measure(arguments),
            "as published": measure([*arguments, "--as_published"]),
            "report": measure(["-c", f"from tests.benchmarks import metrics; metrics.write_report({folder!r})"]),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    flags.DEFINE_integer("predictions", 200_000, "How many, or up to two more.", lower_bound=1)
    app.run(main)
