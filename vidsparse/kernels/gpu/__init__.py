"""The Triton executor: `executor` states its facts, `engine` goes from a plan to launches.

`support` says what runs where, without importing triton; `operands` holds the nouns; `operator`
makes operators of torch out of launchers; every other file is a kernel with its launcher.
"""
