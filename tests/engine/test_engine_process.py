"""The engine in a process of its own: it answers through the client, and ends with whoever started it."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from gear_engine.client import EngineClient
from gear_engine.config import EngineConfig
from gear_engine.protocol import EngineStartError, RequestError, SamplingParams, StepReport


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=16,
                    num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=4096)
    ).save_pretrained(path)  # fmt: skip
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path / "tokenizer.json"))
    return path


def config(folder: Path) -> EngineConfig:
    return EngineConfig(model=str(folder), max_model_len=4000)


async def test_requests_are_answered_refused_and_aborted(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    client = EngineClient(config(folder))
    failures = []

    def broken(report: StepReport) -> None:
        failures.append(report)
        raise ValueError("a listener with a bug")

    client.add_listener(broken)
    try:
        info = await client.start()
        assert info.kv_compression_ratio > 2
        greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        with client.submit("a", [1, 2, 3], greedy) as first, client.submit("b", [1, 2, 3], greedy) as second:
            texts = [[t async for output in stream for t in output.token_ids] for stream in (first, second)]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 6
        assert first.queue_time_s is not None
        assert 0 <= first.queue_time_s < 20
        assert failures  # and still everybody was served
        with pytest.raises(RequestError, match="seed"):
            client.submit("c", [1], SamplingParams(max_tokens=1, seed=1 << 70))
        long = SamplingParams(max_tokens=3000, ignore_eos=True)
        with client.submit("d", [1], long) as stream:
            await anext(stream)
        freed = asyncio.Event()
        client.add_listener(lambda report: None if report.stats.pages_active else freed.set())
        async with asyncio.timeout(20):
            await freed.wait()
        assert client.num_requests == 0
    finally:
        start = time.monotonic()
        await client.close()
    assert time.monotonic() - start < 4.5
    assert client._directory is not None
    assert not client._directory.exists()
    assert "leaked" not in capfd.readouterr().err  # as libraries say of what is frozen when the program ends


async def test_a_model_that_is_not_there_is_one_sentence() -> None:
    client = EngineClient(EngineConfig(model="/no/such/folder"))
    with pytest.raises(EngineStartError, match="no such model folder"):
        await client.start()
    assert client._directory is not None
    assert not client._directory.exists()


SERVER = """
import asyncio, sys
from gear_engine.client import EngineClient
from gear_engine.config import EngineConfig
from gear_engine.protocol import SamplingParams

async def main():
    client = EngineClient(EngineConfig(model=sys.argv[1], max_model_len=4000))
    await client.start()
    with client.submit("a", [1], SamplingParams(max_tokens=3900, ignore_eos=True)) as stream:
        async for output in stream:
            print("running", flush=True)

asyncio.run(main())
"""


def test_the_engine_ends_when_its_server_is_killed(folder: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "running\n"
    engines = psutil.Process(server.pid).children()
    assert len(engines) == 1
    os.kill(server.pid, signal.SIGKILL)
    server.wait()
    server.stdout.close()
    _, alive = psutil.wait_procs(engines, timeout=10)
    assert not alive
