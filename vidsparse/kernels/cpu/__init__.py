"""The fast CPU executor, in plain torch: `executor` states its facts, `engine` runs a plan.

`call` prepares a call, `keys` the keys and values of a head at all levels, `rows` lays out the
query blocks, `step` runs them, `threads` spreads heads over threads. `routes` knows how matrices
are multiplied, from the figures of `probe`; `crossover` when dense is as fast; `store` keeps both
for this `machine`.
"""
