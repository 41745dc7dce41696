"""From a prompt, an image or a video to videos, sparse or both ways, with every figure on file.

    model_files.py  what --model names, its small files, and what is wrong with either
    cards.py        which checkpoint it is, by its configs: defaults, prompts
    model.py        Model, a pipeline without its weights: its class and family
    weights.py      the headers of its weight files
    sizes.py        how its pixels become tokens, which sizes it takes
    memory.py       the least memory that a generation takes
    takes.py        what a pipeline class is called with
    request.py      Request, what a user asks for, within bounds
    inputs.py       images and videos to start from
    completing.py   what a Request leaves open, for a Model and what it takes
    job.py          Request -> Job, complete and checked
    loading.py      Model -> pipeline, complete and proven to run
    clock.py        when the steps of a run end, and who is told
    results.py      arms -> videos, measures, contact sheet, metrics.json
    rescue.py       arms that cannot be written where they should be -> a place with room
    run.py          Job -> pipeline -> arms, timed -> results
    prompts.py      a file of prompts -> Requests
    many.py         many Jobs on one pipeline, finished ones left out

Imports point up this list only. `vidsparse generate` is these lines:

    from vidsparse.generate.request import Request
    from vidsparse.generate.run import generate
    figures = generate(Request(prompt="a large red circle moves left", compare_dense=True))

A user's mistake is an `InputError`, a ValueError whose message is one line.
"""
