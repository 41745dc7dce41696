"""`vidsparse predict`: what a run would cost, on this machine or on a GPU that is not here.

`command.py` holds the options, `subject.py` finds what the run does without weights (`known.py`
without any file of the model, for checkpoints that have a card), `display.py` shows it. The cost
model itself is `vidsparse.costs`.
"""
