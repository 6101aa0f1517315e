"""Makes dashboard.schema.json from Grafana's types: `python tests/e2e/grafana_schema/make.py`, which needs npm.

Only after a new version of Grafana in deploy/compose.yaml; the tests need neither npm nor the network.
"""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
VERSIONS = {"@grafana/schema": "12.1.0", "typescript": "5.5.4", "typescript-json-schema": "0.65.1"}
PANELS = "./node_modules/@grafana/schema/dist/types/raw/composable/*"
OPTIONS = {"strict": True, "skipLibCheck": True, "module": "esnext", "moduleResolution": "bundler", "target": "es2022"}


def plain(schema: Any) -> Any:
    """Without the prose. A Record<string, unknown> is open, which the generator's --noExtraProps forgets."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    prose = {name for name in ("description", "default") if not isinstance(schema.get(name), dict)}
    small = {name: plain(value) for name, value in schema.items() if name not in prose}
    if "Record<string,unknown>" in small:
        small["Record<string,unknown>"] = {"type": "object"}
    return small


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(HERE / "dashboard.ts", folder)
        (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": VERSIONS}))
        options = OPTIONS | {"paths": {"@panels/*": [PANELS]}}
        (folder / "tsconfig.json").write_text(json.dumps({"compilerOptions": options, "files": ["dashboard.ts"]}))
        for command in (
            ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts"],
            ["npx", "tsc", "--noEmit"],
            ["npx", "typescript-json-schema", "tsconfig.json", "GearDashboard", "--noExtraProps", "--required",
             "--strictNullChecks", "-o", "schema.json"],
        ):  # fmt: skip
            subprocess.run(command, cwd=folder, check=True)
        schema = plain(json.loads((folder / "schema.json").read_text()))
    (HERE / "dashboard.schema.json").write_text(json.dumps(schema, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
