"""lm-polygraph's estimators on a run: its points are the ensemble that they measure.

    manager(open_run("runs/mine"), Dataset(texts, answers, 8), [PETmi(), MeanTokenEntropy()])()

lm-polygraph defines measures of ensembles, but after its 0.3 nothing computes what they read. Here the average decodes
greedily, every point reads the text again, and the measures follow from the points' distributions: `PE...` of their
mean (product of expectations), `EP...` of the mean by the points' probabilities of the text so far (expectation
of products; Malinin & Gales 2021, arXiv 2002.07650, section 3). Measures of single models see the average.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracurve.inference.config import GenerateConfig
from loracurve.inference.generation import Generation, generate
from loracurve.inference.information import entropy, mixture_log_probs, negative_log_likelihood
from loracurve.inference.model_average import Average
from loracurve.model.runner import evaluation_mode
from loracurve.runs.run import Run
from loracurve.system.errors import UserError
from loracurve.tasks.tokens import leading_tokens, tokenise, with_lead

__all__ = ["load_stat_calculator", "manager", "measures", "member_weights"]


ALTERNATIVES = 10
"""Tokens named at each place, as lm-polygraph does."""

TOP = (5, 10, 15)


def measures(log_probs: Tensor, weights: Tensor | None = None) -> dict[str, float]:
    """What lm-polygraph's token-level measures read of a text, in nats, each the mean over its T tokens.

    Args:
        log_probs: [n, T, V] of n equally weighted points.
        weights: [n, T] of the points in their average. None: equal. As in lm-polygraph, the data uncertainty and the
            mean log-probability stay equally weighted means, so that with weights `mutual_information` is none.
    """
    average = mixture_log_probs(log_probs, weights)
    total, data = entropy(average), entropy(log_probs).mean(0)
    cross = -(average.exp() * log_probs.mean(0).masked_fill(average.isneginf(), 0)).sum(-1)
    found = {
        "total_uncertainty": total,
        "data_uncertainty": data,
        "mutual_information": total - data,
        "epkl_total_uncertainty": cross,
        "epkl": cross - data,
        "rmi": cross - total,
        "entropy": total,
    }
    for count in TOP:
        most = average.topk(min(count, average.shape[-1])).values
        found[f"entropy_top{count}"] = entropy(most.log_softmax(-1))
    return {name: float(of.mean()) for name, of in found.items()}


def member_weights(log_likelihoods: Tensor) -> Tensor:
    """Weights [n, T] of equally likely points behind the tokens before each: softmax of their log-likelihoods [n, T],
    summed over those tokens."""
    return (log_likelihoods.cumsum(-1) - log_likelihoods).softmax(0)


@dataclass
class _Texts:
    """Calculates what estimators read of greedy texts."""

    run: Run
    average: Average

    stats = (
        "greedy_texts",
        "greedy_tokens",
        "greedy_log_probs",
        "greedy_log_likelihoods",
        "greedy_tokens_alternatives",
        "embeddings",
    )

    def __call__(
        self, known: Mapping[str, Any], texts: Sequence[str], model: Any, max_new_tokens: int = 100
    ) -> dict[str, Any]:
        made = self.write(texts, GenerateConfig(max_new_tokens=max_new_tokens, alternatives=ALTERNATIVES))
        log_probs, likelihoods, embeddings, members = [], [], [], []
        modes: dict[str, list[dict[str, float]]] = {"pe": [], "ep": []}
        for generation in made:
            written = torch.tensor(generation.token_ids)
            at_points, state = self._read(generation.prompt, generation.token_ids)
            own = -negative_log_likelihood(at_points, written)
            average = mixture_log_probs(at_points)
            log_probs.append(average.numpy())
            likelihoods.append((-negative_log_likelihood(average, written)).tolist())
            embeddings.append(state.numpy())
            members.append(own.mean(1)[:, None].numpy())
            modes["pe"].append(measures(at_points))
            modes["ep"].append(measures(at_points, member_weights(own)))
        each = {"log_probas": np.stack(members), "probas": np.exp(np.stack(members))}
        scores: dict[str, Any] = {"weights": np.ones((len(made), 1))}  # of one text for each input
        for mode, rows in modes.items():
            values = {name: np.array([[row[name]] for row in rows]) for name in rows[0]}
            scores[f"{mode}_token_level_scores"] = values | each
        return {
            "greedy_texts": [m.text for m in made],
            "greedy_tokens": [m.token_ids for m in made],
            "greedy_log_probs": log_probs,
            "greedy_log_likelihoods": likelihoods,
            "greedy_tokens_alternatives": [m.alternatives for m in made],
            "embeddings_decoder": np.stack(embeddings),
            "ensemble_token_scores": scores,
        }

    def write(
        self, prompts: Sequence[str], config: GenerateConfig, numbers: Sequence[int] | None = None
    ) -> list[Generation]:
        """What the average writes."""
        model, tokenizer, average = self.run.model, self.run.task.tokenizer, self.average
        return generate(model, tokenizer, prompts, config, average.where, average.weights, numbers=numbers)

    def _read(self, prompt: str, written: list[int]) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, T, V] at the written tokens at each point, and the mean [D] of the last hidden states
        over points and the tokens that were read, on the CPU."""
        model, tokenizer = self.run.model, self.run.task.tokenizer
        ids = torch.tensor([[*with_lead(leading_tokens(tokenizer), tokenise(tokenizer, [prompt])[0]), *written]])
        wanted = {"logits_to_keep": len(written) + 1}
        accepted = inspect.signature(model.model.forward).parameters
        inputs = {name: value for name, value in wanted.items() if name in accepted}
        with torch.inference_mode(), evaluation_mode(model):
            output = model(
                self.average.where,
                input_ids=ids.to(model.device),
                attention_mask=torch.ones_like(ids, device=model.device),
                output_hidden_states=True,
                **inputs,
            )
            log_probs = output.logits[:, -len(written) - 1 : -1].float().log_softmax(-1)
            # The last token was never read when the text was made.
            state = output.hidden_states[-1][:, :-1].float().mean((0, 1))
        return log_probs.cpu(), state.cpu()


@dataclass
class _Training:
    """Calculates the states of training inputs and what is written there, once, for measures of density."""

    texts: _Texts
    data: Iterable[Any]
    done: bool = False

    stats = ("train_embeddings",)

    def __call__(
        self, known: Mapping[str, Any], texts: Sequence[str], model: Any, max_new_tokens: int = 100
    ) -> dict[str, Any]:
        if self.done:
            return {}
        self.done = True
        states = [self.texts({}, inputs, model, max_new_tokens)["embeddings_decoder"] for inputs, *_ in self.data]
        return {"train_embeddings_decoder": np.concatenate(states)}


@dataclass
class _Samples:
    """Calculates texts drawn from the average, `count` for each input."""

    texts: _Texts
    count: int
    drawn: int = 0

    stats = ("sample_texts", "sample_tokens", "sample_log_probs", "sample_log_likelihoods")

    def __call__(
        self, known: Mapping[str, Any], texts: Sequence[str], model: Any, max_new_tokens: int = 100
    ) -> dict[str, Any]:
        inputs = [text for text in texts for _ in range(self.count)]
        numbers = range(self.drawn, self.drawn + len(inputs))
        self.drawn += len(inputs)
        made = self.texts.write(inputs, GenerateConfig(max_new_tokens=max_new_tokens, temperature=1.0), numbers)
        each = [made[i : i + self.count] for i in range(0, len(made), self.count)]
        return {
            "sample_texts": [[m.text for m in of] for of in each],
            "sample_tokens": [[m.token_ids for m in of] for of in each],
            "sample_log_probs": [[sum(m.log_probs) for m in of] for of in each],
            "sample_log_likelihoods": [[m.log_probs for m in of] for of in each],
        }


def load_stat_calculator(config: Mapping[str, Any], environment: Any) -> Any:
    """How lm-polygraph builds a calculator; ours are there already."""
    return config["calculator"]


def manager(
    run: Run,
    data: Any,
    estimators: Sequence[Any],
    train: Any = None,
    points: int | None = None,
    samples: int = 10,
    **options: Any,
) -> Any:
    """lm-polygraph's `UEManager` on the texts that a run's average writes; call it, and read its `estimations`.

    Args:
        run: of a causal language model.
        data: an `lm_polygraph.Dataset` of inputs, continued as they stand, and targets.
        estimators: of ensembles, density (`train`), information or sampling, as the package has them.
        train: a `Dataset` of inputs from the training data, for measures of density.
        points: of the average. Default: the run's.
        samples: texts drawn for each input, where an estimator reads them.
        options: of `UEManager`: `generation_metrics`, `ue_metrics`, `max_new_tokens` and others. Unlike there, an error
            ends the work unless `ignore_exceptions` is set.

    Raises:
        UserError: no lm-polygraph; a classifier; points of unequal weights, which its measures of ensembles do not
            have; an estimator that reads what an average has not (attention, other prompts), or without `train`.
    """
    try:
        from lm_polygraph.defaults.register_default_stat_calculators import register_default_stat_calculators
        from lm_polygraph.utils.builder_enviroment_stat_calculator import BuilderEnvironmentStatCalculator
        from lm_polygraph.utils.factory_stat_calculator import StatCalculatorContainer
        from lm_polygraph.utils.manager import UEManager
        from lm_polygraph.utils.model import Model
    except ImportError as error:
        raise UserError(f"expected the package lm-polygraph, found none ({error}); pip install lm-polygraph") from error
    if run.model.is_classifier:
        raise UserError("expected a run with a language-model head, found a sequence classifier; use another run")
    evaluation = run.config.evaluation
    average = run.average(evaluation if points is None else replace(evaluation, points=points))
    if not torch.allclose(average.weights, average.weights.mean().expand_as(average.weights)):
        raise UserError(
            "expected points of equal weights, as lm-polygraph's measures of ensembles have them, found unequal ones; "
            "use a run with evaluation.quadrature uniform and evaluation.weights uniform"
        )

    class CurveAverage(Model):
        """The run by its name; calculators have the run itself."""

        tokenizer = run.task.tokenizer

        def __call__(self, *_: Any, **__: Any) -> Any:
            raise UserError("expected an estimator that reads what an average gives, found one that runs the model")

        generate = generate_texts = __call__

    def described(calculator: Any, stats: Sequence[str], needed: Sequence[str] = ()) -> Any:
        name, config = type(calculator).__name__, {"calculator": calculator}
        return StatCalculatorContainer(name, list(stats), list(needed), builder=__name__, cfg=config)

    texts = _Texts(run, average)
    ours: list[Any] = [texts, _Samples(texts, samples), *([] if train is None else [_Training(texts, train)])]
    # Those for black boxes work on texts and log-probabilities alone, whoever made them; ours replace what makes them.
    calculators = register_default_stat_calculators("Blackbox", blackbox_supports_logprobs=True)
    calculators += [described(calculator, calculator.stats) for calculator in ours]
    # The manager runs nothing for names that begin with `ensemble_`: they come with the greedy texts.
    calculators.append(described(texts, ["ensemble_token_scores"], ["greedy_texts"]))
    known = {stat for calculator in calculators for stat in calculator.stats}
    for estimator in estimators:
        if missing := sorted(set(estimator.stats_dependencies) - known):
            advice = "give train" if missing == ["train_embeddings"] else "leave it out"
            raise UserError(
                f"{estimator}: expected one that reads what a curve's average gives, found one that needs "
                f"{', '.join(missing)}; {advice}"
            )
    model = CurveAverage(str(run.folder), "CausalLM")
    defaults = {"generation_metrics": [], "ue_metrics": [], "processors": [], "ignore_exceptions": False}
    return UEManager(
        data,
        model,
        list(estimators),
        BuilderEnvironmentStatCalculator(model),
        calculators,
        **(defaults | options),
    )
