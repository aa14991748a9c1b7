"""Messages that programs make for any checkpoint."""

from __future__ import annotations

from ernie45.assistant import user_message


def test_pictures_and_videos_come_before_the_text() -> None:
    message = user_message("What?", ["a.png", "b.png"], ["c.mp4"])
    assert message["role"] == "user"
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "b.png"}},
        {"type": "video_url", "video_url": {"url": "c.mp4"}},
        {"type": "text", "text": "What?"},
    ]
