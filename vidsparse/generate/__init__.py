"""From a prompt to videos, sparse or both ways, with every figure on file.

    model_files.py  what a pipeline's small files say: class, sizes it takes, defaults, prompts
    job.py          Request, what a user asks for -> Job, complete and checked
    results.py      arms -> videos, measures, contact sheet, metrics.json
    run.py          Job -> pipeline -> arms, timed -> results

Imports point up this list only. `vidsparse generate` is these lines:

    from vidsparse.generate.job import Request
    from vidsparse.generate.run import generate
    figures = generate(Request(prompt="a large red circle moves left", compare_dense=True))

A user's mistake is an `InputError`, a ValueError whose message is one line.
"""
