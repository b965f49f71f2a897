"""One student: a training step beside other ways (`__main__.py`), and waiting for data (`feeding.py`)."""
