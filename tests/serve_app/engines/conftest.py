"""What needs vLLM is collected only where it is installed: `make test-vllm`."""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("vllm")
    else ["vllm/test_vllm_engine.py", "vllm/test_fidelity.py", "vllm/test_served.py"]
)
