"""Chat templates against the exact strings of the published formats, and the parsing of what comes back."""

from __future__ import annotations

import functools
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie45.chat import (
    PLAIN_TEMPLATE,
    THINKING_TEMPLATE,
    VISION_TEMPLATE,
    Response,
    ToolCall,
    choose_template,
    parse_response,
    prompt_opens_thinking,
    render_chat,
)
from ernie45.errors import ErnieError, TokenizerError
from ernie45.tokenizer import ErnieTokenizer
from ernie45.tokenizer_files import TokenizerFiles

BEGIN, END = "<|begin_of_sentence|>", "<|end_of_sentence|>"
QUESTION = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "description": "天气 <b>"}}
SYSTEM_TURN = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"


def plain(messages, add_generation_prompt=True, **variables) -> str:
    roles = {"cls_token": BEGIN, "sep_token": END}
    return render_chat(PLAIN_TEMPLATE, messages, add_generation_prompt=add_generation_prompt, **roles, **variables)


def thinking(messages, add_generation_prompt=True, **variables) -> str:
    return render_chat(THINKING_TEMPLATE, messages, add_generation_prompt=add_generation_prompt, **variables)


def vision(messages, add_generation_prompt=True, **variables) -> str:
    roles = {"cls_token": BEGIN, "sep_token": END}
    return render_chat(VISION_TEMPLATE, messages, add_generation_prompt=add_generation_prompt, **roles, **variables)


@functools.cache
def sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(f"User: question {i} Assistant: answer 文心 {i}" for i in range(100)),
        model_writer=model, vocab_size=330, byte_fallback=True, normalization_rule_name="identity",
        add_dummy_prefix=False, remove_extra_whitespaces=False, user_defined_symbols=[BEGIN, END], minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def build(added: tuple[str, ...] = (), **config) -> ErnieTokenizer:
    model = sentencepiece_model()
    first = ErnieTokenizer(TokenizerFiles("folder", {"tokenizer.model": model})).vocab_size
    tables = {
        "tokenizer_config.json": config,
        "added_tokens.json": {token: first + i for i, token in enumerate(added)},
    }
    files = {"tokenizer.model": model} | {name: json.dumps(table).encode() for name, table in tables.items()}
    return ErnieTokenizer(TokenizerFiles("folder", files))


# ---- the plain template


def test_plain_template_gives_the_published_string():
    assert plain(QUESTION) == "<|begin_of_sentence|>User: Hi\nAssistant: "


def test_plain_template_of_a_whole_conversation():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello \n"},
        {"role": "user", "content": "问?"},
    ]
    expected = f"{BEGIN}Be brief.\nUser: Hi\nAssistant:  Hello \n{END}User: 问?\n"
    assert plain(messages) == expected + "Assistant: "
    assert plain(messages, add_generation_prompt=False) == expected


def test_plain_template_rejects_what_it_cannot_say():
    with pytest.raises(ErnieError, match="no role tool"):
        plain([{"role": "tool", "content": "x"}])
    with pytest.raises(ErnieError, match="no place for tools"):
        plain(QUESTION, tools=[TOOL])


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    assert plain([{"role": "user", "content": parts}]) == plain(QUESTION)


# ---- the thinking template


def test_thinking_template_of_a_question():
    assert thinking(QUESTION) == (
        SYSTEM_TURN + "<|im_start|>user\nHi<|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    )  # fmt: skip


def test_thinking_template_with_system_and_tools():
    text = thinking([{"role": "system", "content": "S"}, *QUESTION], tools=[TOOL, {"name": "b"}])
    first = '{"type": "function", "function": {"name": "weather", "description": "天气 <b>"}}'
    assert text.startswith(
        "<|im_start|>system\n<system_setting>\nS\n</system_setting>\n\n<global_setting>\nthink_mode=True\n"
        f'</global_setting>\n\n<tool_list>\n[{first}, {{"name": "b"}}]\n</tool_list><|im_end|>\n\n<|im_start|>user'
    )


def test_thinking_can_be_switched_off():
    text = thinking(QUESTION, enable_thinking=False)
    assert "think_mode=False" in text and text.endswith("<|im_start|>assistant\n")
    assert thinking(QUESTION, enable_thinking=True) == thinking(QUESTION, enable_thinking=None) == thinking(QUESTION)


def test_thinking_template_keeps_only_the_last_reasoning():
    answer = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    text = thinking([*QUESTION, answer, *QUESTION, answer], add_generation_prompt=False)
    turns = text.split("<|im_start|>assistant\n")[1:]
    assert turns == [
        "<response>\nA\n</response>\n<|im_end|>\n\n<|im_start|>user\nHi<|im_end|>\n\n",
        "<think>\nR\n</think>\n<response>\nA\n</response>\n<|im_end|>",
    ]


@pytest.mark.parametrize("arguments", [{"city": "北京"}, '{"city": "北京"}'])
def test_thinking_template_of_tool_calls_and_results(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        *QUESTION,
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": "20 °C"},
    ]
    assert thinking(messages).removeprefix(SYSTEM_TURN + "<|im_start|>user\nHi<|im_end|>\n\n") == (
        "<|im_start|>assistant\n<think>\nR\n</think>\n\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>\n<|im_end|>\n\n'
        "<|im_start|>user\n<tool_response>\n20 °C\n</tool_response><|im_end|>\n\n<|im_start|>assistant\n<think>\n"
    )


def test_thinking_template_rejects_a_late_system_message():
    with pytest.raises(ErnieError, match="no role system here"):
        thinking([*QUESTION, {"role": "system", "content": "S"}])


# ---- the vision template

IMAGE, VIDEO = {"type": "image_url", "image_url": {"url": ""}}, {"type": "video_url", "video_url": {"url": ""}}
IMAGE_PLACE = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
VIDEO_PLACE = "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>"


def test_vision_template_numbers_pictures_and_videos_over_the_whole_conversation():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [IMAGE, {"type": "text", "text": "and"}, VIDEO, IMAGE]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [VIDEO, IMAGE, {"type": "text", "text": "?"}]},
    ]
    expected = (
        f"{BEGIN}Be brief.\nUser: Picture 1:{IMAGE_PLACE}andVideo 1:{VIDEO_PLACE}Picture 2:{IMAGE_PLACE}\n"
        f"Assistant: Yes.{END}User: Video 2:{VIDEO_PLACE}Picture 3:{IMAGE_PLACE}?\n"
    )
    assert vision(messages, add_generation_prompt=False) == expected
    assert vision(messages) == expected + "Assistant: <think>\n\n</think>\n\n"


def test_vision_template_thinks_only_when_asked():
    closed = f"{BEGIN}User: Hi\nAssistant: <think>\n\n</think>\n\n"
    assert vision(QUESTION) == vision(QUESTION, enable_thinking=False) == closed
    assert vision(QUESTION, enable_thinking=True) == f"{BEGIN}User: Hi\nAssistant: <think>"
    assert prompt_opens_thinking(closed) is False
    assert prompt_opens_thinking(vision(QUESTION, enable_thinking=True)) is True


@pytest.mark.parametrize("arguments", [{"city": "北京"}, '{"city": "北京"}'])
def test_vision_template_of_tools(arguments):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "system", "content": "S"},
        {"role": "assistant", "content": None, "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "content": [{"type": "text", "text": "a map: "}, IMAGE]},
    ]
    assert vision(messages, tools=[{"name": "weather"}]).removesuffix("<think>\n\n</think>\n\n") == (
        f'{BEGIN}\n<tool_list>\n[{{"name": "weather"}}]\n</tool_list>\nS\nAssistant: <think>\nR\n</think>\n'
        '\n<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
        f"{END}User: <tool_output>\na map: Picture 1:{IMAGE_PLACE}\n</tool_output>\nAssistant: "
    )


def test_vision_template_of_text_is_the_plain_one():
    messages = [{"role": "system", "content": "S"}, *QUESTION, {"role": "assistant", "content": "A"}, *QUESTION]
    assert vision(messages, add_generation_prompt=False) == plain(messages, add_generation_prompt=False)


def test_vision_template_rejects_what_it_cannot_say():
    with pytest.raises(ErnieError, match="no role observer"):
        vision([{"role": "observer", "content": "x"}])
    with pytest.raises(ErnieError, match="no part of type audio"):
        vision([{"role": "user", "content": [{"type": "audio"}]}])


# ---- a checkpoint's own template


def test_special_tokens_of_the_template_are_recognised():
    tokenizer = build()
    ids = tokenizer.apply_chat_template(QUESTION)
    assert ids == [tokenizer.cls_token_id, *tokenizer.encode("User: Hi\nAssistant: ")]
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(QUESTION, tokenize=False)


def test_built_in_template_follows_the_tokenizer():
    assert build().apply_chat_template(QUESTION, tokenize=False) == plain(QUESTION)
    assert build(("<|im_start|>",)).apply_chat_template(QUESTION, tokenize=False) == thinking(QUESTION)


def test_own_template_goes_first_and_sees_the_variables():
    template = (
        "{{ sep_token }}|{{ enable_thinking is defined }}|{{ tools is none }}|{{ add_generation_prompt }}|{{ x }}"
    )
    tokenizer = build(chat_template=template)
    assert tokenizer.apply_chat_template(QUESTION, tokenize=False, x=3) == f"{END}|False|True|True|3"
    text = tokenizer.apply_chat_template(
        QUESTION, False, False, enable_thinking=False, tools=[TOOL], chat_template=template
    )
    assert text == f"{END}|True|False|False|"


def test_choice_between_named_templates():
    choose = functools.partial(choose_template, thinks_in_turns=False)
    named = {"default": "a", "tool_use": "b"}
    assert choose(named, None, has_tools=False) == "a"
    assert choose(named, None, has_tools=True) == "b"
    assert choose(named, "default", has_tools=True) == "a"
    assert choose(named, "{{ other }}", has_tools=True) == "{{ other }}"
    assert choose({"only": "c"}, None, has_tools=False) == "c"
    with pytest.raises(ErnieError, match="one, two and none is the default"):
        choose({"one": "c", "two": "d"}, None, has_tools=False)


def test_other_parts_reach_the_template_unmodified():
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x.png"}}], "extra": 1}
    template = "{{ messages[0].content[0].image_url.url }} {{ messages[0].extra }}"
    assert render_chat(template, [message]) == "x.png 1"


def test_environment_of_published_templates():
    template = """{% for m in messages %}
    {% if loop.index0 == 1 %}
        {% break %}
    {% endif %}
{{ m | tojson }}
{% endfor %}
{{ strftime_now('%Y') | length }}"""
    messages = [{"role": "user", "content": "<问&>"}, *QUESTION]
    assert render_chat(template, messages) == '{"role": "user", "content": "<问&>"}\n4'


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ messages['__class__'] }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_sandbox_refuses_unsafe_access(template):
    with pytest.raises(TokenizerError, match="chat template: refused"):
        render_chat(template, QUESTION)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% if %}", "line 1: not valid Jinja"),
        ("{{ raise_exception('no way') }}", "chat template: no way"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ 'a' + messages }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ],
)
def test_template_errors(template, message):
    with pytest.raises(ErnieError, match=message):
        render_chat(template, QUESTION)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "messages is 'Hi', expected a list"),
        ({"role": "user"}, "expected a list"),
        ([], r"messages is \[\]"),
        ([QUESTION], r"messages\[0\] is .* one by one"),
        ([{"content": "Hi"}], r'messages\[0\]\["role"\] is None'),
        ([*QUESTION, {"role": "user"}], r'messages\[1\]\["content"\] is None'),
        ([{"role": "user", "content": 3}], r'\["content"\] is 3'),
        ([{"role": "user", "content": ["Hi"]}], r"\[0\] is 'Hi'"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], r"expected a dict such as"),
        ([{"role": "user", "content": [{"type": "text"}]}], r'\["text"\] is None'),
    ],
)
def test_malformed_messages(messages, message):
    with pytest.raises(ErnieError, match=message):
        plain(messages)


# ---- parsing

CALL_TEXT = '{"name": "weather", "arguments": {"city": "北京"}}'
CALL = ToolCall("weather", {"city": "北京"})


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Hello\n", None, Response(None, "Hello\n")),
        ("Hello</s>", None, Response(None, "Hello")),
        (f"Hello{END}\n</s>", None, Response(None, "Hello")),
        ("\nR1\nR2\n</think>\n\nA </think> B", True, Response("R1\nR2", "A </think> B")),
        ("<think>\nR\n</think>\n\nA", None, Response("R", "A")),
        ("<think>\nR\n</think>\n\nA", False, Response("R", "A")),
        ("R\n</think>A", None, Response("R", "A")),
        ("unfinished", True, Response("unfinished", "")),
        ("<think>\nunfinished", None, Response("unfinished", "")),
        ("\n\n</think>\n\nA", True, Response(None, "A")),
        ("A </think> tag", False, Response(None, "A </think> tag")),
        ("write <response> and <tool_call> tags", None, Response(None, "write <response> and <tool_call> tags")),
        ("", None, Response(None, "")),
    ],
)
def test_parse_plain(text, opened, expected):
    assert parse_response(text, prompt_opened_thinking=opened) == expected
    assert parse_response(text, "ernie-45-vl", opened) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("R\n</think>\n<response>\nA\n</response>\n<|im_end|>", Response("R", "A")),
        ("<think>\nR\n</think>\n<response>\nA <tool_call> B\n</response>\n", Response("R", "A <tool_call> B")),
        ("R</think>\n<response>\ncut off\n\nhere", Response("R", "cut off\n\nhere")),
        (
            f"R\n</think>\n<response>\nA\n</response>\n\n<tool_call>\n{CALL_TEXT}\n</tool_call>\n"
            f"\n<tool_call>\n{CALL_TEXT}\n</tool_call>\n<|im_end|>",
            Response("R", "A", [CALL, CALL]),
        ),
        (f"R\n</think>\n\n<tool_call>\n{CALL_TEXT}\n</tool_call>\n<|im_end|>", Response("R", "", [CALL])),
        ("</think>\n<response>\nA\n</response>\n<tool_call>\nnot json\n</tool_call>",
         Response(None, "A\n<tool_call>\nnot json\n</tool_call>")),
        ("R</think>\n<response>\nA\n</response>\nB", Response("R", "A\nB")),
    ],
)  # fmt: skip
def test_parse_text_thinking(text, expected):
    assert parse_response(text) == expected
    assert parse_response(text, "ernie-x1", prompt_opened_thinking=True) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"R\n</think>\n\n<tool_call>\n{CALL_TEXT}\n</tool_call>", Response("R", "", [CALL])),
        (f"R</think>\n<tool_call>{CALL_TEXT}</tool_call>\n<tool_call>{CALL_TEXT}", Response("R", "", [CALL, CALL])),
        (f"R\n</think>\n\n<tool_call>\n{CALL_TEXT[:-1]}\n</tool_call>\n", Response("R", "", [CALL])),
        (f"R\n</think>\n\n<tool_call>\n{CALL_TEXT[:-2]}\n</tool_call>\n", Response("R", "", [CALL])),
        (
            f"R\n</think>\n\nA\n<tool_call>{CALL_TEXT}</tool_call>",
            Response("R", f"A\n<tool_call>{CALL_TEXT}</tool_call>"),
        ),
        (f"R\n</think>\n <tool_call>{CALL_TEXT}</tool_call>", Response("R", f" <tool_call>{CALL_TEXT}</tool_call>")),
        ("R\n</think>\n<tool_call>{</tool_call>", Response("R", "<tool_call>{</tool_call>")),
        ("R\n</think>\nA", Response("R", "A")),
    ],
)
def test_parse_vision_thinking(text, expected):
    assert parse_response(text) == expected
    assert parse_response(text, "ernie-45-vl-thinking", prompt_opened_thinking=True) == expected


@pytest.mark.parametrize(
    ("body", "call"),
    [
        ('{"name": "f"}', ToolCall("f", {})),
        ('{"name": "f", "arguments": "{\\"a\\": [1, null]}"}', ToolCall("f", {"a": [1, None]})),
        ('{"name": "f", "arguments": "text"}', None),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 3}', None),
        ('{"arguments": {}}', None),
        ("[1]", None),
        ("", None),
        ("[" * 100_000, None),
        ('{"a":' * 100_000, None),
    ],
)
def test_tool_call_bodies(body, call):
    text = f"<tool_call>\n{body}\n</tool_call>"
    for wire_format in ("ernie-x1", "ernie-45-vl-thinking"):
        response = parse_response(text, wire_format)
        assert response == (Response(None, text) if call is None else Response(None, "", [call]))


@settings(deadline=None, max_examples=150)
@given(
    pieces=st.lists(
        st.sampled_from(["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>", "{", "\n"])
        | st.just(CALL_TEXT)
        | st.text("abc ", min_size=1, max_size=3),
        max_size=12,
    ),
    wire_format=st.sampled_from([None, "ernie-45-vl", "ernie-x1", "ernie-45-vl-thinking"]),
    opened=st.sampled_from([None, True, False]),
)
def test_no_word_is_lost(pieces, wire_format, opened):
    response = parse_response("".join(pieces), wire_format, opened)
    kept = (response.reasoning or "") + response.content
    letters = "".join(pieces)
    for call in response.tool_calls:
        assert call == CALL
        letters = letters.replace(CALL_TEXT, "", 1)
    for letter in "ac":
        tags = sum(letters.count(tag) * tag.count(letter) for tag in ("</tool_call>", "<tool_call>"))
        kept_tags = sum(kept.count(tag) * tag.count(letter) for tag in ("</tool_call>", "<tool_call>"))
        assert kept.count(letter) - kept_tags == letters.count(letter) - tags


def test_unknown_wire_format():
    with pytest.raises(ErnieError, match="wire_format is 'other', expected None or one of ernie-45-vl, ernie-x1"):
        parse_response("a", "other")


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [("Assistant: ", None), ("<think>", True), ("<think>\n\n</think>\n\n", False), ("</think> <think>\n", True)],
)
def test_prompt_opens_thinking(prompt, opens):
    assert prompt_opens_thinking(prompt) is opens


def test_a_rendered_turn_parses_back():
    call = {"function": {"name": CALL.name, "arguments": CALL.arguments}}
    turn = {"role": "assistant", "content": "A\nB", "reasoning_content": "R", "tool_calls": [call]}
    text = thinking([*QUESTION, turn], add_generation_prompt=False).removeprefix(thinking(QUESTION))
    assert parse_response(text, prompt_opened_thinking=True) == Response("R", "A\nB", [CALL])
