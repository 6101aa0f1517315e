"""An answer that is JSON of a schema: a pydantic model through OpenAI's client, a choice and a pattern by hand.

pip install openai; start a server with gear-serve. The schema is followed while the answer is drawn, token by token,
so even a small model cannot answer anything else.
"""

import os

from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI(
    base_url=f"{os.environ.get('GEAR_URL', 'http://127.0.0.1:8000')}/v1", api_key=os.environ.get("GEAR_API_KEY", "none")
)
model = client.models.list().data[0].id


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    is_capital: bool
    population_in_millions: int = Field(ge=0, le=50)


answer = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Tell me about Paris, the capital of France."}],
    response_format=City,
    temperature=0,
)
print("schema:", answer.choices[0].message.parsed)

for name, question, wanted in (
    ("choice", "Is Paris the capital of France?", {"choice": ["yes", "no"]}),
    ("pattern", "What is the capital of Japan?", {"regex": r"The capital of Japan is [A-Z][a-z]{2,12}\."}),
):
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        temperature=0,
        extra_body={"structured_outputs": wanted},
    )
    print(f"{name}:", answer.choices[0].message.content)
