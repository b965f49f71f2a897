"""Files: written atomically, named by digests, HDF5 in one layout, run.json.

Read `files` first; `digests` and `fingerprints` say how content is named.
"""
