"""VBench: videos laid out as it reads them, run in its own environment, its answers taken back.

names.py        what a clip must be called
dimensions.py   what VBench measures, and how it weighs it
samples.py      arms of clips -> samples of prompts, numbered
placing.py      a sample -> the folders and the name under which VBench looks for it
export.py       placed samples -> folders and a manifest
run.py          an installed VBench, in a child process (child.py)
scores.py       a result file -> figures per clip, averages, Quality / Semantic / Total
importing.py    those figures into a comparison's folder
commands.py     the commands `vidsparse vbench ...`

VBench 0.1.5 pins old versions of what vidsparse needs new, so it is never imported here.
"""
