"""The evaluation: sends problems to an OpenAI-compatible server and scores the answers.

The modules, in the order in which to read them:

    settings, command          the options, validated once; the command line
    hashed_config              the part of the settings that makes two runs comparable, and its hash
    records, tables            a record becomes a `Problem`; records from files and datasets
    problems, selection        a source (arithmetic, gsm8k, a file, a user's function) becomes a list; which problems to pose
    prompts, variants          a `Problem` becomes messages, under one prefix or several
    endpoint, addresses        the server: whether it answers and what it serves; several addresses as one client
    rollout, chat_request      one attempt at one problem becomes one scored `Sample`; one request and its failures
    tools, calculator          the tools that the model may call
    verdicts, extractors       what a scorer takes and returns; the built-in extractors and those of users
    answers, texts             the default extractor, for numbers and for texts
    quantities                 the number parser of the default extractor, with `exact_numbers`, `number_words`, `plain_text`
    symbolic                   the extractor that uses math-verify
    fanout, concurrency        many rollouts at once, as Ray tasks; the number in flight
    resume                     the run directory: created, or found and continued
    driver, progress           all of the above in order (`run_evaluation`); the progress display
    server_token_counter       tokens that the server has generated, for the progress display
    statistics, summary        accuracies with intervals; the numbers in `summary.json`
    outputs, report, charts    the files of the run and its page
    terminal_summary           the scores in the terminal
    parquet_export, inspect_export    exports
    rescoring, status, estimate    scoring again; progress from outside; `--dry-run`

It reaches the server only as an OpenAI client, so any compatible server will do (without activations).
"""

from roentgen.errors import RoentgenError


class EvalError(RoentgenError):
    """An expected failure: the message is one line for the user, without a traceback.

    Attributes:
        exit_code: the exit code of the process.
    """

    exit_code = 2


class InterruptedRunError(EvalError):
    """The run was interrupted by Ctrl-C or SIGTERM; the message says how to continue."""

    exit_code = 130
