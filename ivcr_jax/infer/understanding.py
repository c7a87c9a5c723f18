"""What a message asks for, read off its words, in English and Chinese.

A message looks for a video, for a moment in the current one, or just talks; it may point at what was listed ("the
second one", "第二个"), turn it down ("not this one", "不要这个"), or ask for something like it. These are cues of the
wording alone. A message without any is a description: what it goes with decides (see `session`). Strings
only.
"""

import dataclasses
import re

from ivcr_jax.data.dialogue import Intent


@dataclasses.dataclass(frozen=True)
class Request:
    """What the words of a message say.

    Attributes:
      intent: what it asks for; None where the words do not tell.
      number: of the list's video that it points at, or None.
      rejects: whether it turns the current video down.
      similar: whether it asks for one like it.
      bare: whether it says nothing of what the video should show.
      after: whether it asks for a moment after the last one.
    """

    intent: Intent | None
    number: int | None = None
    rejects: bool = False
    similar: bool = False
    bare: bool = False
    after: bool = False


def _cues(*patterns: str) -> re.Pattern[str]:
    return re.compile("|".join(patterns), re.IGNORECASE)


_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_HAN_NUMBERS = "一二三四五六七八九十"
_POINTS = _cues(
    rf"\b(?:the\s+)?(?P<word>{'|'.join(_ORDINALS)})\s+(?:one|video|result|candidate)\b",
    r"\b(?P<nth>\d+)(?:st|nd|rd|th)\s+(?:one|video|result|candidate)\b",
    r"\b(?:video|number|no\.?)\s*(?P<number>\d+)\b",
    rf"第\s*(?P<zh>\d+|[{_HAN_NUMBERS}])\s*个|视频\s*(?P<digits>\d+)",
)
_REJECTS = _cues(
    r"\bnot\s+(?:that|this)\b", r"\bnot it\b", r"^no\b", r"\bclose, but\b", r"\bwrong (?:one|video)\b",
    r"\banother one instead\b", "不是这个", "不要这个", "不是它", "不对", "差一点", "换别的",
)  # fmt: skip
_SIMILAR = _cues(
    r"\bsimilar\b", r"\b(?:more|another|something|one|others?)\b[^.?!]{0,12}\blike\s+(?:this|that|it|the)\b",
    r"\bmore of (?:this|these|that)\b", "类似", "相似", "像这样", "差不多的",
)  # fmt: skip
_MOMENT = _cues(
    r"^(?:and\s+|so\s+)?(?:when\b|at (?:what|which)\b|what time|where (?:in|is))", r"\bat what time\b",
    r"\b(?:this|that|the) (?:part|moment|scene)\b", r"\btake me to\b", r"\bjump to\b", r"\bwhen exactly\b",
    r"\bwhen (?:does|do|is|are|did|was|were)\b", r"\bafter (?:that|this)\b", r"\bafterwards\b",
    "什么时候", "什么时间", "什么位置", "何时", "几秒", "哪一?段", "[这下]面?一?段", "定位", "这一幕", "跳到",
    "之后呢?",
)  # fmt: skip
_AFTER = _cues(
    r"\bafter (?:that|this|it)\b", r"\bafterwards\b", r"\b(?:the )?next time\b", "在?[这那]?之后", "后来", "然后呢"
)
_FIND = _cues(
    r"\bfind\b", r"\blook(?:ing)? for\b", r"\bsearch\b", r"\bshow me\b", r"\bwhich video\b", r"\bsomething else\b",
    r"\b(?:another|one more|a different) (?:one|video)\b", r"\bI (?:want|need|meant|am after)\b",
    r"\blike to see\b", r"\bis there (?:a|any|another)\b", r"\bdo you have\b",
    "找", "换一个", "另一个", "还需要", "有没有", "还有", "我要的?是?", "想看", "哪个视频", "再来一个", "来一个",
)  # fmt: skip
_TALK = _cues(
    r"^(?:hello|hi|hey)\b", r"\bthank(?:s| you)\b", r"^(?:good (?:morning|evening)|bye|ok(?:ay)?)\b",
    r"\bwhat can you do\b", r"\bwho are you\b", r"\bhow are you\b",
    r"\b(?:write|think of|suggest|come up with)\b[^.?!]*\b(?:script|title|caption|points?|ideas?|story)\b",
    r"\bhow long should\b", r"\bwhat music\b", r"\bwhat do you think\b",
    "你好", "谢谢", "再见", "你能做什么", "你是谁", "标题", "脚本", "提纲", "配.{0,4}音乐", "多长合适", "你觉得",
)  # fmt: skip
# What a message may say besides without telling what the video should show.
_EMPTY = _cues(
    rf"\b(?:\d+(?:st|nd|rd|th)|{'|'.join(_ORDINALS)})\b",
    r"\b(?:a|an|the|is|are|there|any|please|now|then|good|great|ok|okay|yes|no|do|you|have|can|could|me|give|show|find|"
    r"want|i|am|see|would|like|to|also|in|one|ones|video|videos|another|more|other|others|this|that|it|not|something|"
    r"else|similar|of|these|with|look|looking|for|instead|different|close|but|wrong|and|number)\b",
    r"[吗呢吧啊请有没再给我找个的一还要看想来换别类相似像这那样视频不是对它好你能第二三四五六七八九十些更多下四七八九十]",
    r"[\W\d_]",
)


def understand(message: str, current: bool) -> Request:
    """Reads a message.

    Args:
      message: of a person, not empty.
      current: whether there is a current video, which a moment can be in and another can be like.
    """
    number = _number(message)
    rejects, similar = bool(_REJECTS.search(message)), bool(_SIMILAR.search(message))
    content = _EMPTY.sub(" ", message)
    bare = not content.strip()
    moment = bool(_MOMENT.search(message)) and (current or number is not None)
    find = bool(_FIND.search(message))
    # A question of time begins with its word; elsewhere "find" and "similar" are the stronger ones.
    if moment and not (rejects or similar) and not (find and number is None and not _starts(_MOMENT, message)):
        return Request(Intent.MOMENT, number, after=bool(_AFTER.search(message)))
    if _TALK.search(message) and not (rejects or similar):
        return Request(Intent.CHAT)
    if number is not None and bare and not rejects and not similar:
        return Request(None, number, bare=True)
    if find or rejects or similar:
        return Request(Intent.VIDEO, number, rejects and current, similar and current, bare)
    return Request(None, number, bare=bare)


def _starts(pattern: re.Pattern[str], message: str) -> bool:
    found = pattern.search(message)
    return found is not None and found.start() == 0


def _number(message: str) -> int | None:
    found = _POINTS.search(message)
    if found is None:
        return None
    text = next(value for value in found.groups() if value is not None).lower()
    if text in _ORDINALS:
        return _ORDINALS.index(text) + 1
    return _HAN_NUMBERS.index(text) + 1 if text in _HAN_NUMBERS else int(text)
