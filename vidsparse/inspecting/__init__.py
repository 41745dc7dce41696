"""Pictures of what attention does in one run: where mass is, what the plan reads, what it costs.

    choice.py    which steps, layers, heads and query tile
    measure.py   a call -> true block mass, draft, recall, error
    capture.py   a recorder on an accelerated pipeline: keeps the measures of the chosen calls
    places.py    blocks -> the 3-D grid and the frames of the video
    figures.py   maps by block, reads over frames, figures by head
    film.py      the levels of one query tile over the steps
    page.py      index.html
    run.py       job -> pipeline -> recorder -> pictures, published as one act
    command.py   the options of `vidsparse inspect`

Imports point up this list only.
"""
