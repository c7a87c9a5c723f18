"""The report's files: what is in them, that they are the same each time, and that pictures hold what they show."""

import dataclasses
import io
import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from ivcr_jax.metrics import interactive, plots, report, summary
from ivcr_jax.metrics.interval import Cell, Comparison
from ivcr_jax.metrics.records import Problems, match
from ivcr_jax.metrics.report import Report
from ivcr_jax.metrics.summary import Bin, Summary
from tests.metrics import made_up_records as made_up

SMALL = Summary(
    {
        "latency_p50": Cell(0.25, 0.2, 0.5, 40, 9),
        "retrieval_r1": Cell(0.5, 0.25, 0.75, 40, 9),
        "success_at_3": Cell(0.125, None, None, 7, 1),
    },
    {"corpus": {"A|B": {"retrieval_r1": Cell(0.4, 0.1, 0.7, 10, 4)}, "电影": {"moment_miou": Cell(1, 1, 1, 3, 2)}}},
    (Bin(0.3, 0.4, 0.35, Cell(0.5, 0.4, 0.6, 12, 5)),),
    0.15,
)


@pytest.fixture(scope="module")
def made(fewer_resamples):
    """A report of three protocols; corpora with names that are long, alike, odd, or Chinese."""
    corpora = ("ActivityNet", "电影", "a_long_folder_1_name", "a_long_folder_2_name", r"$\frac$")
    dialogues = made_up.split(60, corpora=corpora)
    corpus = sorted({video for dialogue in dialogues for video in dialogue.videos})
    summaries, problems, pairs = {}, {}, {}
    for name, skill, pool in (("gold", 0.8, None), ("cascade", 0.5, None), ("e2e", 0.4, corpus)):
        pairs[name], problems[name] = match(dialogues, made_up.run(dialogues, skill, corpus=pool), pool)
        summaries[name] = summary.summarise(pairs[name])
    comparisons = {
        f"{first} against {second}": summary.compare(pairs[first], pairs[second])
        for first, second in (("gold", "cascade"), ("gold", "e2e"), ("cascade", "e2e"))
    }
    return Report({"Split": "test"}, summaries, problems, comparisons)


def write(folder, made):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a letter that the font lacks, a layout that does not fit
        report.write(str(folder), made)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def written(made, tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"), made)


def test_the_same_figures_give_the_same_bytes(made, written, tmp_path):
    assert {*written} == {"report.json", "report.md", *plots.NAMES}
    assert write(tmp_path / "a" / "b", made) == written


def test_all_protocols_are_in_all_pictures(written):
    text = written["report.md"].decode()
    assert [name for name in plots.NAMES if f"]({name})" in text] == [*plots.NAMES]
    for name in plots.NAMES:
        with Image.open(io.BytesIO(written[name])) as picture:
            width, height = picture.size
            colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert 400 < width < 2500 and 200 < height < 1600
        for colour in plots.COLOURS[:3]:  # each protocol is drawn, not in the legend alone
            wanted = [int(colour[place : place + 2], 16) for place in (1, 3, 5)]
            assert (colours == wanted).all(1).sum() > 400, (name, colour)


def test_a_picture_shows_what_changes(made, written, tmp_path):
    compared = dict([*made.comparisons.items()][:1])
    fewer = dataclasses.replace(made, summaries={"gold": made.summaries["gold"]}, comparisons=compared)
    second = write(tmp_path, fewer)
    assert all(written[name] != second[name] for name in plots.NAMES)


def test_json_holds_every_figure(made, written):
    found = json.loads(written["report.json"])
    assert [*found] == ["about", "protocols", "comparisons"] and [*found["protocols"]] == ["gold", "cascade", "e2e"]
    for name, each in found["protocols"].items():
        expected = dataclasses.asdict(made.summaries[name])
        assert json.loads(json.dumps(expected)) == {key: each[key] for key in expected}
        missing = made.problems[name].missing
        assert each["problems"] == {"missing": {"count": len(missing), "turns": missing}} and missing
    for name, each in made.comparisons.items():
        assert found["comparisons"][name] == {metric: dataclasses.asdict(cell) for metric, cell in each.items()}


def test_tables_by_hand(tmp_path):
    problems = Problems(missing={f"d#{n}": "no prediction" for n in range(7)}, spans={"d#9": "[nan, 2] s"})
    comparison = Comparison(-0.125, -0.2, 0.0125, 0.0421, 40, 9)
    made = Report({"Export": "1234"}, {"gold": SMALL, "e2e": Summary({}, {})}, {"gold": problems},
                  {"gold against base": {"retrieval_r1": comparison}})  # fmt: skip
    text = write(tmp_path, made)["report.md"].decode()
    for line in (
        "| Export | 1234 |",
        "|  | gold | e2e |",
        "| R@1, % | 50.0 [25.0, 75.0] (40) |  |",
        "| Latency, median, s | 0.250 [0.200, 0.500] (40) |  |",
        "| success_at_3 | 0.125 (7) |  |",
        "| corpus | R@1, % | Moment mean IoU, % |",
        "| A\\|B | 40.0 [10.0, 70.0] (10) |  |",
        "| 电影 |  | 100.0 [100.0, 100.0] (3) |",
        "| 0.3 to 0.4 | 0.350 | 0.500 [0.400, 0.600] (12) |",
        "| missing | 7 | d#0, d#1, d#2, d#3, d#4 and 2 more |",
        "| spans | 1 | d#9 |",
        "| R@1, % | -12.5 [-20.0, 1.2] | 0.0421 | 40 |",
    ):
        assert line in text.splitlines(), line
    order = [text.index(label) for label in ("| R@1, % | 50", "| Latency, median", "| success_at_3")]
    assert order == sorted(order)
    assert "](corpus.png)" in text and "](turns.png)" not in text


def test_simulated_users_by_hand(tmp_path):
    cell = Cell(0.5, 0.25, 0.75, 8, 5)
    by = {"round": {"1": {"success": cell}, "2": {"success": cell, "r1": cell}}, "language": {"zh": {"bri": cell}}}
    kinds = {"cooperative": Summary({"success": cell, "rounds": cell}, by), "terse": Summary({"success": cell}, by)}
    compared = {"cooperative against terse": {"success": Comparison(0.125, 0.0, 0.25, 0.0421, 8, 5)}}
    users = interactive.Users(kinds, compared, interactive.Problems(no_search={"d": "chat"}))
    files = write(tmp_path, Report({}, {}, {}, users=users))
    text = files["report.md"].decode()
    for line in (
        "|  | cooperative | terse |",
        "| Success, % | 50.0 [25.0, 75.0] (8) | 50.0 [25.0, 75.0] (8) |",
        "| Rounds to success, mean | 0.50 [0.25, 0.75] (8) |  |",
        "| round | user | Success, % | R@1, % |",
        "| 1 | terse | 50.0 [25.0, 75.0] (8) |  |",
        "| language | user | BRI |",
        "| zh | cooperative | 0.500 [0.250, 0.750] (8) |",
        "| Success, % | 12.5 [0.0, 25.0] | 0.0421 | 8 |",
        "| no_search | 1 | d |",
    ):
        assert line in text.splitlines(), line
    assert "](users.png)" in text and {*files} == {"report.json", "report.md", "users.png"}
    found = json.loads(files["report.json"])["users"]
    assert found["kinds"] == json.loads(json.dumps({name: dataclasses.asdict(each) for name, each in kinds.items()}))
    assert found["problems"] == {"no_search": {"count": 1, "turns": {"d": "chat"}}}
    with Image.open(io.BytesIO(files["users.png"])) as picture:
        colours = {tuple(each) for each in np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()}
    for colour in plots.COLOURS[:2]:
        assert tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5)) in colours
    assert {*write(tmp_path, Report({}, {}, {}))} == {"report.json", "report.md"}, "what was here before is gone"


def test_plots_that_would_be_empty_are_not_there(tmp_path):
    (tmp_path / "latency.png").write_bytes(b"of a report that was here before")
    made = Report({}, {"gold": SMALL}, {"gold": Problems()})
    assert {*write(tmp_path, made)} == {"report.json", "report.md", "corpus.png", "calibration.png"}
    nothing = Report({}, {"gold": Summary({}, {})}, {})
    assert {*write(tmp_path, nothing)} == {"report.json", "report.md"}


def test_what_is_no_number_is_no_figure(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        report.write(str(tmp_path), Report({}, {"a": Summary({"x": Cell(math.nan, None, None, 1, 1)}, {})}, {}))


def test_labels_fit_and_are_in_english():
    cell = Cell(0.5, 0.4, 0.6, 5, 2)
    series = {
        "a": {name: cell for name in ("ActivityNet", "电影", "a_long_folder_1_name", "a_long_folder_2_name")},
        "b": {"ActivityNet": dataclasses.replace(cell, n=9), "b_third_folder_with_a_name": cell},
    }
    expected = ["ActivityNet\nn=5-9", "no. 2\nn=5", "no. 3\nn=5", "no. 4\nn=5", "b_third_f...name\nn=5"]
    assert plots._ticks(series) == expected
    turns = {"a": {str(number): cell for number in (1, 2, 10)}, "b": {str(number): cell for number in range(1, 30)}}
    assert plots._ticks(turns) == [f"{number}\nn=5" for number in range(1, plots.MOST + 1)]


def test_a_comparison_is_drawn_where_its_differences_are():
    labels = {name: kind.label for name, kind in report.METRICS.items()}
    compared = {
        "a against b": {
            "retrieval_r1": Comparison(0.25, 0.125, 0.5, 0.01, 40, 9),
            "retrieval_mean_rank": Comparison(-3, -4, -2, 0.01, 40, 9),  # no share
            "unparsed": Comparison(-0.125, None, None, 1, 60, 1),
        },
        "a against 电影": {"retrieval_r1": Comparison(-0.5, -0.75, -0.25, 0.02, 30, 9)},
    }
    figure = plots._comparison(compared, labels)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "R@1\nn=30-40", "Answers that do not parse, less is better\nn=60",
    ]  # fmt: skip
    first, second = axes.containers
    assert first[0].get_xdata().tolist() == [25, -12.5] and second[0].get_xdata().tolist() == [-50]
    assert np.round(first[0].get_ydata()).tolist() == [0, 1] and first[0].get_ydata()[0] < second[0].get_ydata()[0]
    assert first[2][0].get_segments()[0][:, 0].tolist() == [12.5, 50]
    assert second[2][0].get_segments()[0][:, 0].tolist() == [-75, -25]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a against b", "no. 2"]
    assert (
        plots._comparison({"a against b": {"retrieval_mean_rank": compared["a against b"]["unparsed"]}}, labels) is None
    )
    assert plots._comparison({}, labels) is None
