"""The page of a conversation, read by the standard library's parser."""

import base64
import html.parser
import io
import re

import av
import pytest

from ivcr_jax.data.dialogue import Intent
from ivcr_jax.infer import report
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.turn import Moment, Ranked, Turn
from tests.infer.conftest import IDS

TALK = "talks/2024/a"  # 1.6 s; its six frames are those of 0.12, 0.4, 0.64, 0.92, 1.2 and 1.44 s
TIMES = ["0:00.1", "0:00.4", "0:00.6", "0:00.9", "0:01.2", "0:01.4"]
RANKING = tuple(Ranked(name, number, 1.0 - number, 0.5 / number) for number, name in enumerate(IDS[::-1], 1))


class Page(html.parser.HTMLParser):
    """Attributes: elements: (tag, attributes, depth) in order. words: the text outside style and title."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), len(self.open)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title") and data.strip():
            self.words.append(data)

    def of_class(self, name):
        return [attrs for _, attrs, _ in self.elements if name in attrs.get("class", "").split()]


@pytest.fixture(scope="module")
def corpus(indexed):
    return Corpus.open(indexed)


def times_of(corpus):
    return corpus.read(TALK).times.tolist()


def turns(corpus):
    times = times_of(corpus)
    nearest = (times[2], 0.3), (times[4], 0.2)
    search = Turn("Find a fish.", Intent.VIDEO, "en", RANKING, True, TALK, None, "It is\nvideo 1.", ((times[5], 0.3),))
    return [
        search,
        Turn("它什么时候跳？", Intent.MOMENT, "zh", RANKING, True, TALK, Moment(TALK, 0.5, 1.25, 0.4), "在 <1>。",
             nearest),
        Turn("<script>alert('x')</script> &amp; \x1b[31m", Intent.CHAT, "en", RANKING, True, TALK, None, "<b>No</b>",
             notes=("a \"note\" <i>",), timings={"read": 0.25, "write": 1.5}),
        Turn("video 3", Intent.CHAT, "en", RANKING, True, IDS[1], None, "Now we look at video 3."),
        Turn("Find a whale.", Intent.VIDEO, "en", RANKING, False, None, None, "None of them."),
        Turn("Nothing at all.", Intent.VIDEO, "en", (), False, None, None, "None."),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def written(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    report.write(path, corpus, turns(corpus))
    assert report.is_report(path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(written):
    return Page(written)


def part(written, number):
    """One turn's part of the page."""
    return Page(re.findall(r"<section.*?</section>", written, re.DOTALL)[number])


def test_it_needs_nothing_else(written, page):
    assert not re.search(r"https?:|//|@import|<script|<link|<img|\bsrc=|\bhref=", re.sub(r"base64,[^)]*", "", written))
    assert all(url.startswith("data:image/jpeg;base64,") for url in re.findall(r"url\(([^)]*)\)", written))
    assert [attrs.get("lang") for tag, attrs, _ in page.elements if tag == "html"] == ["en"]


def test_each_picture_is_there_once_and_can_be_seen(corpus, written, page):
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^)]*)\)", written)]
    assert len(pictures) == len({*pictures})
    assert {*pictures} <= {data for name in IDS for data in corpus.thumbnails(name)}
    for data in pictures:
        with av.open(io.BytesIO(data), format="mjpeg") as container:
            height = next(container.decode(video=0)).height
        assert height == (80 if data in corpus.thumbnails(IDS[0]) else 48)  # that one is upright
    defined = re.findall(r"^\.(p\d+) \{", written, re.MULTILINE)
    used = {attrs["class"].split()[1] for attrs in page.of_class("picture")}
    assert len(defined) == len(pictures) and {*defined} == used
    assert len(page.of_class("picture")) > len(pictures)  # several turns show the same


def test_what_people_and_files_say_stays_text(written, page):
    assert "<script>alert('x')</script> &amp;  [31m" in page.words
    assert "<b>No</b>" in page.words and 'a "note" <i>' in page.words and "在 <1>。" in page.words
    assert "It is\nvideo 1." in page.words
    assert not {tag for tag, _, _ in page.elements} & {"script", "iframe", "object", "form"}


def test_languages_are_named(written):
    for number, language in ((0, "en"), (1, "zh")):
        found = part(written, number)
        assert [found.of_class(name)[0]["lang"] for name in ("message", "answer")] == [language] * 2


def test_a_search_shows_its_list_and_what_was_chosen(written):
    found = part(written, 0)
    cards = found.of_class("card")
    assert [card["class"] for card in cards] == ["card wide chosen", "card", "card", "card"]
    assert [word for word in found.words if word.isdecimal()] == ["1", "2", "3", "4"]
    # The rank head's scores 0, -1, -2, -3 as parts of one, and cosines 1/2, 1/4, 1/6, 1/8.
    bars = [attrs["style"] for tag, attrs, _ in found.elements if tag == "i"]
    widths = (64.4, 50.0, 23.7, 25.0, 8.7, 16.7, 3.2, 12.5)
    assert bars == [f"width:{width}%" for width in widths]
    assert len(part(written, 4).of_class("chosen")) == 0 and len(part(written, 4).of_class("card")) == 4
    assert part(written, 5).of_class("card") == []


def captions(found, kind):
    """What stands below the frames of a kind."""
    figures = re.findall(r'<figure class="([^"]*)">.*?<figcaption>(.*?)</figcaption>', found)
    return [text for classes, text in figures if kind in classes.split()]


def test_the_frames_of_a_moment(written):
    text = re.findall(r"<section.*?</section>", written, re.DOTALL)[1]
    assert captions(text, "inside") == ["&#9670; 0:00.6", "0:00.9", "&#9670; 0:01.2"]
    assert captions(text, "outside") == ["0:00.1", "0:00.4", "0:01.4"]
    assert captions(text, "evidence") == ["&#9670; 0:00.6", "&#9670; 0:01.2"]
    bar = next(attrs for tag, attrs, _ in Page(text).elements if tag == "i")
    assert bar["style"] == "left:31.25%;width:46.88%"  # 0.5 and 0.75 s of 1.6 s
    assert "0:00.5-0:01.2" in text and "expected IoU 0.40" in text
    labels = re.findall(r'<span style="left:([0-9.]+)%">([^<]*)<', text)
    # Every half second would be four labels, every fifth of one nine: too many.
    assert labels == [("0.00", "0:00"), ("31.25", "0:00.5"), ("62.50", "0:01")]


def test_another_video_is_shown_when_it_becomes_the_current_one(written):
    assert part(written, 2).of_class("card") == []
    assert [card["class"] for card in part(written, 3).of_class("card")] == ["card wide chosen"]


def test_notes_and_timings(written):
    found = part(written, 2)
    assert len(found.of_class("note")) == 1 and "read 0.25 s, write 1.50 s" in found.words
    assert part(written, 3).of_class("timings") == []


def test_a_note_of_the_whole(corpus, tmp_path):
    for note in ("", "All <b>known</b>."):
        report.write(tmp_path / "page.html", corpus, turns(corpus)[2:3], note)
        page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
        assert len(page.of_class("note")) == (2 if note else 1) and note in " ".join(page.words)


def test_an_unknown_video_leaves_no_file(corpus, tmp_path):
    other = tmp_path / "other.html"
    other.write_text("<html>mine")
    assert not report.is_report(other)
    with pytest.raises(ValueError, match="found no video 'whale'"):
        report.write(other, corpus, [Turn("x", Intent.VIDEO, "en", (Ranked("whale", 1, 0.0, 0.0),))])
    assert [path.name for path in tmp_path.iterdir()] == ["other.html"] and other.read_text() == "<html>mine"


def test_frames_are_chosen_in_equal_steps():
    assert report.some_frames(5, [], 8) == [0, 1, 2, 3, 4]
    assert report.some_frames(1, [0], 8) == [0]
    assert report.some_frames(22, [], 8) == [0, 3, 6, 9, 12, 15, 18, 21]
    # Of frames in equal steps, those that stand next to one that is wanted give way.
    assert report.some_frames(22, [4, 10, 4], 8) == [0, 4, 6, 10, 12, 15, 18, 21]
    assert report.some_frames(100, [50, 51, 52, 53], 4) == [50, 51, 52, 53]
    for frames in range(1, 40):
        found = report.some_frames(frames, [frames // 2], 8)
        assert len(found) == min(frames, 8) == len({*found}) and frames // 2 in found


@pytest.mark.parametrize(
    ("duration", "expected"),
    [(24, [0, 5, 10, 15, 20]), (6.2, [0, 1, 2, 3, 4, 5, 6]), (0.04, [0]), (3600, [*range(0, 3601, 600)])],
)
def test_ticks_are_round(duration, expected):
    assert report.ticks(duration) == expected
