"""A model writes the corpus: prompts, requests, filters, within a budget.

Start with `run`.
"""
