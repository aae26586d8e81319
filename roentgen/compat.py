"""Lists and checks the private or undocumented parts of nnsight and Ray that this project uses.

A new version may lack one of them. A server checks them when it starts, so that it does not fail during a request. Add each
such part here when code starts to use it.
"""

import importlib
import inspect
from functools import reduce
from importlib.metadata import version

PARTS: dict[str, dict[str, str]] = {
    "nnsight": {
        "nnsight._c:unmount": "takes `.save` off every Python object, where it breaks Serve's replicas",
        "nnsight:Envoy.OVERLOAD_PREFIX": "names the envoy of a submodule that is called like a method of envoys",
        "nnsight:Envoy._wrap_envoy(name, module)": "wraps a submodule when a request first asks for it",
        "nnsight:Envoy._add_envoy(name, module)": "is overridden, so that no submodule is wrapped before that",
        "nnsight.modeling.transformers:TransformersModel._batch(invokes, fn)": "is overridden: the engine batches",
        "nnsight.intervention.interleaver:Mediator.current": "gives the running trace, to add an observer to",
        "nnsight.intervention.cache:Cache.subscriptions": "says which locations an observer is shown",
        "nnsight.intervention.cache:Cache.observe_selected": "shows it a value",
    },
    "ray": {
        "ray.serve:Deployment.options(_internal)": "keeps replicas running when the application is deployed again",
        "ray.serve.request_router:FIFOMixin": "keeps requests in their order",
        "ray.serve.request_router:RequestRouter.initialize_state": "runs once in a router's own event loop",
        "ray.serve.request_router:RequestRouter.choose_replicas(candidate_replicas, pending_request)": "is overridden",
        "ray.serve._private.constants:RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "names the proxies' middleware",
    },
}
"""By library: `MODULE:NAME.NAME(PARAMETER, …)`, and its purpose."""


def check(library: str) -> None:
    """Check that the installed version of a library has all parts in `PARTS`.

    Raises:
        ImportError: if it lacks some; the message names them and their purpose.
    """
    if lacking := [f"{part}, which {use}" for part, use in PARTS[library].items() if not _is_there(part)]:
        raise ImportError(f"{library} {version(library)} is not supported: it lacks {'; '.join(lacking)}")


def _is_there(part: str) -> bool:
    module, _, path = part.partition(":")
    path, _, parameters = path.partition("(")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        return False
    wanted = [name.strip() for name in parameters.rstrip(")").split(",") if name]
    return not wanted or set(wanted) <= set(inspect.signature(found).parameters)  # type: ignore[arg-type]
