"""Chat with OpenAI's Python client: whole, as a stream, several at once, and through the Responses API.

pip install openai; start a server with gear-serve.
"""

import asyncio
import os

from openai import AsyncOpenAI, OpenAI

URL = os.environ.get("GEAR_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("GEAR_API_KEY", "none")

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY)
model = client.models.list().data[0].id

answer = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France?"}],
    temperature=0,
)
print("whole:", answer.choices[0].message.content)

print("stream: ", end="")
stream = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of Japan?"}],
    temperature=0,
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()


async def ask_all(questions: list[str]) -> list[str]:
    async with AsyncOpenAI(base_url=f"{URL}/v1", api_key=KEY) as client:
        answers = await asyncio.gather(
            *(client.responses.create(model=model, input=question, temperature=0) for question in questions)
        )
    return [answer.output_text for answer in answers]


for text in asyncio.run(ask_all(["What is the capital of Germany?", "What is the capital of France?"])):
    print("response:", text)
