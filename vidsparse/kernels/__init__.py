"""Kernels: everything that executes a BlockPlan. Only this folder may import triton.

An executor is a file here; `executor.py` is its contract. It turns a plan into (O, LSE):

q [B, H, Sq, D], k, v [B, H, Sk, D] in the order that the plan's blocks refer to (strided views
allowed); out like q; lse float32 [B, H, Sq], natural logarithm. With u over the token groups that
the plan gives to the block of query t, n_u their numbers of real tokens, kbar_u and vbar_u their
means, s = 1/sqrt(D):

    a_tu = s q_t . kbar_u + ln n_u        LSE_t = ln sum_u exp(a_tu)
    O_t  = (sum_u exp(a_tu) vbar_u + first-order term) / sum_u exp(a_tu)

A row without any group gives O = 0, LSE = -inf. An executor executes a plan exactly or refuses it
with a ValueError that names the cure; `reference` executes every plan.
"""
