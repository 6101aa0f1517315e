"""Tokenizers of a few hundred tokens, one for each way in which models turn tokens into text.

Built here so that no test needs a model.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

EOS = "<|end|>"
BOS = "<|begin|>"
CORPUS = [
    "Hello world, this is a small text to learn merges from.",
    "It has letters, numbers 12345 and signs: () [] {}!?",
    "naïve café, Grüße, 你好世界, こんにちは, 🎉🎈 and 👩‍👩‍👧‍👦 families",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM have it; with an added token that is not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("…→", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: ▁ for spaces, bytes for characters outside the vocabulary."""
    pieces = ["▁", "▁hello", "▁world", "lo", "é", "a", "b", "c", ".", ",", "▁▁"]
    tokens = [EOS, BOS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([EOS, BOS])
    return tokenizer


def metaspace() -> Tokenizer:
    """As SentencePiece unigram models have it."""
    words = [(EOS, 0.0), (BOS, 0.0), ("<unk>", 0.0)]
    words += [(piece, -float(i)) for i, piece in enumerate(["▁", "▁the", "▁cat", "s", "▁sat", ".", "é", "▁▁"], 1)]
    tokenizer = Tokenizer(models.Unigram(words, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([EOS, BOS])
    return tokenizer


def write_model(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    chat_template: str | None = CHAT_TEMPLATE,
    config: dict[str, Any] | None = None,
) -> Path:
    """The files that the server reads beside the weights."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": {"content": EOS, "special": True}} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder
