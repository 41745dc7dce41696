"""One folder a job: what makes a job the same, what its folder is called and holds, how it appears.

    identity.py   facts that decide the pixels -> id; files of a model -> its fingerprint
    layout.py     names of the folder and of the files in it; the sidecar, metrics.json
    workplace.py  the hidden folder beside it: one owner, stale ones repaired
    publish.py    checked before, filled aside, renamed into place as one act

A folder of a job holds what `layout.ABOUT` lists. Its sidecar says which job it is ("id"), all that
decided the pixels and the versions it was made with, and which files are of the job ("files"); what
else lies in the folder belongs to the user. Readers take the lossless clip where there is one.
"""
