"""Makes transformers import scikit-learn and SciPy lazily; their imports take a third of transformers' own import time.

Modules that every model imports need one function of each: for assisted generation and for object detection losses. This
project calls neither. `defer` makes transformers import these functions when they are called. Imports by other packages do not
change.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Deferred:
    """A function that a module of transformers imports from a large library, if the library is installed."""

    question: str
    """The function of transformers that returns whether the library is installed."""
    library: str
    """The module that contains the function."""
    function: str
    """The function's name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Import the function and call it."""
        return getattr(import_module(self.library), self.function)(*args, **kwargs)


ASSISTED_GENERATION = Deferred("is_sklearn_available", "sklearn.metrics", "roc_curve")
DETECTION_LOSSES = Deferred("is_scipy_available", "scipy.optimize", "linear_sum_assignment")


def _deferred_in(module: str) -> Deferred | None:
    if module == "transformers.generation.candidate_generator":
        return ASSISTED_GENERATION
    return DETECTION_LOSSES if module.startswith("transformers.loss.loss_") else None


def defer() -> None:
    """Defer the imports. Modules that are imported already are not affected."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules of transformers whose imports are deferred."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if (deferred := _deferred_in(fullname)) is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Deferring(spec.loader, deferred)
        return spec


class _Deferring(Loader):
    """Runs a module as if the library were not installed, then adds the deferred function to it."""

    def __init__(self, loader: Loader, deferred: Deferred) -> None:
        self._loader = loader
        self._deferred = deferred

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import transformers.utils as asked
        from transformers.utils import import_utils

        question = self._deferred.question
        answer: Callable[[], bool] = getattr(import_utils, question)
        before = getattr(asked, question)  # no longer the answer, where one of the modules imports another
        setattr(asked, question, lambda: False)
        try:
            self._loader.exec_module(module)
        finally:
            setattr(asked, question, before)
        if not hasattr(module, question):
            return
        setattr(module, question, answer)
        setattr(module, self._deferred.function, self._deferred)
