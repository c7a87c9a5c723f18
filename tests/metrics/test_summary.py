"""Figures of a run against loops over its turns; perfect and empty runs; two runs compared."""

import collections
import dataclasses

import numpy as np
import pytest

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import interval, summary
from ivcr_jax.metrics.records import EARLIER, Moment, Prediction, match
from tests.metrics import made_up_records as made_up

DIALOGUES = made_up.split(120)
CORPUS = sorted({video for dialogue in DIALOGUES for video in dialogue.videos})
# What a metric is where all is right: 1 unless it is here.
PERFECT = {"unparsed": 0, "false_refusals": 0, "retrieval_mean_rank": 1, "retrieval_median_rank": 1}


pytestmark = pytest.mark.usefixtures("fewer_resamples")


def summarised(predictions, pool=None):
    pairs, _ = match(DIALOGUES, predictions, pool)
    return pairs, summary.summarise(pairs)


@pytest.fixture(scope="module")
def gold(fewer_resamples):
    return summarised(made_up.run(DIALOGUES, 0.7))


@pytest.fixture(scope="module")
def e2e(fewer_resamples):
    return summarised(made_up.run(DIALOGUES, 0.6, seed=2, corpus=CORPUS), CORPUS)


def perfect():
    for dialogue in DIALOGUES:
        for place, turn in enumerate(dialogue.turns):
            fields = {"intent": turn.intent, "text": turn.answer}
            if turn.intent == Intent.VIDEO:
                rest = tuple(video for video in turn.candidates if video != turn.video_id)
                there = len(rest) < len(turn.candidates)
                ranking = (turn.video_id, *rest) if there else rest
                fields |= {"ranking": ranking, "pool": len(ranking), "video": turn.video_id if there else None}
            elif turn.intent == Intent.MOMENT:
                fields |= {"video": turn.video_id, "moments": (Moment(turn.video_id, *turn.span, 1.0),)}
            yield Prediction(dialogue.id, place, **fields)


def test_a_perfect_run_is_perfect_everywhere():
    """Of searches that list their video; the others are refused, rightly."""
    pairs, found = summarised(perfect())
    listed = [pair for pair in pairs if pair.turn.intent != Intent.VIDEO or pair.there]
    for each in (summary.summarise(listed).overall, *summary.summarise(listed).by["turn"].values()):
        for name, cell in each.items():
            assert (cell.value, cell.low or cell.value) == (PERFECT.get(name, 1),) * 2, name
    assert found.overall["refusal_recall"].value == found.overall["refusal_precision"].value == 1
    assert found.overall["refusal_recall"].n == len(pairs) - len(listed) > 10
    assert found.calibration_error == 0


def test_a_run_that_answers_nothing_is_wrong_everywhere():
    pairs, found = summarised([])
    wrong = {"unparsed": 1, "false_refusals": 1, "retrieval_mean_rank": 11, "retrieval_median_rank": 11}
    assert {name: cell.value for name, cell in found.overall.items()} == {
        name: wrong.get(name, 0) for name in found.overall
    }
    assert found.overall["intent_accuracy"].n == len(pairs)
    assert not {"latency_p50", "refusal_precision"} & found.overall.keys()
    assert found.calibration == () and found.calibration_error is None and found.by["stage"] == {}


def test_what_a_cascade_never_came_to_neither_parses_nor_does_not():
    """It is wrong in all else. A turn that failed by itself, or has no prediction, does not parse."""
    truth = [Turn("Where?", "It is video 1.", Intent.VIDEO, "en", "c/v", ("c/v",))] * 6
    said = Prediction("d", 0, Intent.VIDEO, ("c/v",), 1, video="c/v", text="It is video 1.")
    predictions = [
        said,
        dataclasses.replace(said, turn=1, parsed=False),
        Prediction("d", 2, error="out of memory"),
        *(Prediction("d", place, error=EARLIER) for place in (3, 4)),
    ]
    pairs, problems = match([Dialogue("d", "test", 1, tuple(truth))], predictions)
    found = summary.summarise(pairs)
    assert (found.overall["unparsed"].value, found.overall["unparsed"].n) == (0.75, 4)
    assert (found.overall["retrieval_r1"].value, found.overall["retrieval_r1"].n) == (pytest.approx(2 / 6), 6)
    groups = {place: cells["unparsed"].value for place, cells in found.by["turn"].items() if "unparsed" in cells}
    assert groups == {"1": 0, "2": 1, "3": 1, "6": 1}
    assert problems.failed == {"d#2": "out of memory", "d#3": EARLIER, "d#4": EARLIER}
    assert problems.missing == {"d#5": "no prediction"}


def loops(pairs, predictions):
    """Values of each turn by metric, written straight from the definitions."""
    answers = {(p.dialogue, p.turn): p for p in predictions}
    several = any(len({m.video for m in p.moments}) > 1 for p in predictions)
    rows = collections.defaultdict(list)
    for pair in pairs:
        turn, answer = pair.turn, answers.get((pair.dialogue.id, pair.place))
        rows["intent_accuracy"].append((pair, float(answer is not None and answer.intent == turn.intent)))
        if answer:
            rows["latency_p50"].append((pair, sum(answer.latency.values())))
            rows["latency_p95"].append((pair, sum(answer.latency.values())))
        if turn.intent == Intent.CHAT:
            continue
        rows["unparsed"].append((pair, float(answer is None or not answer.parsed)))
        if turn.intent == Intent.VIDEO:
            rank = np.inf
            if answer and turn.video_id in answer.ranking:
                rank = answer.ranking.index(turn.video_id) + 1
            if answer and answer.rank is not None:
                rank = answer.rank
            behind = (answer.pool if answer and answer.pool else max(p.pool for p in predictions)) + 1
            for most in (1, 5, 10):
                rows[f"retrieval_r{most}"].append((pair, float(rank <= most)))
            rows["retrieval_mrr"].append((pair, 1 / rank))
            rows["retrieval_ndcg10"].append((pair, 1 / np.log2(1 + rank) if rank <= 10 else 0.0))
            rows["retrieval_mean_rank"].append((pair, min(rank, behind)))
            rows["retrieval_median_rank"].append((pair, min(rank, behind)))
            rows["video_accuracy"].append((pair, float(answer is not None and answer.video == turn.video_id)))
            refused = answer is not None and answer.intent == Intent.VIDEO and answer.video is None
            if pair.there:
                rows["false_refusals"].append((pair, float(refused or answer is None)))
            else:
                rows["refusal_recall"].append((pair, float(refused)))
            if refused:
                rows["refusal_precision"].append((pair, float(not pair.there)))
        else:
            ious = []
            for moment in answer.moments if answer else ():
                overlap = max(0, min(moment.end, turn.span[1]) - max(moment.start, turn.span[0]))
                union = moment.end - moment.start + turn.span[1] - turn.span[0] - overlap
                ious.append((moment.video, overlap / union * (moment.video == turn.video_id)))
            own = [iou for video, iou in ious if video == ious[0][0]] + [0.0]
            rows["moment_miou"].append((pair, own[0]))
            for bar in (0.3, 0.5, 0.7):
                for most in (1, 5):
                    rows[f"moment_r{most}_iou_{bar}"].append((pair, float(max(own[:most]) >= bar)))
                for most in (1, 5, 10, 100) if several else ():
                    best = max([iou for _, iou in ious[:most]], default=0)
                    rows[f"vcmr_r{most}_iou_{bar}"].append((pair, float(best >= bar)))
    return rows


def value_of(name, values):
    shares = {"latency_p50": 0.5, "latency_p95": 0.95, "retrieval_median_rank": 0.5}
    return np.quantile(values, shares[name]) if name in shares else np.mean(values)


def clusters_in(pairs):
    return len({pair.turn.video_id or ("chat", pair.dialogue.id) for pair in pairs})


GROUPS = {
    "turn": lambda pair: str(pair.place + 1),
    "intent": lambda pair: pair.turn.intent.name,
    "language": lambda pair: pair.turn.language,
    "corpus": lambda pair: pair.turn.video_id.split("/")[0],
    "type": lambda pair: str(pair.dialogue.type),
}


@pytest.mark.parametrize("run", ["gold", "e2e"])
def test_every_figure_is_that_of_a_loop(run, request):
    pairs, found = request.getfixturevalue(run)
    rows = loops(pairs, [pair.prediction for pair in pairs if pair.prediction])
    assert found.overall.keys() == rows.keys() and len(rows) == {"gold": 22, "e2e": 33}[run]
    for name, row in rows.items():
        values = [value for _, value in row]
        assert found.overall[name].value == pytest.approx(value_of(name, values), abs=1e-12), name
        assert (found.overall[name].n, found.overall[name].clusters) == (len(row), clusters_in([p for p, _ in row]))
        for by, key in GROUPS.items():
            groups = collections.defaultdict(list)
            for pair, value in row:
                groups[key(pair)].append(value)
            groups.pop("", None)  # chat has no corpus
            cells = {group: cells[name] for group, cells in found.by[by].items() if name in cells}
            assert {group: cell.n for group, cell in cells.items()} == {g: len(v) for g, v in groups.items()}
            for group, values in groups.items():
                assert cells[group].value == pytest.approx(value_of(name, values), abs=1e-12), (name, by, group)


def test_intervals_are_of_each_groups_own_videos(gold):
    pairs, found = gold
    rows = loops(pairs, [pair.prediction for pair in pairs if pair.prediction])
    values = {pair.id: value for pair, value in rows["retrieval_r5"]}
    some = [place for place, pair in enumerate(pairs) if pair.turn.language == "zh"]
    column = np.array([values.get(pairs[place].id, np.nan) for place in some])
    expected = interval.cells({"a": column}, interval.clusters_of(pairs)[some])["a"]
    cell = found.by["language"]["zh"]["retrieval_r5"]
    assert dataclasses.astuple(cell) == pytest.approx(dataclasses.astuple(expected), abs=1e-12)
    assert cell.clusters == len({pairs[place].turn.video_id for place in some if pairs[place].id in values}) < cell.n


def test_groups_come_in_order(e2e):
    by = e2e[1].by
    assert [*by] == ["turn", "intent", "language", "corpus", "type", "stage"]
    assert [*by["turn"]] == [str(place) for place in range(1, 10)]
    assert [*by["intent"]] == ["CHAT", "VIDEO", "MOMENT"] and [*by["language"]] == ["en", "zh"]
    assert [*by["corpus"]] == sorted(made_up.CORPORA) and [*by["type"]] == [*"01234567"]
    assert [*by["stage"]] == ["search", "read", "write"]
    assert by["stage"]["write"]["latency_p95"].value == pytest.approx(0.2)


def test_calibration_is_that_of_a_loop(gold):
    pairs, found = gold
    bins = collections.defaultdict(list)
    for pair in pairs:
        if pair.turn.intent == Intent.MOMENT and pair.prediction and pair.prediction.moments:
            first, (start, end) = pair.prediction.moments[0], pair.turn.span
            overlap = max(0, min(first.end, end) - max(first.start, start))
            bins[int(first.score * 10)].append(
                (first.score, overlap / (first.end - first.start + end - start - overlap))
            )
    assert [round(10 * each.low) for each in found.calibration] == sorted(bins) and len(bins) > 4
    error = 0
    for each in found.calibration:
        scores, ious = zip(*bins[round(10 * each.low)], strict=True)
        assert each.high == pytest.approx(each.low + 0.1)
        assert (each.score, each.iou.value, each.iou.n) == pytest.approx((np.mean(scores), np.mean(ious), len(ious)))
        error += abs(np.mean(scores) - np.mean(ious)) * len(ious)
    assert found.calibration_error == pytest.approx(error / sum(map(len, bins.values())))


def test_a_score_of_1_is_in_the_last_bin_and_none_is_in_no_bin():
    turn = Turn("q", "a", Intent.MOMENT, "en", "c/a", span=(0.0, 4.0))
    dialogue = Dialogue("d", "test", 1, (turn, turn))
    moments = (Moment("c/a", 0, 2, 1.0),), (Moment("c/a", 0, 2, None),)
    predictions = [Prediction("d", place, Intent.MOMENT, moments=each) for place, each in enumerate(moments)]
    found = summary.summarise(match([dialogue], predictions)[0])
    (only,) = found.calibration
    assert (only.low, only.high, only.score, only.iou) == (0.9, 1.0, 1.0, interval.Cell(0.5, None, None, 1, 1))
    assert found.overall["moment_miou"].n == 2 and found.calibration_error == 0.5


def test_what_hangs_on_the_order_of_candidates(gold):
    """By loops, over the turns that were ranked in several orders."""
    rng = np.random.default_rng(3)
    pairs, predictions = [], []
    for pair in gold[0]:
        answer = pair.prediction
        if answer and answer.ranking and rng.random() < 0.8:
            places = rng.integers(1, 4, 3 + (rng.random() < 0.5)).tolist()  # the fourth is not in all of them
            answer = dataclasses.replace(answer, shuffled=tuple(places))
            if pair.turn.video_id in answer.ranking:
                predictions.append((pair, [answer.ranking.index(pair.turn.video_id) + 1, *places[:3]]))
        pairs.append(pair._replace(prediction=answer))
    found = summary.summarise(pairs).overall
    hits = [[rank == 1 for rank in ranks] for _, ranks in predictions]
    assert found["order_changes"].value == pytest.approx(np.mean([len(set(row)) == 2 for row in hits]))
    shares = [sum(row[order] for row in hits) / len(hits) for order in range(4)]
    spread, mean = found["order_spread"], sum(shares) / 4
    assert spread.value == pytest.approx((sum((share - mean) ** 2 for share in shares) / 3) ** 0.5)
    assert spread.n == found["order_changes"].n == len(hits) > 50
    assert spread.clusters == len({pair.turn.video_id for pair, _ in predictions})
    assert spread.low < spread.high and "order_spread" not in gold[1].overall
    same = [
        pair._replace(prediction=p and dataclasses.replace(p, shuffled=_given(pair)))
        for pair in pairs
        for p in [pair.prediction]
    ]
    still = summary.summarise(same).overall
    assert still["order_changes"].value == still["order_spread"].value == 0
    assert still["order_spread"].high == pytest.approx(0, abs=1e-12)


def _given(pair):
    """The truth's place in the order of the data, twice more."""
    ranking = pair.prediction.ranking
    return (ranking.index(pair.turn.video_id) + 1,) * 2 if pair.turn.video_id in ranking else ()


def test_two_runs_are_compared_turn_by_turn(gold):
    pairs, found = gold
    other, worse = summarised(made_up.run(DIALOGUES, 0.3, seed=9))
    compared = summary.compare(pairs, other)
    means = {name for name in found.overall if not name.endswith(("p50", "p95", "median_rank", "precision"))}
    assert compared.keys() == means
    for name, each in compared.items():
        assert each.difference == pytest.approx(found.overall[name].value - worse.overall[name].value), name
        assert each.n == found.overall[name].n and each.low <= each.difference <= each.high
    assert compared["retrieval_r1"].p < 0.01 and compared["moment_miou"].low > 0
    same = summary.compare(pairs, pairs)
    assert {each.p for each in same.values()} == {1.0} and same.keys() == means | {"refusal_precision"}


def test_runs_on_other_turns_are_not_compared(gold):
    pairs, _ = gold
    for others in (pairs[1:], pairs[::-1]):
        with pytest.raises(ValueError, match=f"found {len(pairs)} and {len(others)} turns, expected the same ones"):
            summary.compare(pairs, others)


def test_the_same_seed_gives_the_same_figures(gold):
    pairs, found = gold
    assert summary.summarise(pairs) == found
    other = summary.summarise(pairs, seed=1)
    assert other != found
    assert {name: cell.value for name, cell in other.overall.items()} == {
        name: cell.value for name, cell in found.overall.items()
    }


def test_an_unknown_intent_is_neither_a_refusal_nor_right():
    turn = Turn("q", "video 1", Intent.VIDEO, "en", "c/a", ("c/b",))
    dialogue = Dialogue("d", "test", 1, (turn,))
    for prediction, refused in (
        (Prediction("d", 0, Intent.VIDEO), 1),
        (Prediction("d", 0, Intent.CHAT), 0),
        (Prediction("d", 0, None), 0),
        (dataclasses.replace(Prediction("d", 0, Intent.VIDEO, ("c/b",), 1), video="c/b"), 0),
    ):
        found = summary.summarise(match([dialogue], [prediction])[0]).overall
        assert found["refusal_recall"].value == refused
        assert found["intent_accuracy"].value == (prediction.intent == Intent.VIDEO)
        assert ("refusal_precision" in found) == bool(refused)
