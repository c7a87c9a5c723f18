"""BLEU against sacrebleu on whole corpora; the judge against a server that answers, fails, hangs and lies."""

import hashlib
import http.server
import json
import threading
import time

import numpy as np
import pytest
import sacrebleu

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import interval, text
from ivcr_jax.metrics.records import Pair, Prediction
from ivcr_jax.metrics.text import Judge, bleu, judge

ENGLISH = (
    ("It is video 3. A red fish swims to the left.", "It is video 3. A red fish swims slowly to the left."),
    ("It happens in video 1 at 5s-10s.", "It happens in video 1 at 6s-10s, before the dog sleeps."),
    ("", "The query is found in video 2."),
    ("Sorry, I don't know that one .", "It is video 7. Two children play with a ball in a garden ."),
    ("It is video 3. A cat sleeps on the sofa.", "It is video 3. A cat sleeps on the sofa."),
)
CHINESE = (
    ("是视频 3。一条红色的鱼向左游。", "是视频 3。一条红色的鱼慢慢地向左游动。"),
    ("在视频 1 的5秒到10秒。", "在视频 1 的6秒到10秒，小狗睡觉之前。"),
    ("抱歉，我不知道。", "是视频 7。两个孩子在花园里玩球。"),
)


def pairs_of(texts, language, first=0):
    """Every two answers are about one video."""
    pairs = []
    for number, (found, wanted) in enumerate(texts, first):
        turn = Turn("Where is it?", wanted, Intent.VIDEO, language, f"c/{language}{number // 2}")
        prediction = Prediction(f"d{number}", 0, text=found) if found else None
        pairs.append(Pair(Dialogue(f"d{number}", "test", 1, (turn,)), 0, True, prediction))
    return pairs


def test_bleu_is_sacrebleus_of_each_language():
    pairs = pairs_of(ENGLISH, "en") + pairs_of(CHINESE, "zh", 10)
    cells, signatures = bleu(pairs)
    for language, texts, tokenizer in (("en", ENGLISH, "13a"), ("zh", CHINESE, "zh")):
        found, wanted = zip(*texts, strict=True)
        expected = sacrebleu.corpus_bleu([*found], [[*wanted]], tokenize=tokenizer)
        cell = cells[f"bleu_{language}"]
        assert cell.value == pytest.approx(expected.score, abs=1e-9) and 5 < cell.value < 95
        assert (cell.n, cell.clusters) == (len(texts), (len(texts) + 1) // 2)
        assert cell.low < cell.value < cell.high
        assert f"|tok:{tokenizer}|" in signatures[f"bleu_{language}"]
        assert signatures[f"bleu_{language}"].endswith(f"|version:{sacrebleu.__version__}")
    assert signatures["bleu_en"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert bleu(pairs[:5])[0].keys() == {"bleu_en"}


def test_bleus_interval_is_that_of_corpora_of_whole_videos(monkeypatch):
    monkeypatch.setattr(interval, "RESAMPLES", 60)
    cell = bleu(pairs_of(ENGLISH, "en"), seed=3)[0]["bleu_en"]
    scores = []
    for drawn in np.concatenate([*interval.draws(3, 60, 3)]):
        texts = [pair for video in drawn for pair in ENGLISH[2 * video : 2 * video + 2]]
        found, wanted = zip(*texts, strict=True)
        scores.append(sacrebleu.corpus_bleu([*found], [[*wanted]]).score)
    np.testing.assert_allclose([cell.low, cell.high], np.quantile(scores, (0.025, 0.975)), atol=1e-9)


def test_the_right_answers_have_100():
    pairs = pairs_of([(wanted, wanted) for _, wanted in ENGLISH], "en")
    cell = bleu(pairs)[0]["bleu_en"]
    assert [round(each, 6) for each in (cell.value, cell.low, cell.high)] == [100, 100, 100]
    assert bleu(pairs_of([("", wanted) for _, wanted in ENGLISH], "en"))[0]["bleu_en"].value == 0


class Endpoint(http.server.ThreadingHTTPServer):
    """Does what the answer that it is to judge tells it to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked, self.tried, self.now, self.most, self.delay = [], {}, 0, 0, 0.0
        self.lock = threading.Lock()

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
        try:
            self.do(answer, tried)
        finally:
            with self.server.lock:
                self.server.now -= 1

    def do(self, answer, tried):
        time.sleep(self.server.delay)
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
        elif word == "body":
            self.reply(200, rest)
        elif word == "away":
            self.send_response(302)
            self.send_header("Location", self.server.url + "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.say(rest if word == "say" else '{"score": 5}')

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
    monkeypatch.setattr(text, "PAUSE", 0.01)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def judged(endpoint, *answers, **options):
    return judge(
        pairs_of([(answer, "It is video 3.") for answer in answers], "en"), Judge(endpoint.url, "judge-1", **options)
    )


def test_the_judge_is_asked_as_its_interface_says(endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    found = judged(endpoint, 'say {"score": 4}', key_variable="JUDGE_KEY")
    (path, headers, body, _), = endpoint.asked  # fmt: skip
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret-1" and headers["Content-Type"] == "application/json"
    assert (body["model"], body["temperature"], len(body["messages"])) == ("judge-1", 0, 1)
    prompt = body["messages"][0]["content"]
    assert "<message>\nWhere is it?\n</message>" in prompt and "<reference>\nIt is video 3.\n</reference>" in prompt
    assert prompt.endswith('{"score": 0}\n') and "$" not in prompt
    assert found.scores.tolist() == [4] and found.failures == {} and found.models == ("judge-2",)
    assert found.prompt == hashlib.sha256(text.PROMPT.read_bytes()).hexdigest()


def test_no_key_is_sent_where_there_is_none(endpoint):
    assert judged(endpoint, 'say {"score": 0}').scores.tolist() == [0]
    assert "Authorization" not in endpoint.asked[0][1]


def test_scores_keep_the_order_of_turns_and_workers_are_few(endpoint):
    answers = [f'say  {{"score": {number % 6}}}{" " * number}' for number in range(40)]
    answers[3] = "sleep 0.2"
    endpoint.delay = 0.02
    found = judged(endpoint, *answers, workers=4)
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
        ("say The score is 4.", "unreadable reply", 1),
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
def test_failures_count_as_0_and_are_named(answer, reason, tries, endpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    timeout = 1.0 if answer.startswith("sleep") else 30.0
    found = judged(endpoint, 'say {"score": 3}', answer, key_variable="JUDGE_KEY", timeout=timeout)
    assert found.scores.tolist() == [3, 0]
    assert found.failures.keys() == {"d1#0"} and found.failures["d1#0"].startswith(reason)
    assert "secret" not in found.failures["d1#0"]
    assert endpoint.tried[answer] == tries and len(endpoint.asked) == tries + 1


def test_what_fails_at_first_is_asked_again(endpoint):
    found = judged(endpoint, "busy 2")
    assert found.scores.tolist() == [5] and found.failures == {} and endpoint.tried == {"busy 2": 3}


def test_answers_that_are_not_there_are_not_judged(endpoint):
    found = judged(endpoint, "", "   ", 'say {"score": 2}')
    assert found.scores.tolist() == [0, 0, 2]
    assert found.failures == {"d0#0": "no answer", "d1#0": "no answer"} and len(endpoint.asked) == 1


def test_nobody_listens(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(text, "PAUSE", 0.0)
    found = judge(pairs_of(ENGLISH[:1], "en"), Judge("http://127.0.0.1:9/v1", "judge-1"))
    assert found.scores.tolist() == [0] and found.failures == {"d0#0": "no reply: ConnectionRefusedError"}


def test_a_judge_that_cannot_be_asked_is_refused(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="url of the judge: found 'file:///x', expected http://... or https://..."):
        Judge("file:///x", "judge-1")
    with pytest.raises(ValueError, match="model of the judge: found nothing"):
        Judge("http://x", "")
    with pytest.raises(ValueError, match=r"key of the judge: found nothing in \$JUDGE_KEY, expected a key"):
        Judge("http://x", "judge-1", key_variable="JUDGE_KEY")
