"""Keeps the computation of a background thread on that thread.

A second thread that computes in parallel gets its own OpenMP team. The process then has more OpenMP threads than cores, and
GNU OpenMP stops spinning at the barriers of every team for the rest of the process's life. A model's steps are hundreds of
matrix products of a few microseconds each, and took a quarter longer on two cores from the first commit on.
"""

import torch
from threadpoolctl import threadpool_limits


def limit_to_one_thread() -> None:
    """Limit torch to one thread in the calling thread, without affecting others."""
    torch.get_num_threads()  # torch initializes a thread's number on first use, which would undo this later
    threadpool_limits(limits=1, user_api="openmp")
