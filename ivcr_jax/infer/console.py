"""Runs the lines of a conversation, messages and commands, and shows what comes of them."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from etils import epath

from ivcr_jax.config import listed
from ivcr_jax.data import manifest
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.infer import report, terminal
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus, Video
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.turn import Ranked, Turn

BOLD, DIM, RED, YELLOW = "1", "2", "31", "33"  # of ANSI's escape sequences
WIDEST_BAR = 72  # columns
WAIT = "…"  # until the first word comes


class Console:
    """Runs the lines of a conversation and shows what comes of them. Attributes: session: as it is now."""

    def __init__(
        self, assistant: Assistant, corpus: Corpus, session: Session, *, as_json: bool = False, note: str = ""
    ) -> None:
        """Begins.

        Args:
          assistant, corpus: that `session` was made with, to load others with.
          session: to begin with.
          as_json: whether turns are printed as JSON, and nothing else.
          note: as `report.write`, of its pages.
        """
        self.session = session
        self._assistant, self._corpus, self._json, self._note = assistant, corpus, as_json, note

    def greet(self, allowed: int) -> None:
        """Says how to begin. `allowed` is how many of the corpus's videos may be found."""
        videos = len(self._corpus.videos)
        self.tell(f"{videos} videos" if allowed == videos else f"{allowed} of {videos} videos", BOLD)
        self.tell("Ask for a video:      Find a video of a dog that runs.   找一个小狗奔跑的视频。")
        self.tell("then for a moment:    When does it jump?                 它什么时候跳起来？")
        self.tell("or turn it down:      Not this one.  The second one.     不要这个。  第二个。")
        self.tell("/help lists the commands, /quit leaves.", DIM)
        self.tell("")

    def run(self, line: str) -> bool:
        """Runs a message or a command; returns whether to go on.

        Raises ValueError, OSError or CorpusError, one sentence, where it is refused; the conversation is as before.
        """
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._answer(lambda stream: self.session.say(line, stream))
            return True
        name, _, rest = line[1:].partition(" ")
        if name == "quit" and not rest:
            return False
        if name not in _COMMANDS:
            raise ValueError(f"found no command /{name}, expected one of {listed([f'/{each}' for each in _COMMANDS])}")
        run, usage, _, counts = _COMMANDS[name]
        words = [rest.strip()] if usage.startswith("FILE") and rest.strip() else rest.split()
        if len(words) not in counts:
            raise ValueError(f"/{name}: found {len(words)} arguments, expected {f'/{name} {usage}'.strip()}")
        run(self, *words)
        return True

    def tell(self, text: str, code: str = "") -> None:
        """Prints a line, which a program is not told."""
        if not self._json:
            print(_painted(terminal.printable(text), code, sys.stdout), flush=True)

    def _answer(self, ask: Callable[[Callable[[str], None] | None], Turn]) -> None:
        before, begun, held = self.session.current, False, ""
        lively = not self._json and _lively(sys.stdout)

        def clear() -> None:
            if lively:
                print("\r\x1b[K", end="", flush=True)

        def stream(piece: str) -> None:
            nonlocal begun, held
            piece = held + piece if begun else piece.lstrip()
            words = piece.rstrip()
            held = piece[len(words) :]  # until something follows
            if words and not begun:
                clear()
                begun = True
            print("\n".join(map(terminal.printable, words.split("\n"))), end="", flush=True)

        if lively:
            print(_painted(WAIT, DIM, sys.stdout), end="", flush=True)
        try:
            turn = ask(None if self._json else stream)
        finally:
            if begun:
                self.tell("")
            else:
                clear()
        if self._json:
            print(json.dumps(turn.to_json()), flush=True)
            return
        self._show(turn, before)

    def _show(self, turn: Turn, before: str | None) -> None:
        """What a turn found. `before` is the current video until then."""
        if turn.intent == Intent.VIDEO:
            self._show_list(turn.ranking)
        elif turn.moment is not None:
            video, moment = self._corpus.video(turn.moment.video), turn.moment
            for line in terminal.timeline(video.duration, moment.start, moment.end, min(_width(), WIDEST_BAR)):
                self.tell(line)
            self.tell(f"in {video.title}, expected IoU {moment.score:.2f}", DIM)
        elif turn.video is not None and turn.video != before:
            self._show_file(self._corpus.video(turn.video))
        if turn.evidence:
            self.tell(f"nearest frames: {', '.join(terminal.clock(time, 1) for time, _ in turn.evidence)}", DIM)
        for note in turn.notes:
            self.tell(f"note: {note}", YELLOW)
        self.tell("")

    def _show_list(self, ranking: Sequence[Ranked]) -> None:
        rows = [(ranked, self._corpus.video(ranked.id)) for ranked in ranking]
        titles, *lines = terminal.table(rows, self.session.current, _width())
        self.tell(titles, DIM)
        for line in lines:
            self.tell(line, BOLD if line.startswith(terminal.CURRENT) else "")

    def _show_file(self, video: Video) -> None:
        size = f"{video.size / 1e6:.1f} MB" if video.size >= 1e6 else f"{video.size / 1e3:.0f} kB"
        self.tell(f"{video.path}  {terminal.clock(video.duration)}  {video.width}x{video.height}  {size}", BOLD)

    def _ranking(self) -> Sequence[Ranked]:
        """The last list. Raises ValueError where there is none."""
        ranking = self.session.turns[-1].ranking if self.session.turns else ()
        if not ranking:
            raise ValueError("found no list of videos yet; ask for a video first")
        return ranking

    def _candidate(self, word: str) -> str:
        """The id of the candidate with this number. Raises ValueError where there is none."""
        names = {str(ranked.number): ranked.id for ranked in self._ranking()}
        if word not in names:
            raise ValueError(f"found no candidate {word!r}, expected a number from 1 to {len(names)}")
        return names[word]

    def _help(self) -> None:
        self.tell("A message asks for a video, for a moment in the current one, or just talks.")
        left = {name: f"/{name} {usage}".strip() for name, (_, usage, _, _) in _COMMANDS.items()}
        size = max(map(len, left.values()))
        for name, (_, _, said, _) in _COMMANDS.items():
            self.tell(f"  {left[name]:{size}}  {said}")
        self.tell("")

    def _list(self) -> None:
        self._show_list(self._ranking())
        self.tell("")

    def _open(self, number: str) -> None:
        name, before = self._candidate(number), self.session.current
        words = {"en": f"video {number}", "zh": f"视频 {number}"}[self.session.turns[-1].language]
        self._answer(lambda stream: self.session.say(words, stream))
        if name == before:  # else it has been shown
            self._show_file(self._corpus.video(name))
            self.tell("")

    def _like(self, number: str = "", *times: str) -> None:
        name = self._candidate(number) if number else self.session.current
        if name is None:
            raise ValueError("/like: found no current video, expected one; ask for a video first")
        start, end = map(terminal.seconds_of, times) if times else (None, None)
        if start is not None and end is not None and start >= end:
            raise ValueError(f"/like: found {times[0]} to {times[1]}, expected a start before its end")
        self._answer(lambda stream: self.session.like(name, start, end, stream))

    def _undo(self) -> None:
        self.tell(f"Taken back: {self.session.undo().message}", DIM)

    def _reset(self) -> None:
        self.session.reset()
        self.tell("The conversation begins anew.", DIM)

    def _save(self, file: str) -> None:
        refuse_others(file, _is_session, "a saved conversation")
        # Names of files need not be UTF-8.
        data = self.session.to_json().encode(errors="surrogatepass")
        with manifest.atomic(_path(file)) as aside:
            aside.write_bytes(data)
        self.tell(f"{file}: {len(self.session.turns)} turns", DIM)

    def _load(self, file: str) -> None:
        text = read_file(file, "a saved conversation").decode(errors="surrogatepass")
        self.session, differ = Session.load(self._assistant, self._corpus, text)
        turns = self.session.turns
        self.tell(f"{file}: {len(turns)} turns", DIM)
        if differ:
            numbers = ", ".join(str(number + 1) for number in differ)
            self.tell(f"note: the corpus has changed, and with it the answer of turn {numbers}.", YELLOW)
        if turns and turns[-1].ranking:
            self._list()

    def _report(self, file: str) -> None:
        refuse_others(file, report.is_report, "a report")
        report.write(_path(file), self._corpus, self.session.turns, self._note)
        self.tell(f"{file}: {len(self.session.turns)} turns", DIM)


# By name: what it runs, its arguments, what it does, how many arguments it may have. A FILE is the rest of the line.
_COMMANDS: dict[str, tuple[Callable[..., None], str, str, tuple[int, ...]]] = {
    "help": (Console._help, "", "this list", (0,)),
    "list": (Console._list, "", "the last list of videos again", (0,)),
    "open": (Console._open, "N", "make candidate N the current video, and tell its file", (1,)),
    "like": (Console._like, "[N [START END]]", "more like the current video, N, or N from START to END", (0, 1, 3)),
    "undo": (Console._undo, "", "take the last turn back", (0,)),
    "reset": (Console._reset, "", "begin anew", (0,)),
    "save": (Console._save, "FILE", "save the conversation", (1,)),
    "load": (Console._load, "FILE", "go on with a saved one", (1,)),
    "report": (Console._report, "FILE.html", "write it as a page with pictures", (1,)),
    "quit": (lambda console: None, "", "leave, as Ctrl-D does; Ctrl-C stops an answer", (0,)),
}  # fmt: skip


def complain(sentence: str) -> None:
    """Tells of what went wrong, on the error output."""
    sys.stdout.flush()
    print(_painted(terminal.printable(sentence), RED, sys.stderr), file=sys.stderr, flush=True)


def read_file(file: str, what: str) -> bytes:
    """A file that a person named. Raises FileNotFoundError where there is none, `what` being expected."""
    path = _path(file)
    if not path.exists() or path.is_dir():  # a pipe will do
        raise FileNotFoundError(f"{file}: found {'a folder' if path.is_dir() else 'nothing'}, expected {what}")
    return path.read_bytes()


def refuse_others(file: str, ours: Callable[[epath.Path], bool], what: str) -> None:
    """Raises ValueError where there is something that must not be overwritten: no file that is `ours`, as `what`."""
    path = _path(file)
    if path.exists() and (path.is_dir() or not ours(path)):
        raise ValueError(f"{file}: found {'a folder' if path.is_dir() else 'another file'}, expected {what} or nothing")


def _lively(stream: TextIO) -> bool:
    """Whether a stream is a terminal that understands escape sequences, and its owner wants them."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _painted(text: str, code: str, stream: TextIO) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if code and text and _lively(stream) else text


def _width() -> int:
    return shutil.get_terminal_size().columns


def _path(file: str) -> epath.Path:
    return epath.Path(file).expanduser()


def _is_session(path: epath.Path) -> bool:
    try:
        values = json.loads(path.read_bytes().decode(errors="surrogatepass"))
    except ValueError:
        return False
    return isinstance(values, dict) and {"version", "export", "turns"} <= values.keys()
