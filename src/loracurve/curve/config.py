"""Options of a curve and of its adapters. No torch here: options are read before it is imported."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, cast, get_args

from loracurve.curve.spec import FREE_SEGMENTS, CurveSpec
from loracurve.system.errors import UserError, nearest, one_line
from loracurve.system.ranges import Amount, PartBelowOne, Points, Positive, Range, Rank, Slots, check_ranges, in_range

__all__ = ["Alignment", "CurveConfig", "LoraOptions", "Rule", "Sampling", "check_points", "check_sampling"]

Alignment = Literal["none", "balanced", "procrustes", "balanced+procrustes"]

Rule = Literal["uniform", "gauss-legendre", "monte-carlo"]

Sampling = Literal["stratified", "uniform", "arc-length", "half-period"]


@dataclass(frozen=True)
class LoraOptions:
    """The adapters; names as in `peft.LoraConfig`."""

    r: Rank = 8
    """Rank."""
    lora_alpha: Positive = 16
    """Scaling numerator: updates are scaled by lora_alpha / r."""
    target_modules: str | list[str] = "all-linear"
    """Names or a regular expression of the adapted linear maps, or all-linear."""
    lora_dropout: PartBelowOne = 0.0
    """Dropout on the adapters' input while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    layers_to_transform: list[Amount] | None = None
    """Adapt these layers only; lower ones then run once for all points (not in sequence classifiers)."""
    modules_to_save: list[str] | None = None
    """Linear layers trained whole beside the adapters (a new classification head is added by itself)."""
    rank_pattern: dict[str, Rank] = field(default_factory=dict)
    """Ranks that differ from r, by module name."""
    alpha_pattern: dict[str, Positive] = field(default_factory=dict)
    """Alphas that differ from lora_alpha, by module name."""
    init_lora_weights: Literal["kaiming", "gaussian"] = "kaiming"
    """Draw of A; B starts at 0."""

    def __post_init__(self) -> None:
        check_ranges(self, "lora")

    def to_peft(self, base: str, classifier: bool) -> Any:
        """The same as a `peft.LoraConfig` for a base model name (no annotation: parsers would import it)."""
        import peft

        values = {k: v for k, v in vars(self).items() if k not in ("init_lora_weights", "layers_to_transform")}
        all_linear = isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear"
        if not all_linear:
            values["layers_to_transform"] = self.layers_to_transform
        try:
            config = peft.LoraConfig(
                **values,
                init_lora_weights=True if self.init_lora_weights == "kaiming" else "gaussian",
                base_model_name_or_path=base,
                task_type=peft.TaskType.SEQ_CLS if classifier else peft.TaskType.CAUSAL_LM,
            )
        except ValueError as error:
            raise UserError(f"lora: {one_line(error, 200)}") from error
        if all_linear:  # PEFT takes no layers with this word; curves do (`model.targets`)
            config.layers_to_transform = self.layers_to_transform
        return config


@dataclass(frozen=True)
class CurveConfig:
    """Shape of the curve."""

    kind: Literal["anchored", "free"] = "free"
    """free: all control points trained together; anchored: through independently fine-tuned adapters. Kind, segments
    and points of the training are what did best at equal cost on eight data sets (results/NOTES.md, defaults)."""
    anchors: Slots = 3
    """Number of adapters to train as anchors (anchored; their segments are one fewer)."""
    segments: Slots = FREE_SEGMENTS
    """Number of segments (free)."""
    degree: Annotated[int, Range(1, 100)] = 2
    """Degree of each segment; 1: straight lines, a polygonal chain."""
    pieces: Slots = 1
    """Segments between two neighbouring anchors (anchored)."""
    closed: bool = False
    """The curve ends where it begins (anchored: after the last anchor it goes back to the first)."""
    factors: Literal["both", "A", "B"] = "both"
    """Which factors vary along the curve; the other one is shared by all its points (free)."""
    alignment: Alignment = "balanced+procrustes"
    """How the anchors' rescaling freedom (gauge) is removed before they are joined: (A, B) and (R A, B R^-1) are the
    same adapter, but lines between adapters depend on R. none: not at all."""
    inner: Literal["line", "init"] = "line"
    """Start of the inner control points: on the straight line between anchors, or at the LoRA init."""

    def __post_init__(self) -> None:
        check_ranges(self, "curve")
        if self.kind == "anchored" and self.anchors < 2:
            raise UserError(f"curve.anchors: expected at least 2, found {self.anchors}")
        if self.kind == "anchored" and self.degree * self.pieces < 2:
            raise UserError(
                f"curve.degree: expected at least 2 for an anchored curve, found {self.degree}; or set pieces to 2"
            )
        if self.kind == "free" and self.pieces > 1:
            raise UserError(f"curve.pieces: expected 1 for a free curve, found {self.pieces}; set segments instead")
        if self.kind == "anchored" and self.factors != "both":
            raise UserError(
                f"curve.factors: expected both for a curve through anchors, which differ in A and B, found "
                f"{self.factors}; set kind to free"
            )
        self.spec(self.anchors)

    def spec(self, anchors: int) -> CurveSpec:
        """The shape of the curve (through so many anchors, where it is anchored)."""
        if self.kind == "free":
            return CurveSpec(self.segments, self.degree, closed=self.closed, factors=self.factors)
        return CurveSpec.anchored(anchors, self.degree, self.alignment, self.pieces, self.closed)

    @classmethod
    def of(cls, spec: CurveSpec) -> CurveConfig:
        """The options of a shape; of one that no options make, with other frozen points, those of its segments, and of
        a single adapter the defaults."""
        if spec.degree == 0:
            return cls()
        shape: dict[str, Any] = {"degree": spec.degree, "closed": spec.closed}
        frozen = [k for k, trained in enumerate(spec.trainable) if not trained]
        if len(frozen) - spec.closed > 1 and frozen[1] > 1:
            pieces, alignment = max(frozen[1] // spec.degree, 1), cast(Alignment, spec.alignment)
            found = cls("anchored", len(frozen) - spec.closed, pieces=pieces, alignment=alignment, **shape)
            if found.spec(found.anchors) == spec:
                return found
        return cls("free", segments=spec.segments, factors=spec.factors, **shape)


def check_sampling(sampling: str, points: int) -> None:
    """Refuse what cannot be drawn.

    Args:
        sampling: name of a way of drawing.
        points: points at which each example is seen, the first number of `sample_points`.

    Raises:
        UserError: an unknown way, or for half-period an odd number of points.
    """
    if sampling not in get_args(Sampling):
        ways = ", ".join(get_args(Sampling))
        raise UserError(f"sampling: expected one of {ways}, found {sampling!r}{nearest(sampling, get_args(Sampling))}")
    if sampling == "half-period" and points % 2:
        raise UserError(f"points: expected an even number with sampling half-period, found {points}; add one")


def check_points(rule: str, points: int, segments: int) -> int:
    """The number of points of a quadrature, where it can have so many.

    Raises:
        UserError: unknown rule, fewer than one point, or for gauss-legendre no multiple of `segments`.
    """
    points = in_range("points", points, Points)
    if rule not in get_args(Rule):
        raise UserError(
            f"quadrature: expected uniform, gauss-legendre or monte-carlo, found {rule!r}; choose one of them"
        )
    if rule == "gauss-legendre" and points % segments:
        close = max(round(points / segments), 1) * segments
        raise UserError(f"points: expected a multiple of the {segments} segments, found {points}; ask for {close}")
    return points
