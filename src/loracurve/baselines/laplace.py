"""Laplace approximation of one adapter by laplace-torch (Daxberger et al. 2021; for LoRA: Yang et al. 2024).

Around an anchor as PEFT has it, Kronecker-factored curvature of all LoRA weights or of the last linear map (arXiv
2308.13111 calls them LA and LLLA), prior precision by the marginal likelihood, predictions by the linearised model. The
last map of a language model means the answer tokens' rows, merged; its features are computed once.

The curvature is taken example by example: the library scales its factors for batches of equal size without padding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from loracurve.baselines.method import Fitted, Setting
from loracurve.baselines.peft_model import AnswerHead, ClassLogits
from loracurve.inference.predictive import Predictive
from loracurve.model.attention import without_cudnn_attention
from loracurve.system.errors import UserError
from loracurve.system.randomness import generator
from loracurve.system.ranges import Amount, NonNegative, check_ranges
from loracurve.tasks.encoding import Encoded

__all__ = ["INSTALL", "Laplace"]


INSTALL = (
    "pip install --no-deps laplace-torch==0.3 asdfghjkl==0.1a4 backpack-for-pytorch curvlinops-for-pytorch einconv "
    "einops linear-operator opt-einsum scipy unfoldNd"
)


@dataclass(frozen=True)
class Laplace:
    """A Gaussian around one anchor with Kronecker-factored curvature."""

    anchor: Amount = 0
    """Number of the anchor."""
    weights: Literal["all", "last_layer"] = "all"
    """all: every LoRA weight. last_layer: the last linear map (of a head, the answer tokens' rows)."""
    predict: Literal["mc", "probit", "bridge"] = "mc"
    """From the linearised model's Gaussian logits to probabilities: samples, or one of two closed-form approximations,
    which give no spread between samples."""
    prior_precision: NonNegative = 0.0
    """Precision of the prior of each weight. 0: the marginal likelihood of the training data chooses it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        for name, valid in (("weights", ("all", "last_layer")), ("predict", ("mc", "probit", "bridge"))):
            if getattr(self, name) not in valid:
                raise UserError(f"{name}: expected one of {', '.join(valid)}, found {getattr(self, name)!r}")

    def fit(self, setting: Setting) -> Fitted:
        """Compute the curvature; raises UserError where laplace-torch is missing or the scoring has no class logits."""
        library = _library()
        train = setting.task.encode("train")
        if self.weights == "last_layer" and train.scoring == "text":
            raise UserError("weights: expected all with scoring text, which reads many places, found last_layer")
        adapter = {n: p[-1].to(setting.model.device) for n, p in setting.first(self.anchor + 1).items()}
        logits = ClassLogits(setting.model, adapter, train)
        network = logits if self.weights == "all" else _LastLayer(logits)
        posterior = library.Laplace(
            network, "classification", "all", "kron", backend=library.curvature.CurvlinopsGGN,
            prior_precision=self.prior_precision or 1.0,
        )  # fmt: skip
        with without_cudnn_attention():
            posterior.fit(_Rows(network, train))
        if not self.prior_precision:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="By default `link_approx`")
                posterior.optimize_prior_precision("glm", prior_structure="scalar")

        def predict(encoded: Encoded) -> Predictive:
            width = len(encoded.answer_ids or encoded.classes)
            # The other attention kernels have no batching rule for Jacobians.
            with sdpa_kernel(SDPBackend.MATH):
                rows = [self._log_probs(posterior, x, width, setting) for x in _Rows(network, encoded)]
            return Predictive.from_log_probs(torch.cat(rows, dim=1))

        # The curvature takes one backward pass for each class, and so do the Jacobians of predictions.
        each = len(train.answer_ids or train.classes) if self.weights == "all" else 1
        notes = {"prior_precision": posterior.prior_precision.tolist()}
        return Fitted(predict, 1 + each if self.weights == "all" else 1, 1 + each * len(train) / setting.unit, notes)

    def _log_probs(self, posterior: Any, x: dict[str, Any], classes: int, setting: Setting) -> Tensor:
        """[S, 1, C] log-probabilities of one example; S = 1 for closed forms."""
        if self.predict == "mc":
            # The library's own samples need a Cholesky factor, which logits of similar texts may not have, and share
            # their draws between rows, which does not average out.
            mean, covariance = (m[0].double().cpu() for m in posterior._glm_predictive_distribution(x))
            values, vectors = torch.linalg.eigh(covariance)
            draw = generator(setting.seed, "laplace", int(x["batch"].index[0]))
            z = torch.randn(setting.samples, len(mean), generator=draw, dtype=torch.float64)
            log_probs = (mean + z @ (vectors * values.clamp_min(0).sqrt()).mT).log_softmax(-1)[:, None]
        else:
            log_probs = posterior(x, "glm", link_approx=self.predict).log().log_softmax(-1)[None]
        return nn.functional.pad(log_probs.detach().cpu(), (0, classes - log_probs.shape[-1]), value=-math.inf)


class _LastLayer(nn.Module):
    """The last linear map on features that stand where input ids do."""

    def __init__(self, logits: ClassLogits) -> None:
        super().__init__()
        self.linear = logits.last_linear()
        self.body = [logits]  # in a list, so that its weights are not this module's

    def inputs(self, encoded: Encoded, number: int) -> dict[str, Any]:
        values = self.body[0].inputs(encoded, number)
        return {**values, "input_ids": self.body[0].features(values)}

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        logits, body = self.linear(inputs["input_ids"]), self.body[0]
        if isinstance(body.last, AnswerHead) and len(further := body.further(inputs["batch"])):
            logits = torch.cat([logits, body.last.merged(further)(inputs["input_ids"]).detach()], -1)
        return logits[:, : inputs["choices"]]


class _Rows:
    """A split as a loader of single examples."""

    def __init__(self, network: Any, encoded: Encoded) -> None:
        self.network, self.dataset = network, encoded

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.network.inputs(self.dataset, i) for i in range(len(self.dataset)))


def _library() -> Any:
    try:
        import laplace
        import laplace.curvature
    except ImportError as error:
        raise UserError(f"Laplace needs laplace-torch, found no {error.name}; {INSTALL}") from error
    return laplace
