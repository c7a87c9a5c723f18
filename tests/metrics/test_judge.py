"""The judge against a server that answers, fails, hangs, drips and lies; its file, stopped and gone on with."""

import dataclasses
import hashlib
import http.server
import json
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest

from ivcr_jax.metrics import interval, judge, records, report, summary
from ivcr_jax.metrics.judge import Judge
from tests.metrics.test_text import ENGLISH, pairs_of

TRUE = "It is video 3."
# How a reply begins that then comes blank by blank.
DRIPS = {
    "head": b"HTTP/1.1 200 OK\r\nX: ",
    "body": b"HTTP/1.1 200 OK\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n",
}


class Endpoint(http.server.ThreadingHTTPServer):
    """Does what the answer that it is to judge tells it to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked, self.tried, self.now, self.most, self.delay = [], {}, 0, 0, 0.0
        self.lock, self.over, self.hung_up = threading.Lock(), threading.Event(), 0

    def handle_error(self, request, client_address):
        """Clients that hang up are part of the test."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = body["messages"][0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body, answer))
            self.server.tried[answer] = tried = self.server.tried.get(answer, 0) + 1
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        time.sleep(self.server.delay)
        with self.server.lock:  # before it answers: who is answered asks again at once
            self.server.now -= 1
        self.do(answer, tried)

    def do(self, answer, tried):
        word, _, rest = answer.partition(" ")
        if word == "busy" and tried <= int(rest):
            self.reply(503, "later")
        elif word == "status":
            self.reply(int(rest), "no")
        elif word == "sleep":
            time.sleep(float(rest))
            self.say('{"score": 5}')
        elif word == "hang":
            self.connection.close()
        elif word == "drip":  # never silent for long, and never done
            self.drip(DRIPS[rest])
        elif word == "body":
            self.reply(200, rest)
        elif word == "away":
            self.send_response(302)
            self.send_header("Location", self.server.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.say(rest if word == "say" else '{"score": 5}')

    def drip(self, begin):
        self.wfile.write(begin)
        try:
            while not self.server.over.wait(0.05):
                self.wfile.write(b" ")
        except OSError:
            self.server.hung_up += 1

    def say(self, content):
        self.reply(200, json.dumps({"model": "judge-2", "choices": [{"message": {"content": content}}]}))

    def reply(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers), None, None))
        self.reply(200, "{}")

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def judged(endpoint, tmp_path):
    def judged(*answers, **options):
        asked = Judge(endpoint.url, **{"model": "judge-1", **options})
        return judge.judged(pairs_of([(answer, TRUE) for answer in answers], "en"), asked, str(tmp_path / "file"))

    return judged


def test_the_judge_is_asked_as_its_interface_says(judged, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    found = judged('say {"score": 4}', key_variable="JUDGE_KEY")
    (path, headers, body, _), = endpoint.asked  # fmt: skip
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-1" and headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], len(body["messages"])) == ("judge-1", 0, 1)
    prompt = body["messages"][0]["content"]
    assert "<message>\nWhere is it?\n</message>" in prompt and "<reference>\nIt is video 3.\n</reference>" in prompt
    assert prompt.endswith('{"score": 0}\n') and "$" not in prompt
    assert found.scores.tolist() == [4] and found.failures == {}
    sha256 = hashlib.sha256(judge.PROMPT.read_bytes()).hexdigest()
    assert found.about == f"judge-1 (says it is judge-2), prompt {sha256[:12]}"


def test_no_key_is_sent_where_there_is_none(judged, endpoint):
    assert judged('say {"score": 0}').scores.tolist() == [0]
    assert "Authorization" not in endpoint.asked[0][1]


def test_scores_keep_the_order_of_turns_and_workers_are_few(judged, endpoint):
    answers = [f'say  {{"score": {number % 6}}}{" " * number}' for number in range(40)]
    answers[3] = "sleep 0.2"
    endpoint.delay = 0.02
    found = judged(*answers, workers=4)
    assert found.scores.tolist() == [5 if number == 3 else number % 6 for number in range(40)]
    assert found.failures == {} and 1 < endpoint.most <= 4


@pytest.mark.parametrize(
    ("answer", "reason", "tries"),
    [
        ("busy 9", "HTTP 503", 3),
        ("status 401", "HTTP 401", 1),
        ("status 429", "HTTP 429", 3),
        ("sleep 3", "timeout", 3),
        ("hang up", "no reply: ", 3),
        ("away", "HTTP 302", 1),
        ("body <html>", "unreadable reply", 1),
        ("body []", "unreadable reply", 1),
        ('body {"choices": []}', "unreadable reply", 1),
        ('body {"choices": [{"message": {"content": null}}]}', "unreadable reply", 1),
        ("body " + "[" * 5000, "unreadable reply", 1),
        ("say The score is 4.", "reply: found 'The score is 4.', expected a score", 1),
        ('say {"score": 6}', "reply: found '{\"score\": 6}', expected a score from 0 to 5", 1),
        ('say {"score": -1}', "reply: found", 1),
        ('say {"score": true}', "reply: found", 1),
        ('say {"score": "4"}', "reply: found", 1),
        ('say {"score": 4.5}', "reply: found", 1),
        ('say {"score": 4, "reason": "fine"}', "reply: found", 1),
        ("say 4", "reply: found", 1),
        ("say [4]", "reply: found", 1),
    ],
)
def test_failures_count_as_0_and_are_named(answer, reason, tries, judged, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    timeout = 1.0 if answer.startswith("sleep") else 30.0
    found = judged('say {"score": 3}', answer, key_variable="JUDGE_KEY", timeout=timeout)
    assert found.scores.tolist() == [3, 0]
    assert found.failures.keys() == {"d1#0"} and found.failures["d1#0"].startswith(reason)
    assert "secret" not in found.failures["d1#0"]
    assert endpoint.tried[answer] == tries and len(endpoint.asked) == tries + 1
    assert found.about.count(";") == 0  # one failure stops nothing


def test_what_fails_at_first_is_asked_again(judged, endpoint):
    found = judged("busy 2")
    assert found.scores.tolist() == [5] and found.failures == {} and endpoint.tried == {"busy 2": 3}


def test_answers_that_are_not_there_are_not_judged(judged, endpoint):
    found = judged("", "   ", 'say {"score": 2}')
    assert found.scores.tolist() == [0, 0, 2]
    assert found.failures == {"d0#0": "no answer", "d1#0": "no answer"} and len(endpoint.asked) == 1


def test_nobody_listens(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(judge, "PAUSE", 0.0)
    found = judge.judged(pairs_of(ENGLISH[:1], "en"), Judge("http://127.0.0.1:9/v1", "judge-1"), str(tmp_path / "file"))
    assert found.scores.tolist() == [0] and found.failures == {"d0#0": "no reply: ConnectionRefusedError"}


@pytest.mark.parametrize("kind", DRIPS)
def test_a_call_ends_in_time_whatever_drips(kind, judged, endpoint, monkeypatch):
    """And its connection is not left open."""
    monkeypatch.setattr(judge, "TRIES", 1)
    begun = time.monotonic()
    assert judged(f"drip {kind}", timeout=0.5).failures == {"d0#0": "timeout"}
    assert 0.4 < time.monotonic() - begun < 20
    while not endpoint.hung_up and time.monotonic() - begun < 20:
        time.sleep(0.01)
    assert endpoint.hung_up == 1


def test_a_dead_endpoint_is_left_alone(judged, endpoint, monkeypatch, caplog):
    monkeypatch.setattr(judge, "DEAD", 5)
    answers = [*["status 404"] * 4, 'say {"score": 3}', *["status 404"] * 4, 'say {"score": 2}', *["status 404"] * 90]
    found = judged(*answers, workers=1)
    assert len(endpoint.asked) == 15 and found.scores.sum() == 5
    reasons = [*found.failures.values()]
    assert reasons.count("HTTP 404") == 13 and reasons.count("not asked") == 85 and len(reasons) == 98
    why = "asking stopped: 5 questions in a row failed, the last one of HTTP 404"
    assert found.about.endswith(f"; {why}") and caplog.text.count(why) == 1
    endpoint.asked.clear()
    again = judged(*answers[:6], workers=1)  # what failed is asked again, what was judged is not
    assert len(endpoint.asked) == 5 and again.scores.tolist() == [0, 0, 0, 0, 3, 0]


def test_a_dead_endpoint_costs_each_worker_no_other_try(judged, endpoint, monkeypatch):
    monkeypatch.setattr(judge, "DEAD", 4)
    found = judged(*[f"busy 9{' ' * number}" for number in range(60)], workers=4)
    assert len(endpoint.asked) <= 3 * (4 + 4) and len(found.failures) == 60


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_was_judged_is_not_asked_again(judged, endpoint, tmp_path):
    answers = [
        'say {"score": 4}',
        "busy 3",
        "say nonsense",
        "status 400",
        'body {"choices": []}',
        "",
        'say {"score": 1}',
    ]
    first = judged(*answers)
    assert first.scores.tolist() == [4, 0, 0, 0, 0, 0, 1]
    header, *rows = lines_of(tmp_path / "file")
    sha256 = hashlib.sha256(judge.PROMPT.read_bytes()).hexdigest()
    assert header == {"judgements": 1, "model": "judge-1", "prompt": sha256}
    assert {row["turn"]: row["content"] for row in rows} == {
        "d0#0": '{"score": 4}', "d2#0": "nonsense", "d6#0": '{"score": 1}',
    }  # fmt: skip
    endpoint.asked.clear()
    second = judged(*answers)
    assert {answer for *_, answer in endpoint.asked} == {"busy 3", "status 400", 'body {"choices": []}'}
    assert second.scores.tolist() == [4, 5, 0, 0, 0, 0, 1]
    assert second.failures == {turn: why for turn, why in first.failures.items() if turn != "d1#0"}
    endpoint.asked.clear()
    answers[0] = 'say {"score": 2}'  # another answer is another question, and its reply the one that counts
    assert judged(*answers).scores.tolist() == judged(*answers).scores.tolist() == [2, 5, 0, 0, 0, 0, 1]
    assert [answer for *_, answer in endpoint.asked].count(answers[0]) == 1


def ask_for(url, path, count):
    judge.judged(pairs_of([(f'say {{"score": 3}}{" " * number}', TRUE) for number in range(count)], "en"),
                 Judge(url, "judge-1", workers=2), path)  # fmt: skip


def test_a_run_that_was_killed_goes_on(endpoint, tmp_path):
    file, count = tmp_path / "file", 60
    endpoint.delay = 0.02
    process = multiprocessing.get_context("spawn").Process(target=ask_for, args=(endpoint.url, str(file), count))
    process.start()
    while len(endpoint.asked) < 20 and process.is_alive():
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = {row["turn"] for row in lines_of(file)[1:]}
    assert 10 < len(kept) < count
    with file.open("ab") as half:
        half.write(b'{"turn": "d59#0", "as')
    ask_for(endpoint.url, str(file), count)
    assert {tried for answer, tried in endpoint.tried.items() if f"d{answer.count(' ') - 2}#0" in kept} == {1}
    header, *rows = lines_of(file)
    assert header["model"] == "judge-1" and {row["turn"] for row in rows} == {f"d{number}#0" for number in range(count)}


def test_judgements_of_something_else_are_refused(judged, endpoint, tmp_path, monkeypatch):
    judged('say {"score": 4}')
    with pytest.raises(ValueError, match="file: was made with model judge-1 and not judge-2; expected the same"):
        judged('say {"score": 4}', model="judge-2")
    other = tmp_path / "judge.txt"
    other.write_text("Grade: <answer>\n$answer\n</answer>")
    monkeypatch.setattr(judge, "PROMPT", other)
    with pytest.raises(
        ValueError, match="file: was made with prompt [0-9a-f]{12} and not [0-9a-f]{12}; expected the same"
    ):
        judged('say {"score": 4}')
    (tmp_path / "file").write_text('{"judgements": 1, "model": "judge-1"}\n["d0#0", 4]\n')
    with pytest.raises(ValueError, match="was made with prompt None"):
        judged('say {"score": 4}')
    assert len(endpoint.asked) == 1


def test_a_line_that_is_no_judgement_is_refused(judged, endpoint, tmp_path):
    judged('say {"score": 4}')
    with (tmp_path / "file").open("a") as file:
        file.write('{"turn": "d1#0", "asked": "", "model": "", "content": 4}\n')
    with pytest.raises(
        ValueError, match="file: line 3: found .*expected an object with turn, asked, model, content, all"
    ):
        judged('say {"score": 4}')


def test_the_mean_score_of_each_language():
    pairs = pairs_of([("a", TRUE)] * 5, "en") + pairs_of([("a", TRUE)] * 2, "zh", 10)
    scores = np.array([5, 4, 0, 3, 1, 2, 2.0])
    found = judge.cells(pairs, scores, seed=3)
    assert found.keys() == {"judge_en", "judge_zh"}
    english = found["judge_en"]
    assert (english.value, english.n, english.clusters) == (pytest.approx(2.6), 5, 3)
    assert found["judge_zh"] == interval.Cell(2.0, None, None, 2, 1)
    totals, counts = np.array([9, 3, 1, 0]), np.array([2, 2, 1, 0])  # two answers are about one video
    drawn = np.concatenate([*interval.draws(4, interval.RESAMPLES, 3)])
    with np.errstate(invalid="ignore"):  # some have no English turn
        means = totals[drawn].sum(1) / counts[drawn].sum(1)
    np.testing.assert_allclose([english.low, english.high], np.nanquantile(means, (0.025, 0.975)), atol=1e-9)
    assert judge.cells(pairs[:5], scores[:5]).keys() == {"judge_en"}


def test_judgements_in_the_report(judged, tmp_path):
    answers = ['say {"score": 4}', 'say {"score": 1}', "status 401", 'say {"score": 3}']
    pairs = pairs_of([(answer, TRUE) for answer in answers], "en")
    found = judged(*answers)
    whole = summary.summarise(pairs)
    whole = dataclasses.replace(whole, overall=whole.overall | judge.cells(pairs, found.scores))
    problems = records.Problems(unjudged=found.failures)
    report.write(str(tmp_path / "out"), report.Report({"judge": found.about}, {"gold": whole}, {"gold": problems}))
    told = json.loads((tmp_path / "out" / "report.json").read_text())["protocols"]["gold"]
    assert told["overall"]["judge_en"]["value"] == 2
    assert told["problems"] == {"unjudged": {"count": 1, "turns": {"d2#0": "HTTP 401"}}}
    shown = (tmp_path / "out" / "report.md").read_text()
    assert "| Judge, English, 0 to 5 | 2.00 [1.50, 2.50] (4) |" in shown and "| unjudged | 1 | d2#0 |" in shown


def test_a_judge_that_cannot_be_asked_is_refused(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    for url in ("file:///x", "https://", "http:///v1", ""):
        with pytest.raises(ValueError, match=f"url of the judge: found {url!r}, expected http://... or https://..."):
            Judge(url, "judge-1")
    with pytest.raises(ValueError, match="model of the judge: found nothing"):
        Judge("http://x", "")
    with pytest.raises(ValueError, match=r"key of the judge: found nothing in \$JUDGE_KEY, expected a key"):
        Judge("http://x", "judge-1", key_variable="JUDGE_KEY")
    monkeypatch.setenv("JUDGE_KEY", "secret\n1")
    with pytest.raises(ValueError, match=r"key of the judge: found what is no key in \$JUDGE_KEY") as refused:
        Judge("http://x", "judge-1", key_variable="JUDGE_KEY")
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("JUDGE_KEY", "secret-1\n")
    assert Judge("http://x", "judge-1", key_variable="JUDGE_KEY").key == "secret-1"
