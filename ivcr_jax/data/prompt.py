"""The prompt: how a dialogue over videos is written as text for the decoder, in English and Chinese.

The wording and the spacing, odd as they are, are the published ones (LLaMA-2 chat format; convert_dataset.ipynb
and load_video of the IVCR-200K code), so that published weights see what they were trained on. Shared by training,
evaluation and inference: it knows strings only, no tokenizer, no video, no file.
"""

import dataclasses
from collections.abc import Sequence

from ivcr_jax.data.dialogue import Intent

VID, VID_END, VIDEO, VIDEO_END, VIDEO_TOKEN = VIDEO_TOKENS = (
    "<VID>",
    "</VID>",
    "<VIDEO>",
    "</VIDEO>",
    "<VIDEOTOKEN>",
)
BOS, EOS = "<s>", "</s>"
INST, INST_END = "[INST]", "[/INST]"

# What a person may not write: it would be read as structure.
CONTROL_TOKENS = (*VIDEO_TOKENS, BOS, EOS, "<unk>", INST, INST_END, "<<SYS>>", "<</SYS>>")


@dataclasses.dataclass(frozen=True)
class _Wording:
    system: str
    candidates: str
    current: str
    comma: str
    stop: str
    times: str


_WORDING = {
    "en": _Wording(
        system="You are an excellent video retrieval AI assistant.",
        candidates="Candidate videos : ",
        current="Current video : ",
        comma=",",
        stop=".",
        times=" The video contains {count} frames sampled at {times} seconds.",
    ),
    "zh": _Wording(
        system="你是一个出色的视频检索人工智能助手。",
        candidates="候选视频：",
        current="当前视频：",
        comma="，",
        stop="。",
        times="该视频共有 {count} 帧，采样时间为 {times} 秒。",
    ),
}


@dataclasses.dataclass(frozen=True)
class PromptStyle:
    """What of the prompt a configuration may choose. The defaults with `localized=False` are the published prompt.

    Attributes:
      localized: write the fixed wording in the language of the turn; False writes it in English always.
      frame_times: list the frames' times in a moment turn's prompt.
      numbered: write a video with its number, `<VID> 3 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>`, as published. False
        writes <VIDEOTOKEN> alone, some fifteen tokens less: in the isolated layout text cannot tell whose block is
        whose, so numbers say nothing there.
      last_frame_seconds_bug: end the sentence of a video's last frame in "seconds second.", as the published code does.
    """

    localized: bool = True
    frame_times: bool = True
    numbered: bool = True
    last_frame_seconds_bug: bool = False


@dataclasses.dataclass(frozen=True)
class PromptTurn:
    """What a turn's prompt is made of.

    Attributes:
      user: the message.
      answer: the reply; None where the model is to write it.
      intent: VIDEO lists all `numbers` as candidates, MOMENT shows the one current video, CHAT none.
      language: "en" or "zh".
      numbers: the number each video is shown under, in the order they are written.
      times: the current video's frame times in seconds, for a moment turn.
    """

    user: str
    answer: str | None
    intent: Intent
    language: str
    numbers: tuple[int, ...] = ()
    times: tuple[float, ...] = ()


def render(turns: Sequence[PromptTurn], style: PromptStyle) -> list[tuple[str, str]]:
    """The text of each turn: (prompt up to and with "[/INST]", answer with the end-of-sequence token).

    The text of the dialogue is all of them joined. Each video is written as one <VIDEOTOKEN>. The answer is ""
    where it is None.

    Raises:
      ValueError: for a moment turn that does not show exactly one video.
    """
    return [render_turn(turn, style, place == 0) for place, turn in enumerate(turns)]


def render_turn(turn: PromptTurn, style: PromptStyle, first: bool) -> tuple[str, str]:
    """The text of one turn, as `render`. `first`: whether the dialogue begins with it."""
    wording = _WORDING[turn.language if style.localized else "en"]
    shown = [VIDEO_TOKEN] * len(turn.numbers)
    if style.numbered:
        shown = [f"{VID} {number} {VID_END} {VIDEO} {VIDEO_TOKEN} {VIDEO_END}" for number in turn.numbers]
    message = turn.user
    if turn.intent == Intent.VIDEO and shown:
        comma = wording.comma if style.numbered else ""
        message = wording.candidates + comma.join(shown) + wording.stop + message
    elif turn.intent == Intent.MOMENT:
        if len(shown) != 1:
            raise ValueError(f"a turn asks for a moment and shows {len(shown)} videos; expected one: {turn.user!r}")
        times = ""
        if style.frame_times and turn.times:
            listed = ", ".join(seconds(time) for time in turn.times)
            times = wording.times.format(count=len(turn.times), times=listed)
        message = wording.current + shown[0] + wording.stop + times + message
    system = f"<<SYS>>\n{wording.system}\n<</SYS>>\n\n" if first else ""
    # The template strips the content after the system text is put before it.
    prompt = f"{BOS}{INST} {(system + message).strip()} {INST_END}"
    return prompt, "" if turn.answer is None else f" {turn.answer.strip()} {EOS}"


def seconds(time: float) -> str:
    """A time as the published text writes it: seconds with one decimal."""
    return f"{time:.1f}"


def frame_texts(times: Sequence[float], style: PromptStyle) -> list[str]:
    """The sentences that go with a video's frames into the image Q-Former (published wording, singular and all)."""
    texts = [f"This frame is sampled at {seconds(time)} second." for time in times]
    if style.last_frame_seconds_bug and texts:
        texts[-1] = texts[-1].replace(" second.", " seconds second.")
    return texts


def retrieval_query(messages: Sequence[str]) -> str:
    """What the first stage looks for: the message, then what it may refer back to, so that cutting cuts the oldest.

    Args:
      messages: of a dialogue's turns that look for a video, in order, the one in question last.
    """
    return "\n".join(reversed(messages))


def without_control_tokens(text: str) -> str:
    """The text without any string that the prompt's structure is made of, stripped."""
    before = None
    while before != text:  # taking one out may join the halves of another
        before = text
        for token in CONTROL_TOKENS:
            text = text.replace(token, "")
    return text.strip()


def as_text(text: str) -> str:
    """The text with a space of no width within every string that the prompt's structure is made of.

    So what a person writes is read as it looks, and never as structure.
    """
    for token in CONTROL_TOKENS:
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text
