"""Hook points: where they are in a model, and what is done there.

`structure` says what a model has to capture. `resolver` finds it by watching a forward (`watching`) and checking the equations
of a block (`block`, `equations`); `narrowing` makes a small stand-in of a model to try. `observer` reads values in a forward.
`grid` says which request a row belongs to; `rows` keeps rows (in `memory`), `steering` adds to them, `scoring` scores them.
"""
