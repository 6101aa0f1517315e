"""Who may import whom: compression nothing of ours, the engine compression, the server the engine's client alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "compression/gear_compression": {"gear_compression"},
    "engine/gear_engine": {"gear_engine", "gear_compression"},
    "server/gear_server": {
        "gear_server",
        *(f"gear_engine.{name}" for name in ("client", "protocol", "config", "log_format")),
    },
    "loadtest/gear_loadtest": {"gear_loadtest"},
}


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name for name in names if name.startswith("gear_")}


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_package_imports_only_what_it_may(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for name in imported(file):
            allowed = any(name == rule or name.startswith(f"{rule}.") for rule in ALLOWED[folder])
            assert allowed, f"{file} imports {name}"


@pytest.mark.parametrize("module", ["gear_server.app", "gear_loadtest.cli"])
def test_the_server_and_the_load_tester_start_without_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
