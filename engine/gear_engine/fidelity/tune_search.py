"""The search of `gear-fidelity --tune`: the smallest page format, layer by layer, that meets a KL target on a model.

Everything is measured through the engine's own attention. KL is close to additive in small perturbations, so

    KL(format) ≈ KL(finest) + Σ over blocks of layers b, over keys and values of gain[step of b] · share[b]

where `gain` is what a step costs in all layers at once and `share` how much of such a cost each block is to blame for.
The smallest predicted format is then verified on other text, and the prediction corrected until the target is just met.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from gear_compression.config import PRESETS, GearConfig, LayerConfig, PartConfig
from gear_compression.layout import layout_for
from gear_engine.fidelity.subjects import exact_subject, format_subject
from gear_engine.fidelity.teacher_forced import compare
from gear_engine.model_loader import LoadedModel

MAX_BLOCKS = 10  # of layers that get one format: each costs two measurements
MAX_VERIFICATIONS = 6
CLOSE_ENOUGH = 0.97  # of the target: what a smaller format could still win is within the noise of the text
SHIPPED = ("near-lossless", "balanced", "max-compression")

_KEYS = PartConfig(scale_bits=8)
_FITTED = replace(_KEYS, factor_bits=4, low_rank_first=True)
KEY_STEPS = {  # the first is the finest
    "8": replace(_KEYS, bits=8),
    "5r12": replace(_FITTED, bits=5, rank=12),
    "5r8": replace(_FITTED, bits=5, rank=8),
    "5": replace(_KEYS, bits=5),
    "4r12": replace(_FITTED, bits=4, rank=12),
    "4r8": replace(_FITTED, bits=4, rank=8),
    "4r8o2": replace(_FITTED, bits=4, rank=8, outliers=2),
    "4g32": replace(_KEYS, bits=4, group_size=32),
    "4": replace(_KEYS, bits=4),
    "3r12": replace(_FITTED, bits=3, rank=12),
    "3r8": replace(_FITTED, bits=3, rank=8),
    "3g32": replace(_KEYS, bits=3, group_size=32),
    "2r12": replace(_FITTED, bits=2, rank=12),
    "2g32": replace(_KEYS, bits=2, group_size=32),
}
VALUE_STEPS = {str(bits): PartConfig(bits=bits, scale_bits=8, symmetric=True, rotate=True) for bits in (8, 5, 4, 3, 2)}
ROTATION_PROBES = ("4r8", "3g32")  # keys are rotated if that is better for both
KEY_PROBE, VALUE_PROBE = "3g32", "2"  # coarse enough for one block's cost to stand out from the noise

OnStep = Callable[[str], None]
Texts = list[list[int]]


class TuneError(ValueError):
    """No format can be written; the message names the remedy."""


@dataclass(slots=True)
class Found:
    """A format that was verified on the held-out texts."""

    name: str
    config: GearConfig
    bits_per_element: float
    held_out_kl: float


@dataclass(slots=True)
class Tuned:
    """The outcome: `best` meets the target. `verified` are all formats that were measured on the held-out texts."""

    best: Found
    verified: list[Found]
    calibration_kl: float | None  # of `best`; None when interrupted before
    interrupted: bool
    num_layers: int


@dataclass(slots=True)
class Tuner:
    """A model, its texts and what has been verified so far."""

    loaded: LoadedModel
    calibration: Texts
    held_out: Texts
    target: float
    on_step: OnStep  # called with what is being measured, once for every format and chunk of text
    verified: list[Found] = field(default_factory=list)
    rotate_keys: bool = False

    def run(self) -> Tuned:
        """Raises TuneError when nothing meets the target, or nothing did before an interrupt."""
        try:
            self._verify({**{name: _shipped(name) for name in SHIPPED}, "finest": _finest()})
            self._check_reachable()
            self._search(*self._costs())
            interrupted, calibration_kl = (
                False,
                self._measure({"tuned": self._best().config}, self.calibration)["tuned"],
            )
        except KeyboardInterrupt:
            interrupted, calibration_kl = True, None
        if not self._meeting():
            raise TuneError("interrupted before any format met the target; nothing was written")
        return Tuned(self._best(), self.verified, calibration_kl, interrupted, self.loaded.num_layers)

    def _meeting(self) -> list[Found]:
        return [found for found in self.verified if found.held_out_kl <= self.target]

    def _best(self) -> Found:
        return min(self._meeting(), key=lambda found: (found.bits_per_element, found.held_out_kl))

    def _check_reachable(self) -> None:
        if not self._meeting():
            best = min(self.verified, key=lambda found: found.held_out_kl)
            raise TuneError(
                f"KL {self.target:g} is out of reach: the finest format ({best.bits_per_element:.2f} bits an element) "
                f"has {best.held_out_kl:.2g} on this text; pass a --target-kl above that, or serve with --preset none"
            )

    def _measure(self, formats: dict[str, GearConfig], texts: Texts) -> dict[str, float]:
        """Mean KL of each format. Raises KeyboardInterrupt."""
        interrupted = False

        def on_step(name: str) -> None:
            nonlocal interrupted
            interrupted = interrupted or name == "interrupted"
            self.on_step(name)

        others = [format_subject(self.loaded, name, config) for name, config in formats.items()]
        measured = compare(exact_subject(self.loaded, "exact"), others, texts, on_step)
        if interrupted:
            raise KeyboardInterrupt
        return {name: float(measured[name].summary()["kl_mean"]) for name in formats}  # type: ignore[arg-type]

    def _verify(self, formats: dict[str, GearConfig]) -> float:
        """Measure on the held-out texts and remember. Returns the KL of the last."""
        kl = self._measure(formats, self.held_out)
        for name, config in formats.items():
            self.verified.append(Found(name, config, self._bits(config), kl[name]))
        return self.verified[-1].held_out_kl

    def _bits(self, config: GearConfig) -> float:
        loaded = self.loaded
        return layout_for(config, loaded.num_layers, loaded.num_kv_heads, loaded.head_dim, 2).bits_per_element

    @property
    def num_measurements(self) -> tuple[int, int]:
        """Most formats that are measured on the calibration texts and on the held-out ones, the exact model apart."""
        ladder = 2 * len(ROTATION_PROBES) + len(KEY_STEPS) + len(VALUE_STEPS)
        return ladder + 2 * len(self._blocks) + 1, len(SHIPPED) + 1 + MAX_VERIFICATIONS

    @property
    def _blocks(self) -> list[range]:
        num_layers = self.loaded.num_layers
        count = min(num_layers, MAX_BLOCKS)
        return [range(i * num_layers // count, (i + 1) * num_layers // count) for i in range(count)]

    def _costs(self) -> tuple[float, list["Choice"]]:
        """(KL of the finest format, for each block and part what its steps cost), on the calibration texts."""
        self._decide_rotation()
        key_steps = {name: replace(part, rotate=self.rotate_keys) for name, part in KEY_STEPS.items()}
        ladder = {f"keys {name}": _uniform(part, VALUE_STEPS["8"]) for name, part in key_steps.items()}
        ladder |= {f"values {name}": _uniform(key_steps["8"], part) for name, part in VALUE_STEPS.items()}
        kl = self._measure(ladder, self.calibration)
        floor = kl["keys 8"]

        probes = {}
        for i, block in enumerate(self._blocks):
            finest = (key_steps["8"], VALUE_STEPS["8"])
            probes[f"keys of block {i}"] = _with_block(finest, block, (key_steps[KEY_PROBE], VALUE_STEPS["8"]))
            probes[f"values of block {i}"] = _with_block(finest, block, (key_steps["8"], VALUE_STEPS[VALUE_PROBE]))
        blame = self._measure(probes, self.calibration)
        choices = []
        for kind, steps in (("keys", key_steps), ("values", VALUE_STEPS)):
            shares = _shares([blame[f"{kind} of block {i}"] - floor for i in range(len(self._blocks))])
            for block, share in zip(self._blocks, shares, strict=True):
                costs = {name: max(kl[f"{kind} {name}"] - floor, 0.0) * share for name in steps}
                choices.append(Choice(block, kind == "keys", [self._step(part, kind == "keys", costs[name], len(block))
                                                              for name, part in steps.items()]))  # fmt: skip
        return floor, choices

    def _decide_rotation(self) -> None:
        """Rotated keys help one model and double the KL of another."""
        probes = {}
        for name in ROTATION_PROBES:
            for rotate in (False, True):
                keys = replace(KEY_STEPS[name], rotate=rotate)
                probes[f"keys {name}{' rotated' if rotate else ''}"] = _uniform(keys, VALUE_STEPS["8"])
        kl = self._measure(probes, self.calibration)
        self.rotate_keys = all(kl[f"keys {name} rotated"] < kl[f"keys {name}"] for name in ROTATION_PROBES)

    def _step(self, part: PartConfig, is_keys: bool, kl: float, num_layers: int) -> "Step":
        """Bits an element that the other part has too cancel in every comparison of steps."""
        config = _uniform(part, VALUE_STEPS["8"]) if is_keys else _uniform(KEY_STEPS["8"], part)
        return Step(part, self._bits(config) * num_layers, kl)

    def _search(self, floor: float, choices: list["Choice"]) -> None:
        """Verify the smallest predicted format; ask for more or less in the next, as the measured KL says."""
        meets, fails = 0.0, float("inf")  # predicted KL of formats known to meet the target, and to fail
        predicted = self.target
        seen: list[GearConfig] = []
        for number in range(1, MAX_VERIFICATIONS + 1):
            config, at = self._smallest(floor, choices, predicted)
            if config in seen:
                if meets:
                    return
                predicted *= 0.7
                continue
            seen.append(config)
            measured = self._verify({f"tuned, try {number}": config})
            if CLOSE_ENOUGH * self.target <= measured <= self.target:
                return
            if measured <= self.target:
                meets = max(meets, at)
            else:
                fails = min(fails, at)
            predicted = at * self.target / measured
            if not meets < predicted < fails:
                predicted = (meets + fails) / 2 if fails < float("inf") else 2 * at

    def _smallest(self, floor: float, choices: list["Choice"], limit: float) -> tuple[GearConfig, float]:
        """(the smallest format whose predicted KL is at most `limit`, that KL): one price of KL for all blocks."""

        def at_price(price: float) -> tuple[list[Step], float]:
            steps = [min(choice.steps, key=lambda step: step.bits + price * step.kl) for choice in choices]
            return steps, floor + sum(step.kl for step in steps)

        low, high = 1e-3, 1e9  # bits · layers a nat
        for _ in range(60):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if at_price(middle)[1] <= limit else (middle, high)
        steps, predicted = at_price(high)
        keys: dict[int, PartConfig] = {}
        values: dict[int, PartConfig] = {}
        for choice, step in zip(choices, steps, strict=True):
            for layer in choice.block:
                (keys if choice.is_keys else values)[layer] = step.part
        return _config([(keys[layer], values[layer]) for layer in range(self.loaded.num_layers)]), predicted


@dataclass(frozen=True, slots=True)
class Step:
    """One way to store a block's keys or values."""

    part: PartConfig
    bits: float  # an element, times layers
    kl: float  # predicted, above the finest


@dataclass(frozen=True, slots=True)
class Choice:
    block: range  # layers
    is_keys: bool
    steps: list[Step]


def _shares(blame: list[float]) -> list[float]:
    """Parts of 1. Noise makes a block without blame negative; it gets a little, or its bits would be free to take."""
    total = sum(max(b, 0.0) for b in blame) or 1.0
    raised = [max(b / total, 0.1 / len(blame)) for b in blame]
    return [share / sum(raised) for share in raised]


def _shipped(name: str) -> GearConfig:
    config = PRESETS[name]
    assert isinstance(config, GearConfig)
    return config


def _finest() -> GearConfig:
    return _uniform(KEY_STEPS["8"], VALUE_STEPS["8"])


def _uniform(keys: PartConfig, values: PartConfig) -> GearConfig:
    return GearConfig(keys=keys, values=values, sink_tokens=1)


def _with_block(rest: tuple[PartConfig, PartConfig], block: range, own: tuple[PartConfig, PartConfig]) -> GearConfig:
    return replace(_uniform(*rest), layers=tuple(LayerConfig(layer, *own) for layer in block))


def _config(parts: list[tuple[PartConfig, PartConfig]]) -> GearConfig:
    """The format with these parts in each layer: the commonest pair, and the layers that differ."""
    ((common, _),) = Counter(parts).most_common(1)
    own = tuple(LayerConfig(layer, *pair) for layer, pair in enumerate(parts) if pair != common)
    return replace(_uniform(*common), layers=own)
