"""A program: `serve` with a scripted engine in a process of its own, for the tests of signals and start-up.

Arguments: the model folder, the settings as JSON, the engine's fields as JSON.
"""

import asyncio
import json
import sys
from pathlib import Path

from scripted_engine import ScriptedEngine

from gear_engine.log_format import configure_logging
from gear_engine.protocol import EngineInfo, EngineStartError
from gear_server.cli import _fail
from gear_server.serving import StartError, bind_all, serve
from gear_server.settings import resolve_settings


class FailingEngine(ScriptedEngine):
    async def start(self) -> EngineInfo:
        raise EngineStartError("the model does not fit: lower --max-model-len")


class SlowEngine(ScriptedEngine):
    async def start(self) -> EngineInfo:
        print("starting", flush=True)
        await asyncio.sleep(60)
        return self.info

    async def close(self) -> None:
        print("closed", flush=True)


ENGINES = {"scripted": ScriptedEngine, "failing": FailingEngine, "slow": SlowEngine}


async def main(folder: str, settings_json: str, engine_json: str) -> None:
    settings = resolve_settings(json.loads(settings_json))
    configure_logging(settings.log_level.upper(), settings.log_format)
    fields = json.loads(engine_json)
    engine = ENGINES[fields.pop("kind", "scripted")](Path(folder), **fields)
    await serve(settings, bind_all(settings), engine)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:]))
    except StartError as error:
        _fail(error, 1)
