"""The diffusers side: how a video model is made to call vidsparse, and how that is undone.

`families/` knows the models, a family a file, `adapter.py` says what there is to know of one, and
`private_names.py` holds what diffusers does not promise to keep. The other files know no model;
`installation.py` puts them to work on one pipeline.
"""
