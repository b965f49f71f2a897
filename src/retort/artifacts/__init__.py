"""What a config makes: the identity and the place of every artifact, known before anything runs.

Read `plan` first.
"""
