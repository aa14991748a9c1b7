"""ERNIEKit's own formats: texts, preferences, and texts with pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie45.chat import Message
from ernie45.errors import ErnieError
from ernie45.training.data.fields import decoded, labels_of, listed, message_of, system_of, texts_of, tools_of
from ernie45.training.data.media import medium_part, text_parts
from ernie45.training.data.messages import standard_messages
from ernie45.training.data.records import Conversation, Preference, conversation_of, preference_of


def erniekit(fields: Mapping[str, Any], folder: Path) -> Conversation:
    """A line with `src`, `tgt`, and perhaps `label`."""
    questions, answers = texts_of(fields, "src"), texts_of(fields, "tgt")
    labels = labels_of(fields, len(answers))
    if len(questions) != len(answers):
        raise ErnieError(f"src has {len(questions)} texts and tgt {len(answers)}, expected as many")
    system = system_of(fields)
    if fields.get("is_system"):  # then the first turn holds the system message
        system = [message_of("system", questions[0])]
        questions, answers, labels = questions[1:], answers[1:], labels[1:]
    messages, learned = system, [False] * len(system)
    for question, answer, label in zip(questions, answers, labels, strict=True):
        messages = [*messages, message_of("user", question), message_of("assistant", answer)]
        learned += [False, label]
    return conversation_of(messages, learned, ())


def erniekit_preference(fields: Mapping[str, Any], folder: Path) -> Preference:
    """A line with `src`, one less of `tgt`, and two in `response`: the chosen one has the larger number in `sort`."""
    questions, answers, sort = texts_of(fields, "src"), texts_of(fields, "tgt", empty=True), fields["sort"]
    if len(questions) != len(answers) + 1:
        raise ErnieError(f"src has {len(questions)} texts and tgt {len(answers)}, expected one more in src")
    if fields.get("is_system") and not answers:
        raise ErnieError("src: with is_system the first text is the system message, expected a question after it")
    responses = fields["response"]
    if not (isinstance(responses, list) and isinstance(sort, list) and len(responses) == len(sort) == 2):
        raise ErnieError("response and sort: expected two entries each")
    if sort[0] == sort[1]:
        raise ErnieError(f"sort is {sort}: expected two different numbers, the larger one for the better response")
    system = system_of(fields)
    if fields.get("is_system"):
        system, questions, answers = [message_of("system", questions[0])], questions[1:], answers[1:]
    prompt = system
    for question, answer in zip(questions, answers, strict=False):
        prompt = [*prompt, message_of("user", question), message_of("assistant", answer)]
    sides = [_alternating(response) for response in (responses if sort[0] > sort[1] else responses[::-1])]
    return preference_of([*prompt, message_of("user", questions[-1])], sides, ())


def _alternating(response: Any) -> list[Message]:
    texts = texts_of({"response": response}, "response")
    if len(texts) % 2 == 0:
        raise ErnieError(f"response: {len(texts)} texts, expected an odd number: answer, question, ..., answer")
    return [message_of("user" if index % 2 else "assistant", text) for index, text in enumerate(texts)]


def erniekit_media(fields: Mapping[str, Any], folder: Path) -> Conversation:
    """A line with `text_info`, and perhaps `image_info`, `video_info` and `order`."""
    messages = standard_messages(_media_messages(fields, folder), "text_info")
    messages = [*system_of(fields), *messages]
    return conversation_of(messages, [message["role"] == "assistant" for message in messages], tools_of(fields))


def _media_messages(fields: Mapping[str, Any], folder: Path) -> list[Message]:
    """The messages of a line with `text_info`: neighbours of one tag are one message, the media in it.

    Texts tagged "mask" are the user's, or a tool's where they have `tool_response`; those tagged "no_mask" the
    assistant's. A picture stands before the text of its `matched_text_index`, unless `order` places everything.

    Raises:
        ErnieError: pictures and videos without `order`, a place that does not exist, or an unknown tag.
    """
    infos = {"text": fields["text_info"], "image": fields.get("image_info", []), "video": fields.get("video_info", [])}
    for kind, entries in infos.items():
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ErnieError(f"{kind}_info: expected a list of objects")
    messages: list[dict[str, Any]] = []
    before = None
    for kind, index in _order(fields, infos):
        entry = infos[kind][index]
        tag = entry.get("tag") if kind == "text" else "mask"
        if tag not in ("mask", "no_mask"):
            raise ErnieError(f'text_info[{index}]["tag"] is {tag!r}, expected "mask" or "no_mask"')
        if tag != before:
            messages.append({"role": "user" if tag == "mask" else "assistant", "content": []})
            before = tag
        _extend(messages[-1], kind, entry, folder)
    messages = [_joined(message) for message in messages]
    if fields.get("is_system") and messages and messages[0]["role"] == "user" and not fields.get("system"):
        messages[0]["role"] = "system"
    return list(messages)


def _order(fields: Mapping[str, Any], infos: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[tuple[str, int]]:
    """(kind, index) of texts and media as they follow each other."""
    if fields.get("order"):
        order = fields["order"]
        places = list(zip(order["type"], order["index"], strict=True)) if _is_order(order) else []
        wanted = sorted((kind, index) for kind, entries in infos.items() for index in range(len(entries)))
        if sorted(places) != wanted:
            raise ErnieError("order: expected `type` and `index` that name every text, picture and video once")
        return places
    if infos["image"] and infos["video"]:
        raise ErnieError("order: missing, though there are pictures and videos, which it must put in order")
    kind = "image" if infos["image"] else "video"
    places = [("text", index) for index in range(len(infos["text"]))]
    for index, entry in enumerate(infos[kind]):
        place = entry.get("matched_text_index")
        if not isinstance(place, int) or not 0 <= place < len(infos["text"]):
            raise ErnieError(
                f'{kind}_info[{index}]["matched_text_index"] is {place!r}, expected 0 to {len(infos["text"]) - 1}'
            )
        places.insert(places.index(("text", place)), (kind, index))
    return places


def _is_order(order: Any) -> bool:
    if not isinstance(order, Mapping):
        return False
    kinds, indices = order.get("type"), order.get("index")
    if not isinstance(kinds, list) or not isinstance(indices, list) or len(kinds) != len(indices):
        return False
    return all(isinstance(kind, str) for kind in kinds) and all(isinstance(index, int) for index in indices)


def _extend(message: dict[str, Any], kind: str, entry: Mapping[str, Any], folder: Path) -> None:
    if kind != "text":
        if entry.get("is_video"):
            raise ErnieError("image_info with is_video: frame lists are not read so; name them in video_info as a list")
        settings = {key: value for key, value in entry.items() if key not in ("matched_text_index", "image_url")}
        message["content"].append(medium_part(kind, {**settings, "url": entry.get("image_url")}, folder))
        return
    if not isinstance(entry.get("text"), str):
        raise ErnieError(f"text_info: an entry has the text {entry.get('text')!r}, expected a text")
    message["content"] += text_parts(entry["text"])
    if entry.get("tool_response"):
        message["role"] = "tool"
    if calls := entry.get("tool_calls"):
        message.setdefault("tool_calls", []).extend(listed(decoded(calls, "tool_calls")))


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    if all(part["type"] == "text" for part in message["content"]):
        return {**message, "content": "".join(part["text"] for part in message["content"])}
    return message
