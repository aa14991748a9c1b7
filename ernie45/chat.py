"""Both directions of a chat: templates from messages to a prompt, and (from `response`) parsing what came back."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ernie45.errors import ErnieError, TokenizerError
from ernie45.response import Response, ToolCall, parse_response, prompt_opens_thinking

if TYPE_CHECKING:
    import jinja2

__all__ = [
    "Message",
    "PLAIN_TEMPLATE",
    "Response",
    "THINKING_TEMPLATE",
    "ToolCall",
    "VISION_TEMPLATE",
    "check_messages",
    "choose_template",
    "parse_response",
    "prompt_opens_thinking",
    "render_chat",
]

Message = Mapping[str, Any]

# The 0.3B, 21B and 300B chat models.
PLAIN_TEMPLATE = r"""
{{- cls_token }}
{%- if tools %}
    {{- raise_exception('the built-in plain chat template has no place for tools: pass a chat_template that has') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + message.content + '\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant: ' + message.content + sep_token }}
    {%- else %}
        {{- raise_exception('the built-in plain chat template has no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant: ' }}
{%- endif -%}
"""

# The text Thinking model. Only turns after the last question keep their reasoning.
THINKING_TEMPLATE = r"""
{%- set thinking = enable_thinking is not defined or enable_thinking %}
{%- set last = namespace(user=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set last.user = loop.index0 %}
    {%- endif %}
{%- endfor %}
{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}
    {{- '<system_setting>\n' + messages[0].content + '\n</system_setting>\n\n' }}
{%- endif %}
{{- '<global_setting>\nthink_mode=' ~ ('True' if thinking else 'False') ~ '\n</global_setting>' }}
{%- if tools %}
    {{- '\n\n<tool_list>\n' + tools | tojson + '\n</tool_list>' }}
{%- endif %}
{{- '<|im_end|>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '\n\n<|im_start|>user\n' + message.content + '<|im_end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '\n\n<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '\n\n<|im_start|>assistant\n' }}
        {%- if loop.index0 > last.user and message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n' }}
        {%- endif %}
        {%- if message.content %}
            {{- '<response>\n' + message.content + '\n</response>\n' }}
        {%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments %}
            {{- '\n<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>\n' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- raise_exception('the built-in thinking chat template has no role ' + message.role + ' here') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\n\n<|im_start|>assistant\n' + ('<think>\n' if thinking else '') }}
{%- endif -%}
"""

# The vision-language models. A part of type image_url or video_url becomes the marker in whose place `ErnieProcessor`
# puts the tokens of the picture or video. Thinks only where enable_thinking is true.
VISION_TEMPLATE = r"""
{%- set seen = namespace(pictures=0, videos=0) %}
{%- macro say(content) %}
    {%- if content is string %}
        {{- content }}
    {%- else %}
        {%- for part in content or [] %}
            {%- if part.type == 'text' %}
                {{- part.text }}
            {%- elif part.type == 'image_url' %}
                {%- set seen.pictures = seen.pictures + 1 %}
                {{- 'Picture ' ~ seen.pictures ~ ':<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>' }}
            {%- elif part.type == 'video_url' %}
                {%- set seen.videos = seen.videos + 1 %}
                {{- 'Video ' ~ seen.videos ~ ':<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>' }}
            {%- else %}
                {{- raise_exception('the built-in vision chat template has no part of type ' + part.type) }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{{- cls_token }}
{%- if tools %}
    {{- '\n<tool_list>\n' + tools | tojson + '\n</tool_list>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- say(message.content) + '\n' }}
    {%- elif message.role == 'user' %}
        {{- 'User: ' + say(message.content) + '\n' }}
    {%- elif message.role == 'tool' %}
        {{- 'User: <tool_output>\n' + say(message.content) + '\n</tool_output>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- 'Assistant: ' }}
        {%- if message.reasoning_content %}
            {{- '<think>\n' + message.reasoning_content + '\n</think>\n' }}
        {%- endif %}
        {{- say(message.content) }}
        {%- for call in message.tool_calls or [] %}
            {%- set function = call.function or call %}
            {%- set arguments = function.arguments %}
            {{- '\n<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
            {{- (arguments if arguments is string else arguments | tojson) + '}\n</tool_call>' }}
        {%- endfor %}
        {{- sep_token }}
    {%- else %}
        {{- raise_exception('the built-in vision chat template has no role ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant: ' + ('<think>' if enable_thinking else '<think>\n\n</think>\n\n') }}
{%- endif -%}
"""


def choose_template(
    templates: Mapping[str, str], requested: str | None, *, has_tools: bool, thinks_in_turns: bool
) -> str:
    """The template to render.

    Args:
        templates: those of the checkpoint, by name.
        requested: the name of one of them, or the source of another one, or None.
        has_tools: prefer the one named "tool_use".
        thinks_in_turns: the tokenizer has `<|im_start|>`: without a template of its own it is the Thinking model.
    """
    if requested is not None:
        return templates.get(requested, requested)
    if not templates:
        return THINKING_TEMPLATE if thinks_in_turns else PLAIN_TEMPLATE
    if has_tools and "tool_use" in templates:
        return templates["tool_use"]
    if "default" not in templates and len(templates) > 1:
        raise ErnieError(
            f"this checkpoint has the chat templates {', '.join(sorted(templates))} and none is the default: "
            "pass the name of one as chat_template."
        )
    return templates.get("default", next(iter(templates.values())))


def render_chat(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """Render `template` in a sandbox.

    Args:
        template: Jinja source. Besides `variables` it sees `messages`, `raise_exception(text)`, `strftime_now(format)`
            and a `tojson` filter that keeps non-ASCII text.
        messages: [{"role": str, "content": str or a list of OpenAI parts, ...}, ...]. Lists of only text parts are
            joined to a string; other content reaches the template as it is.
        variables: those whose value is None (except tools) are left undefined, which templates tell from False.

    Raises:
        ErnieError: the messages are malformed, or the template rejects them.
        TokenizerError: the template is not valid Jinja, or reaches for something unsafe.
    """
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    check_messages(messages)
    defined = {name: value for name, value in variables.items() if value is not None or name == "tools"}
    try:
        return _compile(template).render(messages=[_join_text_parts(message) for message in messages], **defined)
    except TemplateSyntaxError as error:
        raise TokenizerError(f"chat template, line {error.lineno}: not valid Jinja: {error}. Correct it.") from error
    except SecurityError as error:
        raise TokenizerError(f"chat template: refused, it reaches for something unsafe: {error}") from error
    except TemplateError as error:
        raise ErnieError(f"chat template: {error}") from error
    except Exception as error:  # a template is a program: adding a string to a list, for one, is a TypeError
        raise ErnieError(
            f"chat template: cannot render these messages ({type(error).__name__}: {error}). Does it take content "
            "that is a list of parts, or none?"
        ) from error


def check_messages(messages: Sequence[Message], where: str = "messages") -> None:
    """Raise ErnieError unless `messages`, which errors call `where`, is one conversation in the OpenAI form."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ErnieError(
            f'{where} is {_short(messages)}, expected a list such as [{{"role": "user", "content": "Hello"}}].'
        )
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ErnieError(
                f"{where}[{index}] is {_short(message)}, expected a dict with role and content "
                "(render several conversations one by one)."
            )
        _check_message(message, f"{where}[{index}]")


def _check_message(message: Message, where: str) -> None:
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ErnieError(f'{where}["role"] is {_short(role)}, expected a text such as "user" or "assistant".')
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return
    if not isinstance(content, (str, list)):
        raise ErnieError(f'{where}["content"] is {_short(content)}, expected a text or a list of parts.')
    for number, part in enumerate(content if isinstance(content, list) else []):
        if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
            raise ErnieError(
                f'{where}["content"][{number}] is {_short(part)}, expected a dict such as '
                '{"type": "text", "text": "Hello"}.'
            )
        if part["type"] == "text" and not isinstance(part.get("text"), str):
            raise ErnieError(f'{where}["content"][{number}]["text"] is {_short(part.get("text"))}, expected a text.')


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join_text_parts(message: Message) -> Message:
    content = message.get("content")
    if not isinstance(content, list) or any(part["type"] != "text" for part in content):
        return message
    return {**message, "content": "".join(part["text"] for part in content)}


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """Compile with the settings that published templates are written for."""
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # The default is a silent empty value, which only fails when more is done with it.
            raise SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and non-ASCII characters, which prompts must not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
