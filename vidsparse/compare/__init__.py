"""Videos measured against a reference: how much worse, where, and at what speed-up.

arms.py         a file or folder -> the clips of an arm; which clips belong together
measure.py      a pair of clips -> figures, kept on disk; conventions.py (those of others),
                filters.py (VMAF, XPSNR), learned.py (LPIPS), floor.py (what a codec costs)
sets.py         figures of many clips -> spread, paired bootstrap, front
thresholds.py   --fail-under
comparison.py   all of it in one value
summary.py, files.py   that value -> files
run.py          Request -> comparison on file; display.py shows it on a terminal
"""
