"""Times, lists and bars as a person would draw them by hand."""

import types

import pytest

from ivcr_jax.infer import terminal
from ivcr_jax.infer.turn import Ranked


def row(name, number, score, first, title, source, duration):
    return Ranked(name, number, score, first), types.SimpleNamespace(
        id=name, title=title, source=source, duration=duration
    )


ROWS = [
    row("b", 3, 1.5, 0.31, "切洋葱的视频", "cooking", 24.2),
    row("a", 12, -10.25, -0.05, "A dog that runs", "", 3700),
]


def test_a_list_with_wide_characters():
    assert terminal.table(ROWS, "b", 80) == [
        "   no  title            source    length   score  cosine",
        "▸   3  切洋葱的视频     cooking     0:24    1.50   0.310",
        "   12  A dog that runs           1:01:40  -10.25  -0.050",
    ]


def test_a_list_is_cut_to_the_terminal():
    # A wide character that would reach over the border leaves a column empty.
    assert terminal.table(ROWS, "a", 49) == [
        "   no  title       sour…   length   score  cosine",
        "    3  切洋葱的…   cook…     0:24    1.50   0.310",
        "▸  12  A dog tha…         1:01:40  -10.25  -0.050",
    ]
    assert terminal.table(ROWS, None, 40) == [
        "   no  title      length   score  cosine",
        "    3  切洋葱…      0:24    1.50   0.310",
        "   12  A dog t…  1:01:40  -10.25  -0.050",
    ]
    for width in range(40, 90):
        assert max(map(terminal.width_of, terminal.table(ROWS, "a", width))) <= width


def test_an_empty_list_has_its_titles():
    assert len(terminal.table([], None, 80)) == 1


@pytest.mark.parametrize(
    ("arguments", "bar", "times"),
    [
        # 24 s in 24 cells: one a second.
        ((24, 9.4, 13.1, 34), "0:00 ─────────█████────────── 0:24", "          0:09.4-0:13.1"),
        ((24, 23.9, 24, 34), "0:00 ───────────────────────█ 0:24", "                     0:23.9-0:24.0"),
        ((24, 0, 0, 34), "0:00 █─────────────────────── 0:24", "0:00.0-0:00.0"),
        # Ten cells of a tenth of a second: 0.6 to 0.7 s is one of them.
        ((1, 0.6, 0.7, 5), "0:00 ──────█─── 0:01", "     0:00.6-0:00.7"),
        # A hundred cells of a hundredth; in floats 0.29 * 100 is less than 29, and 0.55 * 100 more than 55.
        ((1, 0.29, 0.55, 110), f"0:00 {'─' * 29}{'█' * 26}{'─' * 45} 0:01", f"{' ' * 40}0:00.3-0:00.6"),
    ],
)
def test_a_moment_in_its_video(arguments, bar, times):
    assert terminal.timeline(*arguments) == [bar, times]


def test_a_bar_of_a_long_video():
    bar, times = terminal.timeline(7200, 3600, 7200, 23)
    assert (bar, times) == ("0:00 ─────█████ 2:00:00", "   1:00:00.0-2:00:00.0")


def test_times():
    shown = [terminal.clock(seconds) for seconds in (0, 9.4, 59.6, 3599.4, 3600)]
    assert shown == ["0:00", "0:09", "1:00", "59:59", "1:00:00"]
    assert [terminal.clock(seconds, 1) for seconds in (9.44, 59.97, 3661)] == ["0:09.4", "1:00.0", "1:01:01.0"]
    read = {"9.4": 9.4, "0:09.4": 9.4, "1:30": 90, "90:00": 5400, "1:02:03": 3723, "90": 90}
    assert {text: terminal.seconds_of(text) for text in read} == read
    for wrong in ("1:5", "5:", ":5", "-3", "1:75", "x", "1e3", "nan", "", "1:2:3", "٣x"):
        with pytest.raises(ValueError, match="expected a time in seconds or as m:ss"):
            terminal.seconds_of(wrong)


def test_nothing_that_a_terminal_would_obey():
    # An escape sequence, half a surrogate pair, a right-to-left override, a wide space, a joiner.
    assert terminal.printable("a\x1b[31mb\udce9\u202ec\u3000d\u200be") == "a [31mb c de"
    assert terminal.fit("视频视频", 5) == "视频…" and terminal.fit("视频视频", 6) == "视频… "
    assert terminal.fit("e\u0301", 3) == "e\u0301  " and terminal.fit("abc", 0) == ""
