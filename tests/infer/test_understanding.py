"""Messages and what their words ask for."""

import pytest

from ivcr_jax.data.dialogue import Intent
from ivcr_jax.infer.understanding import Request, understand

CHAT, VIDEO, MOMENT = Intent


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("Hello, what can you do?", Request(CHAT)),
        ("你好，你能做什么？", Request(CHAT)),
        ("Thanks a lot!", Request(CHAT)),
        ("Can you think of a title for a video about the sea?", Request(CHAT)),
        ("给一个以海边为主题的视频起个标题吧。", Request(CHAT)),
        ("I am looking for a video. A dog runs.", Request(VIDEO)),
        ("Find the video in which a woman throws a toy", Request(VIDEO)),
        ("帮我找一个视频：一只狗在跑。", Request(VIDEO)),
        ("Show me another video of dogs", Request(VIDEO)),
        ("A dog runs on a meadow.", Request(None)),
        ("一只狗在草地上跑。", Request(None)),
        ("When does this happen? A dog runs.", Request(MOMENT)),
        ("At what time do we see the dog?", Request(MOMENT)),
        ("Take me to this part: the dog barks.", Request(MOMENT)),
        ("狗什么时候叫？", Request(MOMENT)),
        ("帮我定位到这一段：狗在叫。", Request(MOMENT)),
        ("And after that?", Request(MOMENT, after=True)),
        ("What happens after that? The dog barks.", Request(MOMENT, after=True)),
        ("When does it bark in the second one?", Request(MOMENT, 2)),
        ("第二个视频里狗什么时候叫？", Request(MOMENT, 2)),
        ("the second one", Request(None, 2, bare=True)),
        ("The 3rd video, please.", Request(None, 3, bare=True)),
        ("video 4", Request(None, 4, bare=True)),
        ("第二个", Request(None, 2, bare=True)),
        ("第10个", Request(None, 10, bare=True)),
        ("视频 7", Request(None, 7, bare=True)),
        ("Not this one.", Request(VIDEO, rejects=True, bare=True)),
        ("不要这个", Request(VIDEO, rejects=True, bare=True)),
        ("No, I meant the one with a cat.", Request(VIDEO, rejects=True)),
        ("不是这个，我要的是有猫的。", Request(VIDEO, rejects=True)),
        ("a similar one", Request(VIDEO, similar=True, bare=True)),
        ("Do you have more like this?", Request(VIDEO, similar=True, bare=True)),
        ("有没有类似的？", Request(VIDEO, similar=True, bare=True)),
        ("Something similar to the second one", Request(VIDEO, 2, similar=True, bare=True)),
        ("Is there another one like this? I want a red ball.", Request(VIDEO, similar=True)),
        ("再给我找一个相似的，要有红色的球。", Request(VIDEO, similar=True)),
        ("帮我找 a video with 红色的球", Request(VIDEO)),
    ],
)
def test_what_a_message_asks_for(message, expected):
    """While there is a current video and a list."""
    assert understand(message, current=True) == expected


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("When does a dog bark?", None),  # there is no video that it could be in: it is a description
        ("狗什么时候叫？", None),
        ("a similar one", VIDEO),
        ("Not this one, a red one.", VIDEO),
    ],
)
def test_without_a_current_video_there_is_nothing_to_point_at(message, expected):
    found = understand(message, current=False)
    assert found.intent == expected and not (found.rejects or found.similar)
