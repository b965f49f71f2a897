"""Files: written atomically, named by digests, HDF5, run.json.

Read `files` first; `digests` and `fingerprints` name content.
"""
