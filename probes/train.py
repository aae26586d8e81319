"""Trains a probe for every stored key of a run and writes what it found.

    RUN/probes/<label>/
      probes.safetensors    per key: `<key>.weight` [d], `<key>.bias` [], `<key>.mean` [d], `<key>.scale` [d], float32
      auroc_by_layer.png
      results.json          the report (`ProbeReport.to_json`); written last, so its presence means that all is there

Probes on a session that `roentgen capture` made of the run's answers are in `RUN/probes/<label>@<session>/`.

A probe's score of a row x is `weight · (x − mean) / scale + bias`: the log-odds that the label is True. Saved probes
are fitted on all samples; the AUROCs beside them are of probes that had not seen the problems they were tested on.

Activations are read one hook point at a time, all its layers together: that is what the fit wants, and all that is in
memory.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

import roentgen
from probes import logistic
from probes.dataset import ProbeDataset
from probes.evaluation import (
    Evaluation,
    bootstrap_weights,
    estimate,
    evaluate,
    nested_best,
    nested_folds,
    shuffle_labels,
)
from probes.plots import auroc_by_layer
from probes.report import Best, KeyResult, ProbeReport
from roentgen.contract import split_key
from roentgen.runs import write_json
from roentgen.store.durable import make_folder, write_durably


def train(
    run: str | Path,
    label: str = "correct",
    positions: str = "last_prompt",
    seed: int = 0,
    session: str | Path | None = None,
) -> ProbeReport:
    """Train and evaluate a probe per stored key; write `RUN/probes/<label>/`.

    Args:
        run: the run directory.
        label: what to read, one of `probes.LABELS`.
        positions: from which row of each rollout: last_prompt, last, mean_prompt or mean_generated.
        seed: of folds, bootstrap and shuffles; the same seed gives the same report.
        session: a session with other activations of the run's answers, instead of the run's own.

    Raises:
        RunError: if there is no run at that path.
        ProbeDataError: if the label or positions are not allowed, or the activations are not there.
        OneClassError: if the label does not vary enough.
    """
    data = ProbeDataset.open(run, label, session)
    folds = nested_folds(data.y, data.groups, seed)
    shuffled = shuffle_labels(data.y, data.groups, seed)
    shuffled_folds = nested_folds(shuffled, data.groups, seed)

    keys: list[str] = []
    found, by_chance = [], []
    tensors: dict[str, Tensor] = {}
    for hook_keys in data.hook_points().values():
        X = torch.stack([data.features(key, positions) for key in hook_keys])
        keys += hook_keys
        found.append(evaluate(X, data.y, folds))
        by_chance.append(evaluate(X, shuffled, shuffled_folds))
        tensors |= _refit(hook_keys, X, torch.from_numpy(data.y), torch.from_numpy(found[-1].strength))

    draws = bootstrap_weights(data.groups, seed)
    everything = Evaluation.concatenate(found)
    best_scores, best_models = nested_best(everything, folds)
    chance_scores, _ = nested_best(Evaluation.concatenate(by_chance), shuffled_folds)
    baselines = {
        name: estimate(evaluate(torch.from_numpy(values)[None, :, None], data.y, folds).scores[0], data.y, draws)
        for name, values in data.covariates.items()
    }
    report = ProbeReport(
        run_id=data.run.config.run_id,
        label=label,
        positions=positions,
        seed=seed,
        roentgen=roentgen.__version__,
        n_samples=len(data.y),
        n_problems=data.n_problems,
        n_left_out=data.left_out,
        n_folds=len(folds),
        n_true=int(data.y.sum()),
        keys=tuple(
            KeyResult(key, *split_key(key), estimate(scores, data.y, draws), float(C))
            for key, scores, C in zip(keys, everything.scores, everything.strength, strict=True)
        ),
        best=Best(estimate(best_scores, data.y, draws), tuple(keys[model] for model in best_models)),
        baselines={**baselines, "shuffled_labels": estimate(chance_scores, shuffled, draws)},
        session=data.session,
    )
    _write(data.run.path / "probes" / (label if session is None else f"{label}@{data.session}"), report, tensors)
    return report


def _refit(
    keys: list[str], X: Float[Tensor, "models rows d"], y: Tensor, strength: Float[Tensor, "models"]
) -> dict[str, Tensor]:
    """Fit each key on all rows at its own strength; return the tensors to save."""
    tensors: dict[str, Tensor] = {}
    for number, key in enumerate(keys):
        probe = logistic.fit(X[number : number + 1], y, strength[number : number + 1])
        parts = {"weight": probe.weight[0, 0], "bias": probe.bias[0, 0], "mean": probe.mean[0], "scale": probe.scale[0]}
        tensors |= {f"{key}.{name}": part.float().contiguous() for name, part in parts.items()}
    return tensors


def _write(folder: Path, report: ProbeReport, tensors: dict[str, Tensor]) -> None:
    make_folder(folder)
    write_durably(folder / "probes.safetensors", lambda path: save_file(tensors, path))
    write_durably(folder / "auroc_by_layer.png", lambda path: auroc_by_layer(report).savefig(path, format="png"))
    write_json(folder / "results.json", report.to_json())
