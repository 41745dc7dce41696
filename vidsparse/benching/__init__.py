"""`vidsparse bench`: methods measured on q, k and v alone, without a video.

command.py     the commands
methods.py     error, recall and time of presets at given densities, on heads
patterns.py    the fixed pattern that loses least in each layer and head
synthetic.py   heads that are made up: smooth over the video, of a given rank
results.py     table, CSV and picture
"""
