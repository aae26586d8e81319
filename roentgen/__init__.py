"""Roentgen: evaluate a language model and store its internal activations.

    model = roentgen.load("smollm2-135m")
    (out,) = model.generate("12 * 7 =", max_tokens=32, capture=dict(layers="all", hook_points=["resid_post"]))
    out["layers.12.resid_post"]                      # [len(out.tokens), d_model]

`__all__` lists the Python library (docs/api.md). Its names are loaded on first use, so that importing the package is cheap and
imports neither torch nor Ray.

To change the package, read `contract` first; it defines the names that all parts share (hook points, positions, keys).
`store`, `runs`, `transcripts` and `linear_probe` read and write files. `serving` starts and checks a server, `cloud` manages
clusters, and `workflows` contains commands that combine several parts. `api` is the Python library, `cli` the `roentgen`
command. The server itself is `serve_app`, the evaluation `eval_jobs`, and the training of probes `probes`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from roentgen.version import __version__

if TYPE_CHECKING:
    from eval_jobs.prompts import Prompt
    from eval_jobs.records import Problem
    from eval_jobs.verdicts import Output, Verdict
    from roentgen import probes
    from roentgen.api.evaluation import evaluate, evaluate_async
    from roentgen.api.model import Model, load
    from roentgen.api.rollout import Rollout
    from roentgen.api.run_results import compare, export, report, score, show
    from roentgen.api.server import Server, serve
    from roentgen.api.steer import Steer
    from roentgen.errors import RoentgenError
    from roentgen.harnesses.join import join
    from roentgen.linear_probe import SavedProbe
    from roentgen.runs import Run
    from roentgen.store import Session
    from serve_app.errors import RequestError

__all__ = [
    "Model",
    "Output",
    "Problem",
    "Prompt",
    "RequestError",
    "RoentgenError",
    "Rollout",
    "Run",
    "SavedProbe",
    "Server",
    "Session",
    "Steer",
    "Verdict",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_async",
    "export",
    "join",
    "load",
    "probes",
    "report",
    "score",
    "serve",
    "show",
]

_MODULES = {
    "Model": "roentgen.api.model",
    "Output": "eval_jobs.verdicts",
    "Problem": "eval_jobs.records",
    "Prompt": "eval_jobs.prompts",
    "RequestError": "serve_app.errors",
    "RoentgenError": "roentgen.errors",
    "Rollout": "roentgen.api.rollout",
    "Run": "roentgen.runs",
    "SavedProbe": "roentgen.linear_probe",
    "Server": "roentgen.api.server",
    "Session": "roentgen.store",
    "Steer": "roentgen.api.steer",
    "Verdict": "eval_jobs.verdicts",
    "compare": "roentgen.api.run_results",
    "evaluate": "roentgen.api.evaluation",
    "evaluate_async": "roentgen.api.evaluation",
    "export": "roentgen.api.run_results",
    "join": "roentgen.harnesses.join",
    "load": "roentgen.api.model",
    "report": "roentgen.api.run_results",
    "score": "roentgen.api.run_results",
    "serve": "roentgen.api.server",
    "show": "roentgen.api.run_results",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name == "probes":
        return import_module("roentgen.probes")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
