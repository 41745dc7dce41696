"""Kernels: everything that executes a BlockPlan. Only this folder may import triton.

An executor is a file here; `executor.py` is its contract. It turns a plan into (O, LSE):

q [B, H, Sq, D], k, v [B, H, Sk, D] in the order that the plan's blocks refer to (strided views
allowed); out like q; lse float32 [B, H, Sq], natural logarithm. With u over the token groups that
the plan gives to the block of query t, n_u their numbers of real tokens, kbar_u and vbar_u their
means, s = 1/sqrt(D):

    a_tu = s q_t . kbar_u + ln n_u        LSE_t = ln sum_u exp(a_tu)
    O_t  = (sum_u exp(a_tu) vbar_u + F_t) / sum_u exp(a_tu)

For a block j that row i reads as `rest`, a_tj = s q_t . kbar_j + ln n_j + rest_bias_ij; -inf is not
read. F_t is the first-order term of these blocks: of scope "block" and "global" as in
`vidsparse.compensation.taylor`; of scope "row", with qbar_i the mean over the finite queries of the
block,

    F_t = s G_t (q_t H_i),  H_i = sum_j w_ij H_j / n_j,  H_j = sum_{n in j} (k_n - kbar_j)^T v_n
    G_t = sum_j exp(a_tj),  w_ij = softmax_j(s qbar_i . kbar_j + ln n_j + rest_bias_ij)

which is "block" with the mass of every block as it was drafted for the mean query. With orders of
each head, row t of q, out and LSE is order_q[t], row n of k and v is order_k[n] wherever the above
says t and n.

A row without any group gives O = 0, LSE = -inf. An executor executes a plan exactly or refuses it
with a ValueError that names the cure; `reference` executes every plan.
"""
