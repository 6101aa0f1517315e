"""Chat with Anthropic's Python client: count a prompt's tokens, then let the answer stream.

pip install anthropic; start a server with gear-serve. Coding agents that speak this API take the same address
(ANTHROPIC_BASE_URL) and the name of the served model.
"""

import os

from anthropic import Anthropic

client = Anthropic(
    base_url=os.environ.get("GEAR_URL", "http://127.0.0.1:8000"), api_key=os.environ.get("GEAR_API_KEY", "none")
)
model = os.environ.get("GEAR_MODEL", "SmolLM2-135M-Instruct")
question = {"role": "user", "content": "What is the capital of France?"}

count = client.messages.count_tokens(model=model, system="You answer with one sentence.", messages=[question])
print("tokens:", count.input_tokens)
with client.messages.stream(
    model=model,
    system="You answer with one sentence.",
    messages=[question],
    max_tokens=64,
    extra_body={"temperature": 0},
) as stream:
    for text in stream.text_stream:
        print(text, end="", flush=True)
    print()
    message = stream.get_final_message()
print(message.stop_reason, message.usage.input_tokens, message.usage.output_tokens)
