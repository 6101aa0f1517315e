"""A tool: the model calls a function, the program runs it, the model answers with what it returned.

pip install openai; start a server with gear-serve. `tool_choice="required"` makes the small default model call for
certain, with arguments that satisfy the schema; a model that was trained on tools decides by itself ("auto"), and makes
more of the result.
"""

import json
import os

from openai import OpenAI

client = OpenAI(
    base_url=f"{os.environ.get('GEAR_URL', 'http://127.0.0.1:8000')}/v1", api_key=os.environ.get("GEAR_API_KEY", "none")
)
model = client.models.list().data[0].id


def get_weather(city: str) -> dict[str, object]:
    return {"city": city, "degrees": 18, "sky": "clear"}


tool = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city, now.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Berlin", "London", "Paris", "Tokyo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
messages = [{"role": "user", "content": "What is the weather in Paris?"}]
asked = client.chat.completions.create(
    model=model, messages=messages, tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
)
call = asked.choices[0].message.tool_calls[0]
arguments = json.loads(call.function.arguments)
print("the model calls:", call.function.name, arguments)

result = get_weather(**arguments)
messages += [
    asked.choices[0].message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)},
]
answer = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=48)
print("the model answers:", answer.choices[0].message.content)
