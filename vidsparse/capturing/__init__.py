"""`vidsparse capture`: q, k and v of chosen heads of a dense run, for measuring methods on them.

command.py   the command
run.py       what is captured, and the run that stops when all of it is there
files.py     one safetensors file for each step and layer
"""
