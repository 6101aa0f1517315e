"""What following a JSON schema costs a decode step: the default model, plain and structured in turns.

Prints the lower quartile of both, because the machine may be shared; compiling a grammar is timed apart, because it
happens once and in a thread.
"""

import json
import statistics
import time

from llguidance import LLMatcher

from gear_engine import LLM, SamplingParams
from gear_engine.engine import Engine
from gear_engine.protocol import AddRequest

ROUNDS, STEPS = 6, 15
ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "count": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "minItems": 50, "items": ITEM}


def steps(engine: Engine, batch: int, grammar: str, round_: int) -> list[float]:
    """Seconds of decode steps of `batch` sequences."""
    for i in range(batch):
        params = SamplingParams(max_tokens=200, temperature=0.8, seed=i + 100 * round_, grammar=grammar)
        engine.add(AddRequest(f"{i}", list(range(5, 25)), params))
    engine.step()  # the prompts
    took = []
    for _ in range(STEPS):
        start = time.perf_counter()
        engine.step()
        took.append(time.perf_counter() - start)
    for i in range(batch):
        engine.abort(f"{i}")
    return took


def main() -> None:
    engine = LLM(max_model_len=1024, num_pages=200).engine
    grammar = LLMatcher.grammar_from_json_schema(SCHEMA, overrides={"whitespace_pattern": r"[ \n\r\t]{0,40}"})
    assert engine.grammars is not None
    start = time.perf_counter()
    matcher = engine.grammars.matcher(grammar)
    compile_ms = 1e3 * (time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(100):
        engine.grammars.allowed([matcher])
    mask_ms = 1e3 * (time.perf_counter() - start) / 100
    print(json.dumps({"compile_ms": round(compile_ms, 2), "mask_ms": round(mask_ms, 3)}))
    for batch in (1, 8):
        plain: list[float] = []
        structured: list[float] = []
        for round_ in range(ROUNDS):
            plain += steps(engine, batch, "", round_)
            structured += steps(engine, batch, grammar, round_)
        a, b = (1e3 * statistics.quantiles(times, n=4)[0] for times in (plain, structured))
        share = round(100 * (b / a - 1), 1)
        print(json.dumps({"batch": batch, "plain_ms": round(a, 1), "structured_ms": round(b, 1), "percent": share}))


if __name__ == "__main__":
    main()
