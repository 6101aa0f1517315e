"""Starting `gear-serve` as a user would, on a free port of the loopback."""

import os
import socket
import subprocess
import sys

MODEL = "SmolLM2-135M-Instruct"
START_TIMEOUT_S = 240  # the first start converts the model


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(*arguments: str) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GEAR_")}
    command = [sys.executable, "-c", "from gear_server.cli import main; main()", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
