"""Where the pipeline is someone else's: a file of facts for each server, over `sparse_attention`.

    served.py             settings from the environment, one self-attention call of a server
    vllm_omni.py          vLLM-Omni: an attention backend in the place of one of its own
    sglang_diffusion.py   SGLang Diffusion: the same

A server's file has `register`, which its plugin loader calls in each of its processes: the entry
point of `pyproject.toml`. Without `VIDSPARSE_PRESET` in the environment it changes nothing. It
states where the server says what `served.attend` asks for: the grid of the video and what else
stands in the sequence, step and number of steps, the layer, and what a dense call is. The servers'
packages are no dependencies: their modules are imported when they call us.
"""
