"""Keeps what a background thread computes on that thread.

A second thread that computes in parallel has a team of OpenMP's own. The process then has more of its threads than there are
cores, and GNU's OpenMP stops waiting actively at the barriers of every team, for as long as the process lives. A model's steps
are hundreds of products of some microseconds, and on two cores took a quarter longer from the first commit on.
"""

import torch
from threadpoolctl import threadpool_limits


def limit_to_one_thread() -> None:
    """Have torch use no other thread for what this one computes, and change nothing for others."""
    torch.get_num_threads()  # torch sets a thread's number when it is first asked for; later, that would undo this
    threadpool_limits(limits=1, user_api="openmp")
