"""A conversation as one HTML page that needs nothing else: no script, no other file, no network.

It is readable on a phone, on paper, in light and in dark. A picture that is shown in several places is in the page
once, as the background of a class.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence

from etils import epath

from ivcr_jax.data import manifest
from ivcr_jax.data.dialogue import Intent, language_of
from ivcr_jax.infer.corpus import Corpus, Video
from ivcr_jax.infer.terminal import clock, printable
from ivcr_jax.infer.turn import Ranked, Turn

CARD_FRAMES, MOMENT_FRAMES = 4, 8  # of a candidate, and at most of the video that was chosen
_HEAD = b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="generator" content="ivcr_jax">'
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400)  # seconds apart
_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f4; --card: #fff; --ink: #1c1c1a; --pale: #6a6a66; --line: #d9d9d4;
  --mark: #0a6cc4; --found: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --card: #20201f; --ink: #ecece8; --pale: #a3a39d;
  --line: #3a3a37; --mark: #6cb4f5; --found: #ff9a5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.4rem; margin: 0; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: .4rem 0; }
.pale, .timings, figcaption, .ticks { color: var(--pale); font-size: .8rem; }
.turn { margin: 2rem 0; }
.message { width: fit-content; max-width: 85%; margin-left: auto; padding: .5rem .9rem; border-radius: 1rem;
  background: var(--mark); color: var(--page); overflow-wrap: anywhere; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; }
.note { border-left: .25rem solid var(--found); padding-left: .6rem; }
.cards { list-style: none; margin: .8rem 0; padding: 0; display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .7rem; min-width: 0;
  break-inside: avoid; }
.card.chosen { border: 2px solid var(--mark); }
.card.wide { grid-column: 1 / -1; }
.chosen h2::before { content: "\\25b8 "; color: var(--mark); }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: .3rem; margin: .5rem 0; }
.wide .strip { grid-template-columns: repeat(8, 1fr); }
figure { margin: 0; min-width: 0; }
figcaption { text-align: center; font-size: .7rem; white-space: nowrap; overflow: hidden; }
.picture { display: block; width: 100%; border-radius: .2rem; background-size: cover; background-position: center; }
.outside .picture { opacity: .35; }
.inside .picture { outline: 3px solid var(--found); outline-offset: -1px; }
.evidence figcaption { color: var(--found); font-weight: bold; }
.score { display: grid; grid-template-columns: 4rem 1fr 3.6rem; gap: .5rem; align-items: center; font-size: .8rem; }
.score b { text-align: right; font-weight: normal; font-variant-numeric: tabular-nums; }
.bar { height: .5rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--mark); }
.timeline { position: relative; height: .8rem; border-radius: .4rem; background: var(--line); margin-top: .8rem;
  overflow: hidden; }
.timeline i { position: absolute; top: 0; bottom: 0; min-width: 3px; border-radius: .2rem; background: var(--found); }
.ticks { position: relative; height: 1.4rem; overflow: hidden; }
.ticks span { position: absolute; padding-left: .2rem; border-left: 1px solid var(--pale); line-height: 1.2; }
@media (max-width: 40rem) { .wide .strip { grid-template-columns: repeat(4, 1fr); } }
@media print { body { max-width: none; } .message, .timeline, .moment { break-inside: avoid; } }
.message, .picture, .bar, .bar i, .timeline, .timeline i { -webkit-print-color-adjust: exact;
  print-color-adjust: exact; }
"""


def write(path: epath.PathLike, corpus: Corpus, turns: Sequence[Turn], note: str = "") -> None:
    """Writes the page of a conversation, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      corpus: that the conversation was with.
      turns: of the conversation.
      note: what else its readers should know.

    Raises:
      ValueError: a turn names a video that the corpus has not.
      CorpusError: a video's record cannot be read.
      OSError: the file cannot be written.
    """
    page = _Page(corpus)
    current: str | None = None
    sections = []
    for number, turn in enumerate(turns, 1):
        sections.append(page.turn(number, turn, current))
        current = turn.video
    title = f"A conversation with {len(corpus.videos)} videos"
    parts = [
        _HEAD.decode(),
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>",
        f"<style>{_STYLE}{page.classes()}</style>",
        "</head>",
        f"<body>\n<h1>{title}</h1>",
        f'<p class="pale">{len(turns)} turns; the corpus was made with the export {_text(corpus.fingerprint[:12])}. '
        "&#9670; marks the frames nearest to the words, a frame around a picture those within the moment.</p>",
        *([f'<p class="note">{_text(note)}</p>'] if note else []),
        *sections,
        "</body>\n</html>\n",
    ]
    with manifest.atomic(path) as aside:
        aside.write_bytes("\n".join(parts).encode())


def is_report(path: epath.PathLike) -> bool:
    """Whether a file is one that `write` wrote, by how it begins."""
    with epath.Path(path).open("rb") as file:
        return file.read(len(_HEAD)) == _HEAD


def some_frames(frames: int, wanted: Iterable[int], most: int) -> list[int]:
    """At most so many of a video's frames, in order: those wanted first, others in equal steps between them.

    Args:
      frames: how many there are.
      wanted: numbers of frames, the most important first.
      most: how many to choose, at least 2.
    """
    chosen = list(dict.fromkeys(wanted))[:most]
    steps = min(most, frames)
    even = {round(i * (frames - 1) / max(steps - 1, 1)) for i in range(steps)} - {*chosen}
    while len(chosen) < steps:
        # Of those left, the one that is farthest from all that are shown.
        left = sorted(even or {*range(frames)} - {*chosen})
        best = max(left, key=lambda frame: min((abs(frame - other) for other in chosen), default=0))
        chosen.append(best)
        even.discard(best)
    return sorted(chosen)


def ticks(duration: float) -> list[float]:
    """Seconds at which a bar of a video of so many seconds is labelled: at most seven round ones, 0 the first."""
    step = next((step for step in _TICKS if duration / step < 6.5), duration / 6)
    return [step * i for i in range(int(duration / step) + 1)] if step > 0 else [0.0]


class _Page:
    """Collects the pictures that the parts of the page need."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._pictures: dict[bytes, str] = {}
        self._frames: dict[str, tuple[list[float], list[bytes]]] = {}

    def classes(self) -> str:
        """A class for each picture."""
        return "".join(
            f".{name} {{ background-image: url(data:image/jpeg;base64,{base64.b64encode(data).decode()}); }}\n"
            for data, name in self._pictures.items()
        )

    def turn(self, number: int, turn: Turn, before: str | None) -> str:
        """A turn. `before` is the current video until then."""
        parts = [
            f'<p class="message" lang="{turn.language}">{_text(turn.message)}</p>',
            f'<p class="answer" lang="{turn.language}">{_lines(turn.text)}</p>',
        ]
        if turn.intent == Intent.VIDEO:
            parts.append(self._cards(turn))
        elif turn.moment is not None:
            parts.append(self._moment(turn))
        elif turn.video is not None and turn.video != before:
            video = self._corpus.video(turn.video)
            parts.append(f'<div class="card wide chosen">{self._heading(video)}{self._strip(video)}</div>')
        parts += [f'<p class="note">{_text(note)}</p>' for note in turn.notes]
        if turn.timings:
            spent = ", ".join(f"{_text(stage)} {seconds:.2f} s" for stage, seconds in turn.timings.items())
            parts.append(f'<p class="timings">{spent}</p>')
        return f'<section class="turn" id="turn-{number}">\n' + "\n".join(filter(None, parts)) + "\n</section>"

    def _cards(self, turn: Turn) -> str:
        # As parts of one: the rank head's scores have no scale of their own.
        highest = max((ranked.score for ranked in turn.ranking), default=0.0)
        parts = [math.exp(ranked.score - highest) for ranked in turn.ranking]
        cards = [self._card(ranked, part / sum(parts), turn) for ranked, part in zip(turn.ranking, parts, strict=True)]
        return '<ol class="cards">\n' + "\n".join(cards) + "\n</ol>" if cards else ""

    def _card(self, ranked: Ranked, part: float, turn: Turn) -> str:
        video, chosen = self._corpus.video(ranked.id), ranked.id == turn.video
        scores = _score("rank", part, f"{ranked.score:.2f}") + _score("cosine", ranked.first, f"{ranked.first:.3f}")
        evidence = [time for time, _ in turn.evidence] if chosen else []
        strip = self._strip(video, evidence, most=MOMENT_FRAMES if chosen else CARD_FRAMES)
        kind = "card wide chosen" if chosen else "card"
        return f'<li class="{kind}">{self._heading(video, ranked.number)}{strip}{scores}</li>'

    def _moment(self, turn: Turn) -> str:
        assert turn.moment is not None
        moment, video = turn.moment, self._corpus.video(turn.moment.video)
        span = moment.start, moment.end
        left, right = (min(100 * time / (video.duration or 1.0), 100.0) for time in span)
        labels = "".join(
            f'<span style="left:{100 * tick / (video.duration or 1.0):.2f}%">{clock(tick, 0 if tick % 1 == 0 else 1)}'
            "</span>"
            for tick in ticks(video.duration)
            if tick <= 0.92 * video.duration  # a label begins at its tick and would be cut off at the end
        )
        strip = self._strip(video, [time for time, _ in turn.evidence], span)
        return (
            f'<div class="card wide moment">{self._heading(video)}{strip}'
            f'<div class="timeline"><i style="left:{left:.2f}%;width:{right - left:.2f}%"></i></div>'
            f'<div class="ticks">{labels}</div>'
            f"<p><b>{clock(moment.start, 1)}-{clock(moment.end, 1)}</b> "
            f'<span class="pale">expected IoU {moment.score:.2f}</span></p></div>'
        )

    def _heading(self, video: Video, number: int | None = None) -> str:
        before = "" if number is None else f'<span class="pale">{number}</span> '
        parts = [video.source, clock(video.duration), video.path]
        shown = " &middot; ".join(_text(part) for part in parts if part)
        title = f'<span lang="{language_of(video.title)}">{_text(video.title)}</span>'
        return f'<h2>{before}{title}</h2><div class="pale">{shown}</div>'

    def _strip(
        self,
        video: Video,
        evidence: Sequence[float] = (),
        span: tuple[float, float] | None = None,
        most: int = MOMENT_FRAMES,
    ) -> str:
        if video.id not in self._frames:
            self._frames[video.id] = self._corpus.read(video.id).times.tolist(), self._corpus.thumbnails(video.id)
        times, thumbnails = self._frames[video.id]
        nearest = [i for i, time in enumerate(times) if time in evidence]
        inside = [i for i, time in enumerate(times) if span and span[0] <= time <= span[1]]
        figures = []
        for i in some_frames(len(times), [*nearest, *inside[:1], *inside[-1:]], most):
            kinds = ["evidence"] if i in nearest else []
            if span is not None:
                kinds.append("inside" if i in inside else "outside")
            name = self._pictures.setdefault(thumbnails[i], f"p{len(self._pictures)}")
            when = clock(times[i], 1)
            caption = f"&#9670; {when}" if i in nearest else when
            opening = f'<figure class="{" ".join(kinds)}">' if kinds else "<figure>"
            figures.append(
                f'{opening}<span class="picture {name}" style="aspect-ratio:{video.width}/{video.height}" role="img" '
                f'aria-label="{_text(video.title)} at {when}"></span><figcaption>{caption}</figcaption></figure>'
            )
        return f'<div class="strip">{"".join(figures)}</div>'


def _score(name: str, part: float, shown: str) -> str:
    width = 100 * min(max(part, 0.0), 1.0)
    bar = f'<div class="bar"><i style="width:{width:.1f}%"></i></div>'
    return f'<div class="score"><span>{name}</span>{bar}<b>{shown}</b></div>'


def _text(text: str) -> str:
    return html.escape(printable(text))


def _lines(text: str) -> str:
    return "\n".join(_text(line) for line in text.split("\n"))
