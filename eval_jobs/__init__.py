"""The evaluation: send problems to an OpenAI-compatible server, and score its answers.

The modules, in the order a newcomer should read them:

    settings, command          the options, checked once; the command line
    config                     the part of the settings that makes two runs comparable, and its hash
    records, tables            a record becomes a `Problem`; records out of files and datasets
    problems, selection        a source (arithmetic, gsm8k, a file, a user's function) becomes a list; which of them are posed
    prompts, variants          a `Problem` becomes messages, under one prefix or several
    endpoint, addresses        the server: whether it answers, what it serves, several addresses as one client
    rollout, asking            one attempt at one problem becomes one scored `Sample`; one request and its failures
    tools, calculator          what the model may call
    verdicts, scoring          what a scorer is given and returns; the extractors, and those of users
    answers, texts             the default extractor, for numbers and for texts
    quantities                 what the default extractor reads, with `exact_numbers`, `number_words`, `plain_text`
    symbolic                   the extractor that uses math-verify
    fanout, concurrency        many rollouts at once, as Ray tasks; how many are in flight
    resume                     the run directory: made, or found and continued
    driver, progress           all of the above in order (`run_evaluation`); what is shown meanwhile
    statistics, summary        accuracies with intervals; the numbers in `summary.json`
    failures                   failed samples, counted by kind
    outputs, report, charts    the files of the run and its page
    console                    the scores in the terminal
    parquet, inspect_log       exports
    comparison, rescoring, status, estimate    two runs compared; answers read again; progress from outside; `--dry-run`

It reaches the server only as an OpenAI client, so any compatible server will do (without activations).
"""

from roentgen.errors import RoentgenError


class EvalError(RoentgenError):
    """An expected failure: its message is one clear line for the person at the keyboard, without a traceback.

    Attributes:
        exit_code: what the process ends with.
    """

    exit_code = 2


class InterruptedRunError(EvalError):
    """Ctrl-C, or SIGTERM; the message says how to go on."""

    exit_code = 130
