"""The page to look at runs and sessions with: `roentgen view`, and `/view` of a running server.

Python answers questions in JSON, and the page, whose sources are in `viewer/` and whose bundle is in `static/`, draws. What
flows through: the command line names folders, `catalog` finds the runs and sessions in them; a source has a table of light
columns in DuckDB (`table`, filled by `run_table` from samples.jsonl and by `session_table` from a session's index), from which
lists, filters and histograms are answered; one sample is read from the record and the store (`samples`, `tokens`, `values`).
`app` has the routes, `guard` decides who may ask.

Everything is read only. What is kept, under the cache folder, can be made again from the runs.
"""
