"""`vidsparse calibrate`: a preset for one model, whose densities come from its own activations.

command.py   the command
goal.py      what is to be reached, and the table of densities that reaches it at least cost
promise.py   what the videos of a few prompts say of those of others
meter.py     what each head loses at each density, seen in a dense run
runs.py      the runs of a calibration, each kept on disk when it is done
run.py       the order of it all, and the preset that is written
"""
