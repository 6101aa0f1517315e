#!/usr/bin/env bash
# lm-evaluation-harness against a running server: local-completions with log-probabilities, local-chat-completions.
#
# pip install 'lm-eval[api]'; start a server with gear-serve. No data set is downloaded: twelve capitals lie beside this.
set -euo pipefail
cd "$(dirname "$0")"

URL=${GEAR_URL:-http://127.0.0.1:8000}
MODEL=${GEAR_MODEL:-SmolLM2-135M-Instruct}
# The harness counts tokens itself: a folder with the model's tokenizer, or its hub name.
TOKENIZER=${TOKENIZER:-$(python -c 'from gear_engine.model_files import model_folder; print(model_folder(None))')}
export OPENAI_API_KEY=${GEAR_API_KEY:-none} HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1

lm_eval run --model local-completions --include_path . --tasks capitals_choice --batch_size 4 \
  --model_args "model=$MODEL,base_url=$URL/v1/completions,num_concurrent=4,tokenizer=$TOKENIZER"
lm_eval run --model local-chat-completions --include_path . --tasks capitals_generate --apply_chat_template \
  --model_args "model=$MODEL,base_url=$URL/v1/chat/completions,num_concurrent=4"
