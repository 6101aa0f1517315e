"""A request's messages as chat templates want them: roles that the template knows, calls as objects, tools as text for
a template that was not written for tools.

Knows messages and what a template says of itself; rendering is the template's business.
"""

import json
from typing import Any

from gear_engine.protocol import RequestError
from gear_server.chat_template import ChatTemplate
from gear_server.message_types import CalledTool, Message, Tool

_TOOL_PROMPT = """# Tools

You may call functions to answer. Their signatures, one JSON object a line, are in <tools></tools>:
<tools>
{tools}
</tools>

To call one, write its name and arguments as a JSON object in <tool_call></tool_call>:
<tool_call>
{{"name": "<function>", "arguments": {{}}}}
</tool_call>"""


def template_messages(messages: list[Message], tools: list[Tool], template: ChatTemplate) -> list[dict[str, Any]]:
    """Raises `RequestError` for calls whose arguments are no JSON."""
    fields = [_fields(message, i, template) for i, message in enumerate(messages)]
    if template.uses_tools:
        return fields
    spoken = [_without_tools(one) for one in fields]
    return _with_tool_prompt(spoken, tools) if tools else spoken


def template_tools(tools: list[Tool]) -> list[dict[str, Any]] | None:
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def _fields(message: Message, i: int, template: ChatTemplate) -> dict[str, Any]:
    fields = message.model_dump(exclude_none=True)
    fields["content"] = message.content or ""  # templates add it to other text, which null is not
    if message.role == "developer" and not template.mentions("developer"):
        fields["role"] = "system"  # its older name
    if message.tool_calls:
        fields["tool_calls"] = [_call(call, i) for call in message.tool_calls]
    return fields


def _call(call: CalledTool, i: int) -> dict[str, Any]:
    """Arguments travel as JSON text; templates write them as JSON themselves, and text twice encoded is not read."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except ValueError as error:
        param = f"messages[{i}].tool_calls"
        raise RequestError(
            f"{param}: the arguments of {call.function.name} are not valid JSON: {error}", param
        ) from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _without_tools(fields: dict[str, Any]) -> dict[str, Any]:
    """Calls and their answers as text, for a template that knows only what people say."""
    if fields["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{fields['content']}\n</tool_response>"}
    calls = [
        f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>"
        for call in fields.get("tool_calls", ())
    ]
    content = "\n".join([fields["content"], *calls] if fields["content"] else calls)
    return {**fields, "content": content} if calls else fields


def _with_tool_prompt(messages: list[dict[str, Any]], tools: list[Tool]) -> list[dict[str, Any]]:
    lines = [json.dumps(tool, ensure_ascii=False) for tool in template_tools(tools) or ()]
    prompt = _TOOL_PROMPT.format(tools="\n".join(lines))
    if messages and messages[0]["role"] == "system":
        first = messages[0]
        return [{**first, "content": f"{first['content']}\n\n{prompt}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]
