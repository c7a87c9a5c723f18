"""Raw dialogues, samples and result files made up at random, tidy ones and untidy ones."""

import numpy as np

QUESTIONS = ("Find the dog.", "找一只狗。", "When does it bark?", "它什么时候叫？", " And again? ", "再来一个。")
ODD = (
    "", "video 3", "video 12", "video 0", "6th video", "video number 3", "videos 3", "视频 3", "第三个视频", "video 10",
    "5s to 10s", "5.0s–10.0s", "from 5 to 10", "2 s - 4 s", "video 1-10", "00:00:05 - 00:00:10", "-3 - 5", "5秒到10秒",
    "It starts at 3! It ends at 9.5?", "a\n1.5\nb\n7", "video 3 at 5s-10s.", "10s-5s", "12...5 - 20..", "5s-5s",
    "0s-0s", "A specific example is : 20.8 - 30.0 seconds. video 2", "no idea", "nans-nans", "９s-１２s",
    "9" * 400 + "-3", "00:01:05 begins! 00:02:00 ends", "Video\u00a07, video 4",
)  # fmt: skip


def spoken(time):
    return str(round(float(time), 1))


class Maker:
    """Makes up dialogues. `untidy`: the probability of a fault wherever there may be one."""

    def __init__(self, seed, untidy=0.0, types=range(8), most_turns=12, misses=0.2, own_questions=False):
        self.rng = np.random.default_rng(seed)
        self.untidy, self.types, self.most, self.misses = untidy, types, most_turns, misses
        self.own_questions = own_questions
        self.count = 0

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, values):
        return values[self.rng.integers(len(values))]

    def question(self):
        self.count += 1
        text = self.pick(QUESTIONS)
        return text if not self.own_questions and self.chance(0.5) else f"{text} ({self.count})"

    def search(self):
        listed = [f"Corpus/v{number}.mp4" for number in self.rng.permutation(40)[:10]]
        number = int(self.rng.integers(1, 11))
        text = self.pick(("The given query happens in video {n}. 2 dogs.", "Video {n} it is!", "Best is video {n}"))
        answer = {"from": "gpt", "value": text.format(n=number), "candidate_videos": listed, "gt_se": [-1, -1]}
        answer["video_id"] = "Corpus/missed.mp4" if self.chance(self.misses) else listed[number - 1]
        if self.chance(self.untidy):
            answer["value"] = self.pick(ODD)
        if self.chance(self.untidy / 4):
            del answer["candidate_videos"]
        return answer

    def moment(self):
        start, length = self.rng.uniform(0, 60), self.rng.uniform(1, 30)
        start, end = spoken(start), spoken(start + length)
        number = int(self.rng.integers(1, 11))
        text = self.pick(("Query content found in video {n} at {s}s-{e}s.", "在 video {n} 的 {s}s-{e}s。", "{s}s-{e}s"))
        answer = {"from": "gpt", "value": text.format(n=number, s=start, e=end), "gt_se": [float(start), float(end)]}
        listed = [f"Corpus/v{number}.mp4" for number in self.rng.permutation(40)[:10]]
        answer |= {"candidate_videos": listed, "video_id": listed[1 if self.chance(self.misses) else 0]}
        if self.chance(self.untidy / 2):
            answer["value"] = self.pick(ODD)
        if self.chance(self.untidy / 4):
            answer |= {"value": "at 5s-5s.", "gt_se": [5.0, 5.0]}
        return answer

    def dialogue(self, index):
        messages = []
        for _ in range(self.rng.integers(1, self.most + 1)):
            answer = self.search() if self.chance(0.55) else self.moment()
            messages += [{"from": "human", "value": self.question(), "text_id": self.count}, answer]
        if self.chance(self.untidy / 8):
            messages.pop()
        if self.chance(self.untidy / 8) and len(messages) > 1:
            del messages[1]["gt_se"]
        split = "train" if self.chance(0.2) else "test"
        kind = int(self.pick(self.types))
        return {"id": f"d{index}", "split": split, "type": [kind], "conversations": messages}

    def raw(self, dialogues):
        return [self.dialogue(index) for index in range(dialogues)]

    def result(self, samples, odd=0.3, raw_questions=0.5):
        """Rows of result.json: right, odd, or another's; under the whole user message or the question alone."""
        rows = []
        for sample in samples:
            truth = sample[-1]["content"]
            output = (
                self.pick(ODD) if self.chance(odd) else self.pick(samples)[-1]["content"] if self.chance(odd) else truth
            )
            user = sample[-2]["content"]
            if self.chance(raw_questions):
                user = user[user.rfind("</VIDEO>.") + len("</VIDEO>.") :]
            rows.append({"user_q": user, "output": output})
        if self.chance(self.untidy):
            del rows[len(rows) * 9 // 10 :]
        if rows and self.chance(self.untidy):
            rows[self.rng.integers(len(rows))]["output"] = None
        return rows
