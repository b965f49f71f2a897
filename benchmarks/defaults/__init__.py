"""Which cache method, temperature, alpha and learning rate serve without thought. Start with `__main__.py`."""
