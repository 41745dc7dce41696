"""What a run costs, before it runs: work by stage, constants of a machine, seconds and an error.

`forward.py` states the facts of one forward of a transformer, `stages.py` what it computes with
dense and with sparse attention: FLOPs, bytes, exponentials and launches by stage. `machine.py`
holds what a machine does in a second, each constant with its source: of a GPU from the table
`configs/machines.yaml` (`gpus.py`) or, where there are rows of it, from what the GPU suite has
measured (`results.py`); of the CPU at hand `calibrate.py` measures it. `clock.py` turns work into
seconds, `keeping.py` says what calls carry from step to step, `run.py` turns a schedule into a
prediction:

    seconds of a stage = max(FLOPs / rate, bytes / bandwidth, exponentials / rate) + launches x host

All in FLOPs, bytes and seconds. A multiplication and an addition are two FLOPs. Densities are kept
work, in (0, 1].
"""
