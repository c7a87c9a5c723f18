"""A synthetic source of any size: videos of moving shapes, their truth, and dialogues about them in two languages.

It invents scenes in families (a base and edits of one attribute each), says what they show, and hands clips to the
composer. It must not know how pictures are drawn or encoded, nor how dialogues are worded.
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import app, flags

from ivcr_jax import command
from ivcr_jax.data import compose, manifest, scenes
from ivcr_jax.data.captions import Clip, Moment
from ivcr_jax.data.scenes import CODECS, COLOURS, EVENTS, MOTIONS, SHAPES, SIZES, Scene, Thing

CORPORA = ("Aster", "Birch", "Cedar", "Dune")
CODEC_SHARES = {"h264": 0.64, "mpeg4": 0.18, "vp9": 0.08, "hevc": 0.1}
# Raise when the same parameters would no longer give the same pictures.
DRAWING = 2

ATTRIBUTES = ("colour", "shape", "size", "motion", "event")
FAMILY = 5  # videos: a base and four edits
# One family in five is of the test split, every other one of these is built on a triple kept out of train; one in
# twenty is of validation. A split that shares families with train does not show what a recipe fails to teach.
TEST_EVERY, NOVEL_EVERY, VALIDATION_EVERY = 5, 10, 20
Triple = tuple[str, str, str]
HELD_OUT = 15  # of the 120 triples (colour, shape, motion)


@dataclasses.dataclass(frozen=True)
class Video:
    """A synthetic video: its path below the video root, where it belongs, and what it shows.

    `edit` is the attribute in which its first thing differs from the family's base, "" for the base itself.
    `held_out`: it shows a (colour, shape, motion) that no video of train shows.
    """

    path: str
    split: str
    family: int
    edit: str
    held_out: bool
    codec: str
    scene: Scene


def held_out_triples(seed: int) -> tuple[Triple, ...]:
    """The (colour, shape, motion) triples that train never shows."""
    every = sorted(itertools.product(COLOURS, SHAPES, MOTIONS))
    return tuple(random.Random(f"{seed}/held out").sample(every, HELD_OUT))


def triples(thing: Thing) -> set[Triple]:
    """The (colour, shape, motion) that a thing shows in the course of the clip."""
    return {(colour, thing.shape, thing.motion) for colour in (thing.colour, thing.second) if colour}


def _fits(things: Sequence[Thing], avoid: Collection[Triple]) -> bool:
    """Whether a scene can be told apart in words, and shows nothing that is to be avoided."""
    looks = [(colour, thing.shape) for thing in things for colour in (thing.colour, thing.second) if colour]
    return (
        len(looks) == len(set(looks))
        and all(thing.motion != "still" or thing.event not in ("pauses", "starts") for thing in things)
        and not any(triple in avoid for thing in things for triple in triples(thing))
    )


def _thing(rng: random.Random, duration: float, corner: int | None, base: Triple | None) -> Thing:
    """A random thing: the scene's main one in the middle, or, with a corner (0 to 3), a small one there."""
    colour, shape, motion = base or (rng.choice([*COLOURS]), rng.choice(SHAPES), rng.choice(MOTIONS))
    event = rng.choice(EVENTS)
    second = rng.choice([other for other in COLOURS if other != colour])
    # Short and anywhere: were they long and central, answering always the same span would seem to be right.
    length = rng.uniform(0.15, 0.4) * duration
    start = rng.uniform(0, duration - length)
    middle = (round(rng.uniform(0.44, 0.56), 3), round(rng.uniform(0.44, 0.56), 3))
    return Thing(
        colour=colour,
        shape=shape,
        size=rng.choice([*SIZES]) if corner is None else "small",
        motion=motion,
        event=event,
        start=round(start, 1),
        end=min(round(start + length, 1), duration),
        second=second if event == "recolours" else "",
        home=middle if corner is None else (0.27 + 0.46 * (corner % 2), 0.27 + 0.46 * (corner // 2)),
        reach=0.22 if corner is None else 0.13,
        phase=round(rng.uniform(0, 2 * math.pi), 3),
    )


def _edits(thing: Thing, attribute: str) -> list[Thing]:
    """Every thing that differs from this one in that attribute alone."""
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "motion": MOTIONS, "event": EVENTS}[attribute]
    edited = []
    for value in values:
        if value == getattr(thing, attribute):
            continue
        changes: dict[str, Any] = {attribute: value, "second": ""}
        other = dataclasses.replace(thing, **changes)
        seconds = [colour for colour in COLOURS if colour != other.colour] if other.event == "recolours" else [""]
        if thing.second:
            seconds = [second for second in seconds if second in ("", thing.second)]
        edited += [dataclasses.replace(other, second=second) for second in seconds]
    return edited


def _family(
    rng: random.Random, duration: float, base: Triple | None, avoid: Collection[Triple]
) -> list[tuple[str, tuple[Thing, ...]]]:
    """(edited attribute, things) of a family's videos, the base first."""
    while True:
        count = rng.choices((1, 2, 3), (45, 35, 20))[0]
        main = _thing(rng, duration, None, base)
        rest = tuple(_thing(rng, duration, corner, None) for corner in rng.sample(range(4), count - 1))
        if not _fits((main, *rest), avoid):
            continue
        members = [("", (main, *rest))]
        for attribute in rng.sample(ATTRIBUTES, len(ATTRIBUTES)):
            fitting = [edit for edit in _edits(main, attribute) if _fits((edit, *rest), avoid)]
            if fitting:
                members.append((attribute, (rng.choice(fitting), *rest)))
        if len(members) >= FAMILY:
            return members[:FAMILY]


def invent(count: int, *, seed: int, size: tuple[int, int], fps: int, seconds: float) -> Iterator[Video]:
    """Yields `count` videos, family after family; a greater count has the same videos first.

    Args:
      count: videos.
      seed: of every choice.
      size: width and height, pixels.
      fps: frames per second.
      seconds: mean duration; durations lie within 40 % of it.
    """
    kept_out = held_out_triples(seed)
    made = 0
    for family in itertools.count():
        rng = random.Random(f"{seed}/family/{family}")
        corpus = rng.choice(CORPORA)
        frames = round(seconds * rng.uniform(0.6, 1.4) * fps)
        background = rng.randrange(2**32)
        held = "validation" if family % VALIDATION_EVERY == 2 else "train"
        split = "test" if family % TEST_EVERY == 1 else held
        novel = family % NOVEL_EVERY == 1
        base = kept_out[family // NOVEL_EVERY % HELD_OUT] if novel else None
        for edit, things in _family(rng, frames / fps, base, () if novel else kept_out):
            if made == count:
                return
            codec = rng.choices([*CODEC_SHARES], [*CODEC_SHARES.values()])[0]
            yield Video(
                path=f"{corpus}/{made:06d}{CODECS[codec].suffix}",
                split=split,
                family=family,
                edit=edit,
                held_out=any(triple in kept_out for thing in things for triple in triples(thing)),
                codec=scenes.codec_for(codec, *size),
                scene=Scene(things, *size, fps, frames, background),
            )
            made += 1


# What is said of a thing: {x} its name, {m} its motion, {c} its second colour.
_EN = {
    "still": "stays still",
    "sideways": "slides from side to side",
    "vertical": "moves up and down",
    "loop": "travels in a loop",
    "diagonal": "moves back and forth diagonally",
    "tell": {
        "appears": "A {x} comes into view, {m} and leaves again.",
        "leaves": "A {x} {m}, leaves the picture and comes back.",
        "recolours": "A {x} {m} and turns {c} for a while.",
        "pauses": "A {x} {m} and stops for a while in between.",
        "starts": "A {x} rests at first, then {m} for a while and stops again.",
    },
    "tell again": {
        "appears": "A scene with a {x} that {m} and is in view only for a while.",
        "leaves": "A scene with a {x} that {m} and is out of view for a while.",
        "recolours": "A scene with a {x} that {m} and is {c} for a while.",
        "pauses": "A scene with a {x} that {m} but rests for a while.",
        "starts": "A scene with a {x} that {m}, but only for a while in the middle.",
    },
    "moment": {
        "appears": "The {x} is in view.",
        "leaves": "The {x} is out of view.",
        "recolours": "The {x} has turned {c}.",
        "pauses": "The {x} has stopped moving.",
        "starts": "The {x} is on the move.",
    },
    "event": {
        "appears": "is in view only for a while",
        "leaves": "is out of view for a while",
        "recolours": "turns {c} for a while",
        "pauses": "stops for a while in between",
        "starts": "moves only for a while",
    },
}
_ZH = {
    "red": "红色",
    "green": "绿色",
    "blue": "蓝色",
    "yellow": "黄色",
    "purple": "紫色",
    "white": "白色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "cross": "十字形",
    "large": "大",
    "small": "小",
    "still": "停在原地不动",
    "sideways": "左右来回移动",
    "vertical": "上下来回移动",
    "loop": "绕着圈移动",
    "diagonal": "沿对角线来回移动",
    "tell": {
        "appears": "一个{x}中途出现，{m}，然后又离开。",
        "leaves": "一个{x}{m}，中途离开画面，之后又回来。",
        "recolours": "一个{x}{m}，中途有一会儿变成{c}。",
        "pauses": "一个{x}{m}，中途停下来一会儿。",
        "starts": "一个{x}起初静止，中途{m}，随后又停下。",
    },
    "tell again": {
        "appears": "画面中有一个{x}，它{m}，只出现了一会儿。",
        "leaves": "画面中有一个{x}，它{m}，有一会儿不在画面里。",
        "recolours": "画面中有一个{x}，它{m}，有一会儿是{c}的。",
        "pauses": "画面中有一个{x}，它{m}，但中间停了一会儿。",
        "starts": "画面中有一个{x}，它只在中间一段时间里{m}。",
    },
    "moment": {
        "appears": "{x}出现在画面里。",
        "leaves": "{x}不在画面里。",
        "recolours": "{x}变成了{c}。",
        "pauses": "{x}停住不动。",
        "starts": "{x}正在移动。",
    },
    "event": {
        "appears": "只出现一会儿",
        "leaves": "中途离开一会儿",
        "recolours": "中途有一会儿变成{c}",
        "pauses": "中途停一会儿",
        "starts": "只移动一会儿",
    },
}
_WORDS: dict[str, Mapping[str, Any]] = {"en": _EN, "zh": _ZH}


def _name(thing: Thing, language: str, attributes: Collection[str] = ("colour", "size")) -> str:
    """What a thing is called, by its shape and these attributes: "large red circle"."""
    words = _WORDS[language]
    colour, size, shape = (words.get(value, value) for value in (thing.colour, thing.size, thing.shape))
    colour, size = colour if "colour" in attributes else "", size if "size" in attributes else ""
    if language == "zh":
        return f"{colour}{'的' if colour and size else ''}{size}{shape}"
    return " ".join(filter(None, (size, colour, shape)))


def _say(thing: Thing, language: str, how: str) -> str:
    words = _WORDS[language]
    second = words.get(thing.second, thing.second)
    return words[how][thing.event].format(x=_name(thing, language), m=words[thing.motion], c=second)


def _captions(scene: Scene, language: str) -> tuple[str, ...]:
    """Sentences about a scene. Each tells all attributes of the main thing, so all tell a family's videos apart."""
    main, *rest = scene.things
    told = [_say(main, language, "tell"), _say(main, language, "tell again")]
    if rest and language == "zh":
        told.append(told[0] + "画面里还有" + "和".join(f"一个{_name(thing, 'zh')}" for thing in rest) + "。")
    elif rest:
        others = " and ".join(f"a {_name(thing, 'en')}" for thing in rest)
        told.append(f"{told[0]} There {'is' if len(rest) == 1 else 'are'} also {others}.")
    return tuple(told)


def _request(here: Scene, there: Scene, language: str) -> str:
    """How to ask for a scene of the same family: a noun phrase that says what is different there."""
    words = _WORDS[language]
    old, new = here.things[0], there.things[0]
    changed = [a for a in ATTRIBUTES if getattr(old, a) != getattr(new, a)]
    looks = [a for a in changed if a in ("colour", "size", "shape")]
    alike = any(thing.shape == old.shape for thing in here.things[1:])
    before = _name(old, language, {*looks, "colour"} if alike else looks)
    acts = []
    if "motion" in changed:
        acts.append(words[new.motion])
    if "event" in changed:
        acts.append(words["event"][new.event].format(c=words.get(new.second, new.second)))
    after = _name(new, language, looks)
    if language == "zh":
        said = f"{before}换成了{after}" if looks else before + "、".join(acts)
        return f"画面一样、但{said}{'、而且它' + '、'.join(acts) if looks and acts else ''}的视频"
    act = " and ".join(acts)
    if not looks:
        return f"the same but where the {before} {act}"
    return f"the same but with a {after} instead of the {before}" + (f", and it {act}" if acts else "")


def clips_of(videos: Sequence[Video]) -> Iterator[Clip]:
    """The captioned clips of videos; those of a family name each other as near and similar."""
    languages = tuple(_WORDS)
    for _, group in itertools.groupby(videos, key=lambda video: video.family):
        family = list(group)
        for video in family:
            others = [other for other in family if other is not video]
            moments = [
                Moment(thing.start, thing.end, {lang: _say(thing, lang, "moment") for lang in languages})
                for thing in video.scene.things
            ]
            yield Clip(
                video=video.path,
                split=video.split,
                duration=video.scene.duration,
                captions={lang: _captions(video.scene, lang) for lang in languages},
                moments=tuple(sorted(moments, key=lambda moment: moment.start)),
                similar=tuple(
                    (other.path, {lang: _request(video.scene, other.scene, lang) for lang in languages})
                    for other in others
                ),
                near=tuple(other.path for other in others),
            )


def _truth(video: Video) -> dict[str, Any]:
    scene = dataclasses.asdict(video.scene)
    things = scene.pop("things")
    row = {**dataclasses.asdict(video), **scene, "duration": video.scene.duration, "objects": things}
    del row["scene"]
    return {"video": row.pop("path"), **row}


def _stamp(out: pathlib.Path, stamp: dict[str, Any]) -> None:
    """Files that exist are not drawn again, so a folder holds videos of one set of parameters only."""
    path = out / "synth.json"
    if path.exists() and (found := json.loads(path.read_text())) != stamp:
        raise ValueError(f"{out} holds videos of {found}, not of {stamp}: choose another folder or empty it")
    path.write_text(json.dumps(stamp) + "\n")


def generate(
    out: str | os.PathLike[str],
    *,
    videos: int,
    interactions: int,
    size: tuple[int, int] = (48, 48),
    fps: int = 8,
    seconds: float = 12.0,
    seed: int = 0,
    render: bool = True,
    num_candidates: int = 10,
    zh_share: float = 0.5,
    workers: int | None = None,
) -> dict[str, int]:
    """Writes OUT/IVCR-200K.json, OUT/truth.jsonl and OUT/videos/<corpus>/<name>.<ext>.

    Video files that exist are kept. The JSON is written last: where it is, everything is.

    Args:
      out: the folder.
      videos: how many; `invent` says more of them.
      interactions: how many questions with their answers.
      size: width and height, pixels, even and at least 32.
      fps: frames per second, at least 2.
      seconds: mean duration, at least 2.
      seed: of everything.
      render: False to write no video files.
      num_candidates, zh_share: see `compose.compose`.
      workers: processes that draw; None for as many as the work and the cores suggest.

    Returns:
      the counts of `compose.write_json`, and `videos` and `rendered`.

    Raises:
      ValueError: for a number out of its range, or a folder that holds videos drawn with other parameters.
      RuntimeError: where PyAV lacks an encoder that is needed.
    """
    if any(side % 2 or side < 32 for side in size):
        raise ValueError(f"size {size[0]}x{size[1]}: both sides must be even and at least 32 pixels")
    if videos < 1 or fps < 2 or seconds < 2:
        raise ValueError(f"videos={videos}, fps={fps}, seconds={seconds}: expected at least 1, 2 and 2")
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _stamp(out, {"drawing": DRAWING, "seed": seed, "size": list(size), "fps": fps, "seconds": seconds})
    made = list(invent(videos, seed=seed, size=size, fps=fps, seconds=seconds))
    rendered = 0
    if render:
        lacking = {CODECS[video.codec].encoder for video in made}.intersection(scenes.missing_encoders())
        if lacking:
            raise RuntimeError(f"this build of PyAV cannot encode with {', '.join(sorted(lacking))}")
        jobs = [(video.scene, video.codec, str(out / "videos" / video.path)) for video in made]
        rendered = scenes.render(jobs, workers)
    with manifest.atomic(out / "truth.jsonl") as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(_truth(video)) + "\n" for video in made)
    dialogues = compose.compose(
        clips_of(made),
        seed=seed,
        num_interactions=interactions,
        num_candidates=num_candidates,
        zh_share=zh_share,
        name="synth",
    )
    counts = compose.write_json(out / "IVCR-200K.json", dialogues)
    return {"videos": len(made), "rendered": rendered, **counts}


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_string("out", None, "Folder to write to.", required=True)
    flags.DEFINE_integer("videos", None, "Number of videos.", required=True, lower_bound=1)
    flags.DEFINE_integer("interactions", None, "Number of questions.", required=True, lower_bound=1)
    flags.DEFINE_list("size", ["48", "48"], "Width and height in pixels.")
    flags.DEFINE_integer("fps", 8, "Frames per second.")
    flags.DEFINE_float("seconds", 12.0, "Mean duration.")
    flags.DEFINE_integer("seed", 0, "Seed of everything.")
    flags.DEFINE_integer("num_candidates", 10, "Videos listed in a search.")
    flags.DEFINE_bool("no_render", False, "Write no video files.")


def main(argv: Sequence[str]) -> None:
    """Writes a synthetic source and says what it holds."""
    command.refuse_arguments(argv)
    args = flags.FLAGS
    started = time.monotonic()
    try:
        if len(args.size) != 2 or not all(side.isdigit() for side in args.size):
            raise ValueError(f"--size={','.join(args.size)}: expected width,height in pixels")
        width, height = map(int, args.size)
        counts = generate(
            args.out,
            videos=args.videos,
            interactions=args.interactions,
            size=(width, height),
            fps=args.fps,
            seconds=args.seconds,
            seed=args.seed,
            render=not args.no_render,
            num_candidates=args.num_candidates,
        )
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"synth: {error}")
    listed = ", ".join(f"{number} {what}" for what, number in counts.items())
    print(f"{args.out}: {listed}, in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
