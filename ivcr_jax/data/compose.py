"""Composes dialogues in the source's own JSON format from any captioned corpus.

It knows clips, captions and wording. It must not know how captions were read or videos made, opens no video, and
never translates: a dialogue is in a language its clips have captions in.

`type` says what a dialogue holds: 0 chat only; 1 a single search; 2 a search and moments in what was found;
3 a correction ("not that one"); 4 a request for a similar video; 5 both; 6 several searches, one after the other;
7 turns that have nothing to do with each other. Chat may occur in any of them. An interaction is one question with
its answer.
"""

import collections
import dataclasses
import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags

from ivcr_jax import command
from ivcr_jax.data import captions, manifest
from ivcr_jax.data.captions import Clip, Corpus, Moment

# Dialogues by number of turns, 1 to 20, as read off the published histogram (its tail is our guess).
TURN_WEIGHTS = (37000, 31000, 20500, 11700, 6000, 5500, 1300, 300, 200, 150, 100, 80, 60, 50, 40, 30, 25, 20, 15, 10)
# The order of kinds after a find, each with the probability that it is asked for; then comes another find.
CYCLE = (("locate", 0.9), ("locate", 0.35), ("refine", 0.55), ("similar", 0.55), ("chat", 0.2))
LONGEST_CHAT = 4  # turns; a dialogue of chat alone runs out of things to say
NO_SPAN = [-1, -1]


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Lines `key: one | two | three`; a line that begins with a blank goes on with the line before."""
    text = text.strip("\n").replace("\n ", " ")
    for mark in "，。：！？":
        text = text.replace(mark + " ", mark)
    lines = text.split("\n")
    rows = (line.split(": ", 1) for line in lines)
    return {key: tuple(" ".join(part.split()) for part in parts.split("|")) for key, parts in rows}


# {c} a caption, {r} a requested change, {n} the video's number, {s} a span, {t} a subject. An answer is its kind's
# intent, result and reason, one after the other.
WORDING = {
    "en": _table("""
find: {c} | {c} | I am looking for a video. {c} | Can you find this one? {c} | Find the video that shows this: {c} |
 Which video is this? {c}
next: Now something else. {c} | Let us look for another video. {c} | Next, please find this one: {c} | I need one more
 video. {c}
locate: {c} | When does this happen? {c} | Where in this video is this part? {c} | At what time do we see this? {c} |
 Take me to this part: {c}
locate told: And when exactly is that? {c} | At what time does it happen? {c}
refine: Not that one, I want {r}. | No, I meant {r}. | Close, but I am after {r}. | That is not it. Look for {r}.
similar: Do you have a similar one? I am thinking of {r}. | Now show me something like it: {r}. | Good. I would also
 like to see {r}. | Is there another one like this? I want {r}.
refine by caption: Not that one, I mean this: {c} | No, that is not it. It is more like this: {c}
similar by caption: Do you have something similar? {c} | Now show me another one like it: {c}
find intent: The intent is video retrieval. | You are looking for a video. | This is a request to find a video.
find result: The given query happens in video {n}. | The best match is video {n}. | What you describe is shown in video
 {n}.
find reason: It matches because it shows this: {c} | Its content fits the question: {c} | This is what can be seen in
 it: {c}
refine intent: The intent is to correct the video retrieval. | You mean a different video, close to the last one.
refine result: The one you mean is video {n}. | With that change, the query happens in video {n}.
refine reason: Unlike the last one, it shows this: {c} | This is what can be seen in it: {c}
similar intent: The intent is retrieval of a similar video. | You are looking for a video much like this one.
similar result: The closest one is video {n}. | A similar one is video {n}.
similar reason: It has much in common with the last one and shows this: {c} | This is what can be seen in it: {c}
locate intent: The intent is temporal video grounding. | You are asking for a moment in the current video. | The
 question is when something happens.
locate result: The given query happens in video {n} at {s}. | The query content is found in video {n} at {s}. | In
 video {n}, this is at {s}.
locate reason: In that part we see this: {c} | That stretch matches the question: {c}
miss intent: The intent is video retrieval. | You are looking for a video.
miss result: None of the candidate videos matches the query. | The right video is not among the candidates.
miss reason: I could not see this in any of them: {c} | None of them fits the description: {c}
hello: Hello, what can you do?
hello answer: Hello! Describe a video and I will find it, point to a moment in it, or look for a similar one. We can
 also simply talk about your ideas.
thanks: Thank you, that was all. | Great, that helps a lot. Thanks!
thanks answer: You are welcome. Come back whenever you need another video. | Glad to hear it. Tell me if you want to
 look for anything else.
talk: Write down some points of a script about {t}. | Can you think of a title for a video about {t}? | How long should
 a video about {t} be? | What music would suit a video about {t}?
talk answer: Sure! Here are some points for a script about {t}: 1. Opening: show the place and say what it is about. 2.
 Main part: follow one person and keep every shot short. 3. Ending: a calm shot and one sentence that stays in mind. |
 I would promise something concrete, such as the best minute of {t}. Keep it short, so that it can be read at a glance.
 | One to two minutes are enough for most people. Begin with the strongest shot of {t} and leave out whatever repeats.
 | Something light without singing, so that it does not compete with the sounds of {t}. Let it fade where people speak.
subject: a school sports day | a small coffee shop | a weekend by the sea | cooking noodles at home | a first bicycle
 ride | a morning at the market
"""),
    "zh": _table("""
find: {c} | {c} | 帮我找一个视频：{c} | 我想找这样一个视频：{c} | 有没有这样的视频？{c} | 请找出符合描述的视频：{c}
next: 换一个吧。{c} | 再帮我找另一个视频：{c} | 接下来找这个：{c} | 我还需要一个视频：{c}
locate: {c} | 这是什么时候发生的？{c} | 下面这一段在视频的什么位置？{c} | 帮我定位到这一段：{c} |
 什么时候能看到这一幕？{c}
locate told: 具体是在什么时候？{c} | 它发生在什么时间？{c}
refine: 不是这个，我要的是{r}。 | 不对，我想找的是{r}。 | 差一点，我要找{r}。 | 这个不对，请找{r}。
similar: 有没有类似的？我想看{r}。 | 再给我找一个相似的，要{r}。 | 很好，我还想看{r}。 | 还有像这样的吗？最好是{r}。
refine by caption: 不是这个，我说的是：{c} | 不对，应该更像这样：{c}
similar by caption: 有没有类似的视频？{c} | 再找一个相似的：{c}
find intent: 意图是视频检索。 | 你想找一个视频。 | 这是一个找视频的请求。
find result: 与提问相符的是视频 {n}。 | 你描述的内容在视频 {n} 中。 | 最符合的是视频 {n}。
find reason: 画面内容与描述一致：{c} | 其中可以看到：{c} | 理由是有这样的画面：{c}
refine intent: 意图是修正上一次的视频检索。 | 你要的是另一个很接近的视频。
refine result: 你说的应该是视频 {n}。 | 按照这个改动，相符的是视频 {n}。
refine reason: 与上一个不同，这里可以看到：{c} | 其中的画面是：{c}
similar intent: 意图是检索相似的视频。 | 你想找一个和这个差不多的视频。
similar result: 最接近的是视频 {n}。 | 相似的是视频 {n}。
similar reason: 它和上一个有很多共同点，其中可以看到：{c} | 其中的画面是：{c}
locate intent: 意图是视频片段定位。 | 你问的是当前视频里的一个片段。 | 你想知道这一幕出现在什么时候。
locate result: 提问的内容在视频 {n} 的 {s}。 | 这一段出现在视频 {n} 的 {s}。 | 它在视频 {n} 中，时间是 {s}。
locate reason: 这段时间里可以看到：{c} | 这一段的画面与提问相符：{c}
miss intent: 意图是视频检索。 | 你想找一个视频。
miss result: 候选视频中没有与提问相符的。 | 要找的视频不在候选之中。
miss reason: 在这些视频里都没有看到这样的画面：{c} | 它们都不符合这个描述：{c}
hello: 你好，你能做什么？
hello answer: 你好！你可以描述一个视频让我来找，也可以让我定位其中的某一段，或者找一个相似的。随便聊聊你的想法也行。
thanks: 谢谢，没有别的问题了。 | 太好了，帮了我大忙，谢谢！
thanks answer: 不客气，需要找视频的时候随时来找我。 | 很高兴能帮到你，还想找什么尽管告诉我。
talk: 帮我列一个以{t}为主题的视频脚本提纲。 | 给一个以{t}为主题的视频起个标题吧。 | 拍{t}的视频多长合适？ |
 拍{t}的视频配什么音乐好？
talk answer: 好的，以{t}为主题的脚本可以这样安排：1. 开头，交代地点，说明主题。2. 主体，跟拍一个人物，
 每个镜头都短一些。3. 结尾，用一个安静的镜头和一句让人记住的话收尾。 | 标题最好具体一点，突出最精彩的地方。字数少一些，
 让人一眼就能看完。 | 一般一到两分钟就够了。把最有感染力的镜头放在最前面，重复的内容尽量删掉。 |
 可以选轻快、没有人声的音乐，这样不会盖住现场声。有人说话的地方把音量调低。
subject: 学校运动会 | 街角咖啡店 | 海边的周末 | 一碗家常面 | 孩子学骑自行车 | 清晨的菜市场
"""),
}


def _seconds(time: float) -> str:
    """Seconds as the answers write them: `5.0`, `130.98`; milliseconds at most."""
    return str(round(float(time), 3))


def dialogue_type(kinds: Sequence[str]) -> int:
    """The `type` of a dialogue whose turns depend on each other, from the kinds of its turns."""
    held = collections.Counter(kinds)
    if set(held) == {"chat"}:
        return 0
    if held["find"] > 1:
        return 6
    if held["refine"] or held["similar"]:
        return 5 if held["refine"] and held["similar"] else 3 if held["refine"] else 4
    return 2 if held["locate"] else 1


class _Writer:
    """One dialogue as it is written: what was said, and what the next turn may refer to."""

    def __init__(self, corpus: Corpus, rng: random.Random, language: str, num_candidates: int, miss_share: float):
        self.corpus = corpus
        self.rng = rng
        self.language = language
        self.num_candidates = num_candidates
        self.miss_share = miss_share
        self.turns: list[tuple[str, str, dict[str, Any]]] = []  # kind, question, answer
        self.current: Clip | None = None
        self.candidates: list[str] = []
        self.shown: dict[str, None] = {}
        self.told: set[str] = set()  # sentences of moments, by a search
        self.located: list[Moment] = []
        self.said: set[str] = set()  # in chat

    def find(self, clip: Clip) -> None:
        caption = self._sentence(self._describe(clip))
        self._retrieve("find", "next" if self.shown else "find", clip, c=caption)

    def another(self) -> Clip:
        """A clip to search for next, one not seen yet if there is any."""
        split = self.corpus.clips[next(iter(self.shown))].split
        pool = self.corpus.findable[split, self.language]
        for _ in range(20):
            name = self.rng.choice(pool)
            if name not in self.shown:
                break
        return self.corpus.clips[name]

    def chat(self, pattern: str = "talk") -> None:
        """Says something that no video is needed for, not the same twice while there is a choice."""
        words = WORDING[self.language]
        every = [f"{pattern} {number}" for number in range(len(words[pattern]))]
        said = self.rng.choice([each for each in every if each not in self.said] or every)
        self.said.add(said)
        number = int(said.split()[1])
        subject = self.rng.choice(words["subject"])
        question, answer = (words[key][number].format(t=subject) for key in (pattern, f"{pattern} answer"))
        self.turns.append(("chat", question, {"value": answer, "gt_se": NO_SPAN}))

    def locate(self) -> bool:
        """Asks for a moment of the current video; False where there is none left to ask for."""
        if self.current is None:
            return False
        moments = [m for m in self.current.moments if self.language in m.captions and m not in self.located]
        if not moments:
            return False
        fresh = [m for m in moments if m.captions[self.language] not in self.told]
        moment = self.rng.choice(fresh or moments)
        self.located.append(moment)
        caption = self._sentence(moment.captions[self.language])
        start, end = _seconds(moment.start), _seconds(moment.end)
        answer = self._answer("locate", caption, s=f"{start}s-{end}s")
        span = [float(start), float(end)]
        pattern = "locate" if fresh else "locate told"
        self._add("locate", pattern, {"value": answer, "video_id": self.current.video, "gt_se": span}, c=caption)
        return True

    def change(self, kind: str) -> bool:
        """Asks, from the current video, for one beside it; False where none can be named. Kind: refine, similar."""
        if self.current is None:
            return False
        open_to = [name for name in self.corpus.beside(self.current) if name not in self.shown]
        asked = [(n, words) for n, words in self.current.similar if self.language in words and n in open_to]
        if asked:
            name, words = self.rng.choice(asked)
            self._retrieve(kind, kind, self.corpus.clips[name], r=words[self.language])
            return True
        described = [name for name in open_to if self.language in self.corpus.languages[name]]
        if not described:
            return False
        clip = self.corpus.clips[self.rng.choice(described)]
        self._retrieve(kind, f"{kind} by caption", clip, c=self._sentence(self._describe(clip)))
        return True

    def _describe(self, clip: Clip) -> str:
        """A caption of the whole video, else one or two moments that follow each other, told in order."""
        whole = clip.captions.get(self.language)
        if whole:
            return self.rng.choice(whole)
        moments = [m for m in clip.moments if self.language in m.captions]
        first = self.rng.choice(moments)
        told = [first, *[m for m in moments if m.start >= first.end][: self.rng.randrange(2)]]
        self.told.update(m.captions[self.language] for m in told)
        return self._join(self._sentence(m.captions[self.language]) for m in told)

    def _sentence(self, text: str) -> str:
        """The text as a sentence of its own: a capital first, a full stop last."""
        text = text[:1].upper() + text[1:]
        if text.rstrip("\"'”’」』)）").endswith((".", "!", "?", "。", "！", "？", "…")):
            return text
        return text + ("。" if self.language == "zh" else ".")

    def _join(self, sentences: Iterable[str]) -> str:
        return ("" if self.language == "zh" else " ").join(sentences)

    def _retrieve(self, kind: str, pattern: str, clip: Clip, **words: str) -> None:
        hit = self.rng.random() >= self.miss_share or len(self.corpus.split[clip.split]) == 1
        # A first stage that is asked for nearly the same finds nearly the same.
        if not (hit and kind in ("refine", "similar") and clip.video in self.candidates):
            self.candidates = self.corpus.candidates(self.rng, clip, self.num_candidates, hit)
        # After a miss there is no video on the table that a next question could be about.
        self.current = clip if hit else None
        # Another caption tells more than the question did; another moment's would be beside the point.
        if hit and ("r" in words or clip.captions.get(self.language)):
            reason = self._describe(clip)
        else:
            reason = words.get("c") or words["r"]
        answer = {
            "value": self._answer(kind if hit else "miss", self._sentence(reason)),
            "video_id": clip.video,
            "candidate_videos": self.candidates,
            "gt_se": NO_SPAN,
        }
        self.shown[clip.video] = None
        self._add(kind, pattern, answer, **words)

    def _answer(self, kind: str, caption: str, **words: str) -> str:
        if self.current is not None:
            words["n"] = str(self.candidates.index(self.current.video) + 1)
        parts = (self.rng.choice(WORDING[self.language][f"{kind} {part}"]) for part in ("intent", "result", "reason"))
        return self._join(part.format(c=caption, **words) for part in parts)

    def _add(self, kind: str, pattern: str, answer: dict[str, Any], **words: str) -> None:
        question = self.rng.choice(WORDING[self.language][pattern]).format(**words)
        self.turns.append((kind, question, answer))


@dataclasses.dataclass
class _Composer:
    """What `compose` was asked for, and the dialogue for every index."""

    corpus: Corpus
    seed: int
    num_candidates: int
    zh_share: float
    miss_share: float
    chat_share: float
    independent_share: float
    name: str

    def __post_init__(self) -> None:
        leads = len(self.corpus.leads)
        self.round = leads + round(self.chat_share * leads)
        self._order: tuple[int, list[int]] = (-1, [])

    def dialogue(self, index: int, limit: int | None = None) -> dict[str, Any]:
        """The raw dialogue `index`, cut after `limit` turns."""
        rng = random.Random(f"{self.seed}/dialogue/{index}")
        leads = self.corpus.leads
        slot = self._slot(index)
        # Slots past the clips are dialogues of chat alone, so that every round begins once with every clip.
        lead = self.corpus.clips[leads[slot % len(leads)]]
        languages = self.corpus.languages[lead.video]
        language = ("zh" if rng.random() < self.zh_share else "en") if len(languages) > 1 else languages[0]
        count = rng.choices(range(1, len(TURN_WEIGHTS) + 1), TURN_WEIGHTS)[0]
        writer = _Writer(self.corpus, rng, language, self.num_candidates, self.miss_share)
        independent = False
        if slot >= len(leads):
            self._chat_only(writer, min(count, LONGEST_CHAT))
        elif independent := count > 1 and rng.random() < self.independent_share:
            self._independent(writer, lead, count)
        else:
            self._dependent(writer, lead, count)
        turns = writer.turns[:limit]
        name = f"{self.name}-{index:07d}"
        conversations: list[dict[str, Any]] = []
        for number, (_, question, answer) in enumerate(turns):
            conversations.append({"from": "human", "value": question, "text_id": f"{name}-{number}"})
            conversations.append({"from": "gpt", **answer})
        kind = 7 if independent and len(turns) > 1 else dialogue_type([kind for kind, _, _ in turns])
        return {"id": name, "split": lead.split, "type": [kind], "conversations": conversations}

    def stream(self, num_interactions: int | None, repeats: int) -> Iterator[dict[str, Any]]:
        index, left = 0, num_interactions
        while left if left is not None else index < repeats * self.round:
            row = self.dialogue(index, left)
            if left is not None:
                left -= len(row["conversations"]) // 2
            index += 1
            yield row

    def _slot(self, index: int) -> int:
        cycle, place = divmod(index, self.round)
        if self._order[0] != cycle:
            order = list(range(self.round))
            random.Random(f"{self.seed}/order/{cycle}").shuffle(order)
            self._order = (cycle, order)
        return self._order[1][place]

    @staticmethod
    def _chat_only(writer: _Writer, count: int) -> None:
        if writer.rng.random() < 0.3:
            writer.chat("hello")
        while len(writer.turns) < count:
            ends = 0 < len(writer.turns) == count - 1
            writer.chat("thanks" if ends and writer.rng.random() < 0.5 else "talk")

    @staticmethod
    def _independent(writer: _Writer, lead: Clip, count: int) -> None:
        writer.find(lead)
        while len(writer.turns) < count:
            if writer.rng.random() < 0.15:
                writer.chat()
            else:
                writer.find(writer.another())

    @staticmethod
    def _dependent(writer: _Writer, lead: Clip, count: int) -> None:
        clip = lead
        while len(writer.turns) < count:
            writer.find(clip)
            for kind, share in CYCLE:
                if len(writer.turns) == count or writer.rng.random() >= share:
                    continue
                if kind == "locate":
                    writer.locate()
                elif kind == "chat":
                    ends = len(writer.turns) == count - 1
                    writer.chat("thanks" if ends and writer.rng.random() < 0.5 else "talk")
                elif writer.change(kind) and len(writer.turns) < count and writer.rng.random() < 0.3:
                    writer.locate()
            clip = writer.another()


def compose(
    clips: Iterable[Clip],
    *,
    seed: int,
    num_interactions: int | None = None,
    repeats: int = 1,
    num_candidates: int = 10,
    zh_share: float = 0.5,
    miss_share: float = 0.0,
    chat_share: float = 0.05,
    independent_share: float = 0.03,
    name: str = "dialogue",
) -> Iterator[dict[str, Any]]:
    """Composes raw dialogues, one after the other.

    Dialogue i depends on the clips, the seed and the shares only, not on how many are asked for (the last one is
    cut where `num_interactions` is reached).

    Args:
      clips: in any order; all of them serve as candidates, those with captions also as answers.
      seed: of every choice.
      num_interactions: how many questions (each with its answer) to write in all.
      repeats: where `num_interactions` is None, how many dialogues begin with each captioned clip.
      num_candidates: videos listed in a search, fewer where a split has fewer.
      zh_share: share of dialogues in Chinese among those whose first clip has captions in both languages.
      miss_share: share of searches whose list lacks the truth; the answer then says so and names no video.
      chat_share: dialogues of chat alone, as a share of the number of the others.
      independent_share: share of the longer dialogues whose turns have nothing to do with each other.
      name: what ids begin with; make it unique where several files are joined.

    Raises:
      ValueError: for a number out of its range, a clip given twice, or no captioned clip at all.
    """
    numbers = {"num_interactions": num_interactions, "repeats": repeats, "num_candidates": num_candidates}
    for what, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{what}={number}: expected at least 1")
    shares = {"zh_share": zh_share, "miss_share": miss_share, "chat_share": chat_share}
    for what, share in {**shares, "independent_share": independent_share}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{what}={share}: expected a share between 0 and 1")
    shared = (seed, num_candidates, zh_share, miss_share, chat_share, independent_share, name)
    return _Composer(Corpus(clips), *shared).stream(num_interactions, repeats)


def write_json(path: str | os.PathLike[str], dialogues: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Writes dialogues as one JSON list, a dialogue a line, as they come; the file appears when it is complete.

    Returns:
      counts: dialogues, interactions, and of these video, moment and chat.
    """
    counts = dict.fromkeys(("dialogues", "interactions", "video", "moment", "chat"), 0)
    with manifest.atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for dialogue in dialogues:
            file.write(",\n" if counts["dialogues"] else "\n")
            file.write(json.dumps(dialogue, ensure_ascii=False))
            counts["dialogues"] += 1
            for answer in dialogue["conversations"][1::2]:
                counts["interactions"] += 1
                kind = "chat" if "video_id" not in answer else "video" if answer["gt_se"] == NO_SPAN else "moment"
                counts[kind] += 1
        file.write("\n]\n")
    return counts


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_enum("format", None, captions.FORMATS, "Format of the annotations.", required=True)
    flags.DEFINE_string("annotations", None, "The annotation file.", required=True)
    flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
    flags.DEFINE_string("videos", None, "Video root: names become paths of files there, those without are left out.")
    flags.DEFINE_enum("split", "train", ["train", "validation", "test"], "Split, where the annotations do not say.")
    flags.DEFINE_integer("seed", 0, "Seed of every choice.")
    flags.DEFINE_integer("interactions", None, "Questions to write in all. Default: as --repeats gives.")
    flags.DEFINE_integer("repeats", 1, "Dialogues that begin with each video, unless --interactions is given.")
    flags.DEFINE_integer("num_candidates", 10, "Videos listed in a search.")
    flags.DEFINE_float("zh_share", 0.5, "Share of dialogues in Chinese where there are captions in both languages.")
    flags.DEFINE_float("miss_share", 0.0, "Share of searches whose list lacks the truth.")


def main(argv: Sequence[str]) -> None:
    """Annotations in, dialogues out; what was not used is listed on stderr."""
    command.refuse_arguments(argv)
    args = flags.FLAGS
    problems: list[captions.Problem] = []
    try:
        clips, problems = captions.read(args.format, args.annotations, args.split)
        if args.videos is not None:
            clips, missing = captions.resolve(clips, args.videos)
            problems += missing
        dialogues = compose(
            clips,
            seed=args.seed,
            num_interactions=args.interactions,
            repeats=args.repeats,
            num_candidates=args.num_candidates,
            zh_share=args.zh_share,
            miss_share=args.miss_share,
            name=args.format,
        )
        counts = write_json(args.out, dialogues)
    except (ValueError, OSError) as error:
        sys.exit(f"compose: {error}")
    finally:
        for problem in problems:
            print(f"{problem.row}: {problem.field}: {problem.reason}", file=sys.stderr)
        by_field = collections.Counter(problem.field for problem in problems)
        listed = "".join(f", {field} {count}" for field, count in by_field.most_common())
        print(f"{len(problems)} not used{listed}", file=sys.stderr)
    print(f"{args.out}: {len(clips)} videos, " + ", ".join(f"{n} {what}" for what, n in counts.items()))


if __name__ == "__main__":
    _define_flags()
    app.run(main)
