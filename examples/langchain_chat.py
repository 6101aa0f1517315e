"""A LangChain chain: a prompt template, the served model, a parser; invoked, streamed and in a batch.

pip install langchain-openai; start a server with gear-serve.
"""

import os

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI

model = ChatOpenAI(
    base_url=f"{os.environ.get('GEAR_URL', 'http://127.0.0.1:8000')}/v1",
    api_key=os.environ.get("GEAR_API_KEY", "none"),
    model=os.environ.get("GEAR_MODEL", "SmolLM2-135M-Instruct"),
    temperature=0,
    max_tokens=48,
)
prompt = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")])
chain = prompt | model | StrOutputParser()

print("invoke:", chain.invoke({"country": "France"}))
print("stream:", "".join(chain.stream({"country": "Japan"})))
for answer in chain.batch([{"country": "Germany"}, {"country": "France"}]):
    print("batch:", answer)
