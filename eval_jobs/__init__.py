"""The evaluation: problems go to an OpenAI-compatible server, answers come back scored, with their activations' addresses.

What flows through this room, in the order a newcomer should read it:

    problems   a source (arithmetic, gsm8k, a file) becomes a list of `Problem`
    prompts    a `Problem`'s question becomes messages
    config     what was asked for (`EvalSettings`), and the hash that makes two runs comparable
    endpoint   the server: is it there, what does it serve
    rollout    one problem against the server becomes one scored `Sample`
    scoring    the extractors; `answers` is the default one (with `quantities`, `exact_numbers`), `symbolic` is math-verify
    fanout     many rollouts at once, as Ray tasks; samples stream back to the driver
    resume     the run directory: made, or found and continued
    driver     all of the above in order: `run_evaluation`
    failures   failed samples counted by kind, with what to do about each
    outputs, report, console, progress   what is left on disk and on the screen
    command    the command line

It talks to the server only as an OpenAI client, so any compatible server will do (without activations).
"""


class EvalError(Exception):
    """An expected failure: its message is one clear line for the person at the keyboard, without a traceback.

    Attributes:
        exit_code: what the process ends with.
    """

    exit_code = 2
