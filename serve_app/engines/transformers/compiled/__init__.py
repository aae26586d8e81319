"""Runs a decoding step as a compiled graph on a CPU: one graph with fused loops in place of the model's modules.

    compilation.py  starts and pauses the process that compiles; the result is kept in the cache
    __main__.py     that process
    graph.py        exports the graph: the model's own forward for one new token per row
    operations.py   operations that the engine implements, in C++: packed products, attention over its slots, observers
    step.py         the compiled step: loaded, compared with the model, and run
    manager.py      decides when to compile, and gives the engine the step

Between the matrix products of a decoding step each layer has dozens of small operations. Each reads and writes all rows and
passes through Python. Inductor fuses a norm with the sum before it, or a whole rotation, into one loop. Matrix products and
attention gain nothing from it and stay as they are. So the graph depends neither on the layout of weights nor on the location
or number of keys and values. It is small, it has one dynamic size (rows), and one file serves every start on a machine.

The model beside it does not change. It reads prompts, and runs the steps in which a request taps a module that the graph does
not expose.
"""
