"""Reads a run's answers again, without the model: another primary extractor, or extractors that have been mended.

What the model said stays as it is. The verdicts in the record are written again, whole or not at all, and what is made from
the record after them, so that all readers, probes too, go by the same `correct`.
"""

from eval_jobs.outputs import write_sample_files, write_summary
from eval_jobs.report import write_report
from eval_jobs.scoring import score
from roentgen.runs import Run, Sample, rewrite


def rescore(run: Run, extractor: str | None = None) -> Run:
    """Judge every answer of a run again.

    Args:
        run: the run.
        extractor: the primary one from now on; None keeps the run's.

    Raises:
        RunError: if an evaluation is writing the run, or the record is damaged.
    """
    primary = extractor or run.config.settings["extractor"]

    def judged(sample: Sample) -> Sample:
        if sample.error is not None:
            return sample
        scores = score(sample.response, sample.gold)
        verdicts = {"answers": scores.answers, "correct_by": scores.correct_by, "correct": scores.correct_by[primary]}
        return sample.model_copy(update=verdicts)

    config = run.config.model_copy(update={"settings": {**run.config.settings, "extractor": primary}})
    again = rewrite(run, judged, config)
    for sample in again.read_samples():
        write_sample_files(again, sample)
    write_summary(again, None)
    write_report(again)
    return again
