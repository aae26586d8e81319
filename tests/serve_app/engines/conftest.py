"""What needs vLLM is collected only where it is installed: `make test-vllm`."""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("vllm")
    else [
        f"vllm/test_{name}.py"
        for name in (
            "chosen_tokens",
            "fidelity",
            "fragments",
            "graph_taps",
            "watched",
            "served",
            "tensor_parallel",
            "vllm_engine",
        )
    ]
)
