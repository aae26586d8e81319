"""A decoding step as a compiled graph: what the modules of a model do one after the other, fused, on a CPU.

    ahead.py       starts and pauses the process that compiles; the result is kept in the cache
    __main__.py    that process
    graph.py       the graph: the model's own forward for one new token per row, exported
    operations.py  what the graph leaves to the engine: products by packed weights, attention over its slots, and visitors
    step.py        the compiled step beside the model: loaded, compared with the model, and run

Between products of a decoding step lie dozens of small operations a layer, each of which reads and writes all rows and passes
through Python. inductor makes one loop of a norm and the sum before it, or of a rotation. Products and attention gain nothing
by it and stay what they are. So the graph knows nothing of weights' layouts, of where keys and values lie or of how many there
are: it is small, it has one dynamic size (rows), and one file serves every start on a machine.

The model beside it stays as it is. It reads prompts, and runs the steps in which a request reads a place that the graph does
not show.
"""
