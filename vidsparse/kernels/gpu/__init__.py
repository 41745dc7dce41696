"""The Triton executor: `executor` states its facts, `engine` goes from a plan to launches.

`support` says what runs where, without importing triton; `operands` holds the nouns, `operator` the
forward in all forms; every other file is a kernel with its launcher.
"""
