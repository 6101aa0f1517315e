#!/usr/bin/env bash
# The API with nothing but curl: a chat, a stream, a completion with log-probabilities, tokens.
set -euo pipefail

URL=${GEAR_URL:-http://127.0.0.1:8000}

post() {
  curl --silent --show-error --fail-with-body --no-buffer "$URL$1" \
    -H "Authorization: Bearer ${GEAR_API_KEY:-none}" -H "Content-Type: application/json" -d "$2"
  echo
}

echo "== chat"
post /v1/chat/completions '{
  "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'

echo "== chat, streamed: events end with [DONE]"
post /v1/chat/completions '{
  "messages": [{"role": "user", "content": "What is the capital of Japan?"}], "temperature": 0, "stream": true,
  "stream_options": {"include_usage": true}}'

echo "== completion, with the two likeliest tokens at each place"
post /v1/completions '{"prompt": "The capital of Spain is", "max_tokens": 2, "temperature": 0, "logprobs": 2}'

echo "== tokens"
post /tokenize '{"prompt": "Hello world"}'

echo "== what is refused says why"
curl --silent "$URL/v1/embeddings" -H "Content-Type: application/json" -d '{"input": "Hello"}'
echo
