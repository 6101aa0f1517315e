"""Sweep the page format: bits an element against KL divergence on real text, and which formats nothing beats.

    python bench/sweep.py [--context 2048] [--num-texts 1] [--json OUT]

Runs on the CPU, about ten seconds a format and text with the default model. A format is on the Pareto front if no
other has both fewer bits and a smaller KL.
"""

import argparse
import datetime
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gear_compression.config import GearConfig, LayerConfig, PartConfig
from gear_engine.fidelity.subjects import exact_subject, format_subject, subjects
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.fidelity.texts import cut
from gear_engine.model_files import model_folder
from gear_engine.model_loader import load_model

BASE = GearConfig(
    keys=PartConfig(bits=4, scale_bits=8, rank=8, factor_bits=4, low_rank_first=True),
    values=PartConfig(bits=4, scale_bits=8, symmetric=True, rotate=True),
    sink_tokens=1,
)


def formats() -> dict[str, GearConfig]:
    """The grid: keys by themselves, values by themselves, and what is global."""
    keys: dict[str, dict[str, Any]] = {
        "K4": {"rank": 0},
        "K5": {"rank": 0, "bits": 5},
        "K3": {"rank": 0, "bits": 3},
        "K4g32": {"rank": 0, "group_size": 32},
        "K5g64": {"rank": 0, "bits": 5, "group_size": 64},
        "K5g32": {"rank": 0, "bits": 5, "group_size": 32},
        "K3g32": {"rank": 0, "bits": 3, "group_size": 32},
        "K4r4": {"rank": 4},
        "K4r8": {},
        "K4r12": {"rank": 12},
        "K3r8": {"bits": 3},
        "K4r8o2": {"outliers": 2},
        "K4r8f8": {"factor_bits": 8},
        "K4r8after": {"low_rank_first": False},
        "K4r8s16": {"scale_bits": 16},
        "K4r8rotated": {"rotate": True},
    }
    values: dict[str, dict[str, Any]] = {
        "V2": {"bits": 2},
        "V3": {"bits": 3},
        "V5": {"bits": 5},
        "V4asym": {"symmetric": False},
        "V4plain": {"rotate": False, "symmetric": False},
        "V4g32": {"group_size": 32},
        "V4r2": {"rank": 2, "factor_bits": 4},
        "V4o2": {"outliers": 2},
    }
    found = {f"{name} V4": replace(BASE, keys=replace(BASE.keys, **knobs)) for name, knobs in keys.items()}
    found |= {f"K4r8 {name}": replace(BASE, values=replace(BASE.values, **knobs)) for name, knobs in values.items()}
    found |= {
        "K4r8 V4 no sinks": replace(BASE, sink_tokens=0),
        "K4r8 V4 4 sinks": replace(BASE, sink_tokens=4),
        "K4r8 V4 page 64": replace(BASE, page_size=64),
        "K4r8 V4 page 256": replace(BASE, page_size=256),
        "K4g32 V3": replace(BASE, keys=_part(keys["K4g32"]), values=replace(BASE.values, bits=3)),
        "K3g32 V3": replace(BASE, keys=_part(keys["K3g32"]), values=replace(BASE.values, bits=3)),
        "K3g32 V2": replace(BASE, keys=_part(keys["K3g32"]), values=replace(BASE.values, bits=2)),
        "K3r8 V3": replace(BASE, keys=replace(BASE.keys, bits=3), values=replace(BASE.values, bits=3)),
        "K3r8 V2": replace(BASE, keys=replace(BASE.keys, bits=3), values=replace(BASE.values, bits=2)),
        "K4r8 V4, outer layers K5": _with_layers((0, 1, 2, 27, 28, 29), replace(BASE.keys, bits=5), BASE.values),
        "K4r8 V4, outer layers V3": _with_layers((0, 1, 2, 27, 28, 29), BASE.keys, replace(BASE.values, bits=3)),
        "K4r8 V4, inner layers K5": _with_layers(range(6, 24), replace(BASE.keys, bits=5), BASE.values),
    }
    return found


def _with_layers(layers: Iterable[int], keys: PartConfig, values: PartConfig) -> GearConfig:
    """BASE, but for some of the default model's 30 layers. `gear-fidelity --tune` searches these."""
    return replace(BASE, layers=tuple(LayerConfig(layer, keys, values) for layer in layers))


def _part(knobs: dict[str, Any]) -> PartConfig:
    return replace(BASE.keys, **knobs)


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that no other beats in both bits and KL, by bits."""
    best, kept = float("inf"), []
    for row in sorted(rows, key=lambda row: (row["bits_per_element"], row["kl_mean"])):
        if row["kl_mean"] < best:
            best = row["kl_mean"]
            kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--num-texts", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = model_folder(None)
    loaded = load_model(folder, "cpu", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, verbose=False)["input_ids"]

    texts = cut([], tokenize, arguments.context, arguments.num_texts, page_size=256)
    candidates = [format_subject(loaded, name, config) for name, config in formats().items()]
    compared = [*candidates, *subjects(loaded, ["fp8"])]
    measured = compare(exact_subject(loaded, "exact"), compared, texts, lambda name: None)
    rows = [
        {"format": subject.name, "bits_per_element": subject.bits_per_element, **measured[subject.name].summary()}
        for subject in compared
        if subject.name in measured
    ]
    on_front = {row["format"] for row in front(rows)}
    for row in sorted(rows, key=lambda row: row["bits_per_element"]):
        mark = "front" if row["format"] in on_front else ""
        print(f"{row['format']:<26}{row['bits_per_element']:>7.3f} bits   KL {row['kl_mean']:.5f}   {mark}")
    if arguments.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "model": "SmolLM2-135M-Instruct",
            "context": arguments.context,
            "num_texts": len(texts),
            "command": f"python bench/sweep.py --context {arguments.context} --num-texts {arguments.num_texts}",
            "rows": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
